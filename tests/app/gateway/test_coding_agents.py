"""Requests of the shape that Codex and Claude Code send, over HTTP, before simulated engines."""

import json
from types import SimpleNamespace

import httpx
import pytest
from backports import zstd

from app.config.model import ModelSettings
from tests.app.gateway.test_anthropic_sdk import CARD, listening
from tests.support.world import ALIAS, World

pytestmark = pytest.mark.unit

PATH = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
CODEX = {
    "model": ALIAS,
    "instructions": "You change code.",
    "input": [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "<permissions>"}],
        },
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "Read a.py"}],
        },
        {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "gAAAA"},
        {"type": "function_call", "name": "read", "arguments": '{"path":"a.py"}', "call_id": "c1"},
        {"type": "function_call_output", "call_id": "c1", "output": "x = 1"},
        {"type": "custom_tool_call", "name": "patch", "input": "*** Begin", "call_id": "c2"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "Done"},
    ],
    "tools": [
        {"type": "function", "name": "read", "strict": False, "parameters": PATH},
        {
            "type": "custom",
            "name": "patch",
            "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'},
        },
        {"type": "web_search", "external_web_access": False},
        {"type": "local_shell"},
        {
            "type": "namespace",
            "name": "multi_agent_v1",
            "description": "Tools for sub-agents.",
            "tools": [{"type": "function", "name": "stop", "strict": False, "parameters": PATH}],
        },
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199-conversation",
    "text": {"verbosity": "low"},
    "client_metadata": {"session_id": "0199", "x-codex-turn-metadata": '{"turn_trigger":"exec"}'},
}
CODEX_HEADERS = {
    "accept": "text/event-stream",
    "originator": "codex_cli_rs",
    "user-agent": "codex_cli_rs/0.162.1 (Debian; x86_64)",
    "session_id": "0199-conversation",
    "session-id": "0199-conversation",
    "thread-id": "0199-conversation",
    "x-client-request-id": "0199-conversation",
    "x-codex-window-id": "0199-conversation:0",
    "x-codex-beta-features": "remote_compaction_v2",
    "openai-beta": "responses=experimental",
    "x-codex-turn-metadata": "{}",
}

CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
CLAUDE_CODE = {
    "model": ALIAS,
    "max_tokens": 1000,
    "temperature": 1,
    "stream": True,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=abcde;"},
        {"type": "text", "text": "You change code.", **CACHED},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Read a.py"}]},
        {"role": "system", "content": "Available agent types for the Agent tool:"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I read it."},
                {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"path": "a.py"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": "x = 1"}],
                    **CACHED,
                },
                {"type": "text", "text": "<system-reminder>"},
            ],
        },
    ],
    "tools": [
        {"name": "Read", "description": "Reads", "input_schema": PATH, **CACHED},
        {"name": "Write", "input_schema": PATH, "eager_input_streaming": True},
    ],
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "high"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "metadata": {"user_id": "user_1_account__session_2"},
}
CLAUDE_CODE_HEADERS = {
    "accept": "application/json",
    "user-agent": "claude-cli/2.1.220 (external, cli)",
    "x-app": "cli",
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
    "anthropic-dangerous-direct-browser-access": "true",
    "x-stainless-lang": "js",
    "x-stainless-retry-count": "0",
}


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path, timeout_s=30)
    await made.start()
    await made.set(ModelSettings.load({"rate_card": CARD}, "user_config"), ["vllm"])
    headers = {"authorization": f"Bearer {made.key('plain')}"}
    async with (
        listening(made) as url,
        httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as client,
    ):
        yield SimpleNamespace(made=made, client=client)
    await made.close()


async def sent(world, path, fields, headers):
    """Send a request; return the answer, its events, and what the engine received."""
    body, headers = json.dumps(fields).encode(), {"content-type": "application/json"} | headers
    if headers.get("content-encoding") == "zstd":
        body = zstd.compress(body)
    answer = await world.client.post(path, content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    data = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
    [*_, request] = world.made.engines["vllm"].observations.report()
    return answer, [json.loads(one) for one in data], request


@pytest.mark.parametrize("coding", [{}, {"content-encoding": "zstd"}])
@pytest.mark.parametrize("tier", [None, "priority", "fast", "flex"])
async def test_codex(world, tier, coding):
    served = {None: "default", "fast": "priority"}.get(tier, tier)
    fields = CODEX | ({"service_tier": tier} if tier else {})
    answer, events, request = await sent(world, "/v1/responses", fields, CODEX_HEADERS | coding)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-service-tier"] == served
    kinds = [event["type"] for event in events]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    response = events[-1]["response"]
    assert response["service_tier"] == served and response["usage"]["estimated_cost"] > 0
    [record] = (await world.made.new_records()).values()
    assert (record["route"], record["served_tier"]) == ("responses", served)
    # The engine gets all of it but the tier, which Frontline has turned into a priority.
    got = request["body"]
    assert got.items() >= {**CODEX, "model": got["model"]}.items()
    assert "service_tier" not in got
    assert got["priority"] == {"priority": -100, "default": 0, "flex": 100}[served]
    assert ({*CODEX_HEADERS} - {"accept"}).isdisjoint(request["headers"])


@pytest.mark.parametrize("path", ["/anthropic/v1/messages", "/v1/messages"])
async def test_claude_code(world, path):
    answer, events, request = await sent(
        world, f"{path}?beta=true", CLAUDE_CODE, CLAUDE_CODE_HEADERS
    )
    assert answer.headers["x-service-tier"] == "default"
    kinds = [event["type"] for event in events]
    assert (kinds[0], *kinds[-2:]) == ("message_start", "message_delta", "message_stop")
    assert events[-2]["usage"]["service_tier"] == "default"
    [record] = (await world.made.new_records()).values()
    assert float(record["cost"]) == events[-2]["usage"]["estimated_cost"] > 0
    got = request["body"]
    assert got.items() >= {**CLAUDE_CODE, "model": got["model"]}.items()
    assert request["path"] == "/v1/messages"


async def test_claude_codes_look_at_its_base_url_needs_no_answer(world):
    """It sends this first, and goes on whatever the status is."""
    answer = await world.client.head("/anthropic", headers=CLAUDE_CODE_HEADERS)
    assert (answer.status_code, answer.content) == (404, b"")


async def test_claude_code_counts_tokens_and_lists_models(world):
    fields = {name: CLAUDE_CODE[name] for name in ("model", "messages", "tools", "system")}
    path = "/anthropic/v1/messages/count_tokens?beta=true"
    counted = await world.client.post(path, json=fields, headers=CLAUDE_CODE_HEADERS)
    assert counted.json()["input_tokens"] > 0
    models = await world.client.get("/anthropic/v1/models?limit=1000", headers=CLAUDE_CODE_HEADERS)
    assert models.json()["has_more"] is False and models.json()["data"][0]["display_name"]
