"""LiteLLM as a library, with its provider for OpenAI-compatible servers, and with Anthropic's."""

import json
import os

import litellm
import openai

litellm.suppress_debug_info = True
KEY, URL = os.environ["KEY"], os.environ["URL"]
ASKED = {"messages": [{"role": "user", "content": "Tell me of the sea"}], "max_tokens": 12}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}


def ask(model="openai/model", tier="priority", **more):
    where = {"base_url": URL + "/v1", "api_key": KEY, "max_retries": 0}
    return litellm.completion(model=model, service_tier=tier, **where | ASKED | more)


def shown(answer):
    usage = answer.usage
    return {
        "text": answer.choices[0].message.content,
        "tier": answer.service_tier,
        "tokens": [usage.prompt_tokens, usage.completion_tokens],
        "cost": getattr(usage, "estimated_cost", None),
    }


def error_of(**more):
    try:
        ask(**more)
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.param]


def message(**more):
    where = {"base_url": URL + "/anthropic", "api_key": KEY}
    return litellm.completion(model="anthropic/model", **where | ASKED | more).usage.service_tier


chunks = list(ask(stream=True, stream_options={"include_usage": True}))
called = ask(tools=[WEATHER], tool_choice="required").choices[0].message.tool_calls[0].function
print(
    json.dumps(
        {
            "answer": shown(ask()),
            "stream": shown(litellm.stream_chunk_builder(chunks)),
            "tool": [called.name, json.loads(called.arguments)],
            "models": litellm.get_valid_models(
                check_provider_endpoint=True,
                custom_llm_provider="openai",
                api_key=KEY,
                api_base=URL,
            ),
            "unknown_model": error_of(model="openai/no/such"),
            "bad_tier": error_of(tier="gold"),
            # private: LiteLLM's documentation reads headers here.
            "header": ask()._hidden_params["additional_headers"]["llm_provider-x-service-tier"],  # noqa: SLF001
            # With Anthropic's provider `extra_body` is sent as a field of that name.
            "message": [
                message(service_tier="priority", allowed_openai_params=["service_tier"]),
                message(extra_body={"service_tier": "priority"}),
            ],
        }
    )
)
