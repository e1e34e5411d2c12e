"""LangChain's ``ChatOpenAI``."""

import json
import os

import openai
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

WHERE = {"base_url": os.environ["URL"] + "/v1", "api_key": os.environ["KEY"], "max_retries": 0}


@tool
def weather(city: str) -> str:
    """Return the weather of a city."""
    return "sunny"


def chat(**more):
    asked = {"model": "model", "service_tier": "priority", "max_tokens": 12} | more
    return ChatOpenAI(**WHERE, **asked)


def shown(message):
    usage = message.usage_metadata
    return {
        "text": message.text,
        "tier": message.response_metadata["service_tier"],
        "tokens": [usage["input_tokens"], usage["output_tokens"]],
        "cost": message.response_metadata.get("token_usage", {}).get("estimated_cost"),
    }


def error_of(**more):
    try:
        chat(**more).invoke("x")
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.param]


streamed = None
for chunk in chat().stream("Tell me of the sea"):
    streamed = chunk if streamed is None else streamed + chunk
[call] = chat().bind_tools([weather], tool_choice="any").invoke("x").tool_calls
responses = chat(use_responses_api=True).invoke("x").response_metadata
print(
    json.dumps(
        {
            "answer": shown(chat().invoke("Tell me of the sea")),
            "stream": shown(streamed),
            "tool": [call["name"], call["args"]],
            "unknown_model": error_of(model="no/such"),
            "bad_tier": error_of(service_tier="gold"),
            "responses": responses["service_tier"],
        }
    )
)
