"""LlamaIndex's ``OpenAILike``."""

import json
import os

import openai
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

WHERE = {"api_base": os.environ["URL"] + "/v1", "api_key": os.environ["KEY"], "max_retries": 0}
ASKED = [ChatMessage(role="user", content="Tell me of the sea")]


def weather(city: str) -> str:
    """Return the weather of a city."""
    return "sunny"


def chat(model="model", tier="priority"):
    return OpenAILike(
        **WHERE,
        model=model,
        max_tokens=12,
        is_chat_model=True,
        is_function_calling_model=True,
        additional_kwargs={"service_tier": tier},
    )


def shown(answer):
    usage = answer.raw.usage
    return {
        "text": answer.message.content,
        "tier": answer.raw.service_tier,
        "tokens": [usage.prompt_tokens, usage.completion_tokens],
        "cost": usage.estimated_cost,
    }


def error_of(**more):
    try:
        chat(**more).chat(ASKED)
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.param]


tools = [FunctionTool.from_defaults(weather)]
called = chat().chat_with_tools(tools, "x", tool_required=True)
[call] = chat().get_tool_calls_from_response(called)
*_, streamed = chat().stream_chat(ASKED)
print(
    json.dumps(
        {
            "answer": shown(chat().chat(ASKED)),
            "stream": shown(streamed),
            "tool": [call.tool_name, call.tool_kwargs],
            "unknown_model": error_of(model="no/such"),
            "bad_tier": error_of(tier="gold"),
        }
    )
)
