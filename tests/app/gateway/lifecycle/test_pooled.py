"""Reranking, scores and other routes of models that do not generate, through a whole ingress."""

import json
from decimal import Decimal

import pytest

from app.config.model import ModelSettings
from app.core.dialect import POOLED_ROUTES, Route
from app.gateway.asgi import paths_of
from tests.support.world import ALIAS, ENGINES, Seen, World

pytestmark = pytest.mark.unit

CARD = {"rate_card": {"input": 2, "output": 4}, "queue": {"headroom": 0}}
ASK = {
    Route.RERANK: {"query": "sea", "documents": ["a b", "sea", "c"], "top_n": 1},
    Route.SCORE: {"text_1": "sea", "text_2": ["a b", "sea", "c"]},
}


@pytest.fixture
async def world(tmp_path, monkeypatch):
    monkeypatch.setitem(ENGINES, "vllm", {"embedding_dimensions": 4, "preemption": False})
    made = World(tmp_path, timeout_s=30)
    await made.start()
    await made.set(ModelSettings.load(CARD, "user_config"), ["vllm", "sglang"])
    yield made
    await made.close()


async def ask(world, route, **fields):
    seen = Seen(None, [])
    await world.ask(seen, route, {"model": ALIAS, **fields}, "plain")
    return seen, (await world.new_records()).get(seen.request_id)


@pytest.mark.parametrize("route", ASK)
@pytest.mark.parametrize("tier", ["priority", "default", "flex"])
async def test_the_tokens_of_all_texts_are_billed_at_the_tier(world, route, tier):
    # Streams are a matter of text that is generated.
    seen, record = await ask(world, route, service_tier=tier, stream=True, **ASK[route])
    answer = json.loads(seen.body)
    assert (seen.status, seen.headers["x-service-tier"], answer["service_tier"]) == (
        200,
        tier,
        tier,
    )
    best = answer["results"][0] if route is Route.RERANK else answer["data"][1]
    assert best["index"] == 1
    assert (record["route"], record["served_tier"], record["state"]) == (route, tier, "completed")
    assert (record["prompt_tokens"], record["completion_tokens"], record["stream"]) == (5, 0, 0)
    assert record["usage_estimated"] == 0
    assert Decimal(str(answer["usage"]["estimated_cost"])) == Decimal(record["cost"]) > 0
    [attempt] = seen.attempts
    assert attempt.replica_id.startswith("vllm"), "the other engine does not have the route"
    assert attempt.fields["priority"] == {"priority": -100, "default": 0, "flex": 100}[tier]


@pytest.mark.parametrize("route", sorted(POOLED_ROUTES - ASK.keys()))
async def test_what_no_engine_has_is_refused(world, route):
    seen, record = await ask(world, route, input="x")
    assert (seen.status, json.loads(seen.body)["error"]["code"]) == (400, "unsupported_endpoint")
    assert (record["state"], record["cost"]) == ("refused", "0")


@pytest.mark.parametrize("encoding", ["bytes", "bytes_only"])
@pytest.mark.parametrize("route", [Route.EMBEDDINGS, Route.POOLING])
async def test_an_answer_that_has_no_usage_is_refused_before_an_engine_makes_it(
    world, route, encoding
):
    seen, _ = await ask(world, route, input="x", encoding_format=encoding)
    error = json.loads(seen.body)["error"]
    assert (seen.status, error["param"], error["code"]) == (
        400, "encoding_format", "unsupported_value",
    )  # fmt: skip
    assert not seen.attempts


def test_the_paths_that_clients_know():
    assert {"/v1/rerank", "/v2/rerank", "/rerank", "/v1/openai/rerank"} == set(
        paths_of(Route.RERANK)
    )
    for route in (Route.SCORE, Route.CLASSIFY, Route.POOLING):
        assert {f"/v1/{route}", f"/{route}"} < set(paths_of(route))
