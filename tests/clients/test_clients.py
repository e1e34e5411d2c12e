"""Clients that users have, unmodified, in environments of their own (``scripts/setup clients``).

What each shows of the served tier and of the cost is in docs/clients.md.
"""

import json

import httpx
import pytest

from tests.clients.conftest import PROGRAMS
from tests.support.world import MODEL

pytestmark = pytest.mark.unit

COST = 1.5 * (5 * 2 + 12 * 4) / 1e6
WHOLE = {"tier": "priority", "tokens": [5, 12], "cost": pytest.approx(COST)}
WITHOUT_COST = WHOLE | {"cost": None}


def errors(unknown_model, bad_tier):
    return {
        "unknown_model": [unknown_model, 404, "model"],
        "bad_tier": [bad_tier, 400, "service_tier"],
    }


OPENAI = errors("NotFoundError", "BadRequestError")
VERCEL = errors("AI_APICallError", "AI_APICallError")
LANGCHAIN = errors("OpenAIModelNotFoundError", "OpenAIInvalidRequestError")

# The cost is in an event, and not in the message that the SDK makes of all events.
ANTHROPIC = OPENAI | {"models": [MODEL], "events": {"cost": pytest.approx(COST)}}
# The SDK's own option is dropped with a warning.
VERCEL_OPENAI = VERCEL | {"option": ["serviceTier", "default"]}
# `extra_body` with Anthropic's provider is not what it is elsewhere.
LITELLM = OPENAI | {
    "models": [MODEL],
    "header": "priority",
    "message": ["priority", "default"],
    "unknown_model": ["NotFoundError", 404, None],
}


@pytest.mark.parametrize(
    ("environment", "program", "streamed", "more"),
    [
        ("clients-node", "openai_sdk.mjs", WHOLE, OPENAI | {"models": [MODEL]}),
        ("clients-node", "openai_responses.mjs", WHOLE, OPENAI),
        ("clients-node", "anthropic_sdk.mjs", WITHOUT_COST, ANTHROPIC),
        ("clients-node", "ai_sdk.mjs", WHOLE, VERCEL),
        ("clients-node", "ai_sdk_openai.mjs", WHOLE, VERCEL_OPENAI),
        ("clients", "langchain_chat.py", WITHOUT_COST, LANGCHAIN | {"responses": "priority"}),
        ("clients-more", "llama_index_like.py", WHOLE, OPENAI),
        ("clients-more", "litellm_sdk.py", WITHOUT_COST, LITELLM),
    ],
)
async def test_a_client(site, environment, program, streamed, more):
    seen = json.loads(await site.run(environment, (PROGRAMS / program).read_text()))
    answer, stream = seen.pop("answer"), seen.pop("stream")
    text = answer.pop("text")
    assert len(text.split()) == 12 and stream.pop("text") == text
    assert (answer, stream) == (WHOLE, streamed)
    assert seen.pop("tool") == ["weather", {"city": ""}]
    assert seen == more
    # The answer, its stream and the call of a tool, at least.
    billed = await site.billed()
    assert billed.count(("priority", pytest.approx(COST))) >= 2
    assert [tier for tier, _ in billed].count("priority") >= 3


async def test_the_command_llm(site):
    seen = json.loads(await site.run("clients", (PROGRAMS / "llm_cli.py").read_text()))
    assert len(seen["text"].split()) == 12 and seen["streamed"] == seen["text"]
    assert seen["usage"] == ['Token usage: 5 input, 12 output, {"estimated_cost": 8.7e-05}'] * 2
    assert "404" in seen["unknown_model"] and "no/such" in seen["unknown_model"]
    assert "400" in seen["bad_tier"] and "service_tier" in seen["bad_tier"]
    assert await site.billed() == [("priority", pytest.approx(COST))] * 2


async def test_streams_begin_with_comments_here(site):
    asked = {"model": "model", "messages": [{"role": "user", "content": "x"}], "stream": True}
    async with httpx.AsyncClient(headers={"authorization": f"Bearer {site.key}"}) as client:
        answer = await client.post(f"{site.url}/v1/chat/completions", json=asked)
    assert answer.text.startswith(": keep-alive\n\n")
