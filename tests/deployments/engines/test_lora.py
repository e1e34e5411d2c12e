"""LoRA adapters: what is read of them, and what engines say of them."""

import asyncio
from functools import partial

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.model import ModelArgs, PoolSettings
from app.core.dialect import Route
from deployments.engines.base import EngineContractError, Launch, prove_lora
from deployments.engines.lora import (
    CONFIG_NAME,
    LoraAdapter,
    LoraRoom,
    highest_rank,
    listed_loras,
    model_names,
    read_lora,
    why_refused,
)
from deployments.engines.registry import adapter_named
from deployments.hosting.launch import make_launch
from deployments.simulator.application import Application
from deployments.simulator.engine import Engine
from deployments.simulator.settings import SimulatedSettings

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        ('{"r": 16}', 16),
        ('{"r": "16"}', None),
        ('{"r": 0}', None),
        ("{}", None),
        ("[]", None),
        ("not JSON", None),
        (None, None),
    ],
)
def test_the_rank_is_read_where_it_can_be(tmp_path, monkeypatch, config, rank):
    if config is not None:
        (tmp_path / CONFIG_NAME).write_text(config)
    monkeypatch.setenv("LORAS", str(tmp_path))
    pool = {"name": "p", "engine": "vllm", "model": "m"}
    pool["adapters"] = [{"name": "a", "path": "${LORAS}"}]
    launch = make_launch("m", PoolSettings.load(pool, "pool"), host="127.0.0.1", port=1)
    assert launch.loras == (LoraAdapter("a", str(tmp_path), rank),)
    assert read_lora("a", str(tmp_path)) == launch.loras[0]


@given(st.lists(st.none() | st.integers(1, 512)))
def test_the_highest_rank_is_one_of_them_and_none_is_higher(ranks):
    known = [rank for rank in ranks if rank is not None]
    found = highest_rank(LoraAdapter(str(n), "", rank) for n, rank in enumerate(ranks))
    assert found == (max(known) if known else None)


ADAPTERS = (LoraAdapter("a", "/a"), LoraAdapter("b", "/b"))


@pytest.mark.parametrize(
    "models", [None, [], {}, {"data": None}, {"data": ["a"]}, {"data": [{"id": "c"}, {}]}]
)
async def test_an_engine_that_does_not_list_its_adapters_has_none(models):
    class Http:
        async def get_json(self, path, *, authorized=True):
            return 200, models

    assert listed_loras(models, ADAPTERS) == frozenset()
    launch = Launch("m", "m", "", 0, 1, "", "", loras=ADAPTERS)
    with pytest.raises(EngineContractError, match="has not loaded the adapter a"):
        await prove_lora(Http(), "engine", launch)
    assert await prove_lora(Http(), "engine", Launch("m", "m", "", 0, 1, "", "")) == frozenset()


def test_only_adapters_that_were_asked_for_count():
    models = {"data": [{"id": "m"}, {"id": "b", "parent": "m"}, {"id": "c"}]}
    assert listed_loras(models, ADAPTERS) == {"b"}


def model(*adapters, **more):
    pools = [
        {"name": f"p{n}", "engine": "vllm", "model": "m",
         "adapters": [{"name": name, "path": "/x"} for name in names]}
        for n, names in enumerate(adapters)
    ]  # fmt: skip
    return ModelArgs.load({"id": "org/m", "aliases": ["m"], "pools": pools, **more}, "args")


def test_a_model_has_the_adapters_of_all_its_pools():
    assert model(["a", "b"], ["b", "c"]).adapters == ("a", "b", "c")


@pytest.mark.parametrize("names", [["a", "a"], ["org/m"], ["m"], ["a:b"], ["a=b"], ["a b"], [""]])
def test_a_name_that_is_taken_or_that_engines_would_misread_is_refused(names):
    with pytest.raises(ValueError):
        model(names)


def test_engines_without_adapters_are_refused_before_they_start():
    from deployments.model import build

    pool = {"name": "p", "engine": "tensorrt_llm", "model": "m"}
    args = {"id": "m", "pools": [{**pool, "adapters": [{"name": "a", "path": "/x"}]}]}
    assert not adapter_named("tensorrt_llm").loads_lora
    with pytest.raises(ValueError, match="loads no LoRA adapters"):
        build(args)


def test_the_routes_of_a_dialect_are_those_of_its_adapters_too():
    from app.core.dialect import Dialect

    dialect = Dialect(
        "e", routes=frozenset({Route.CHAT, Route.MESSAGES}), adapters=frozenset({"a"}),
        adapter_routes=frozenset({Route.CHAT, Route.COMPLETIONS}),
    )  # fmt: skip
    assert [route for route in Route if dialect.serves(route, "a")] == [Route.CHAT]
    assert not any(dialect.serves(route, "b") for route in Route)
    assert {route for route in Route if dialect.serves(route)} == dialect.routes


def test_engines_that_cannot_load_adapters_later_are_refused_before_they_start():
    from deployments.model import build

    pool = {"name": "p", "engine": "tensorrt_llm", "model": "m", "adapter_room": 1}
    assert not adapter_named("tensorrt_llm").swaps_lora
    with pytest.raises(ValueError, match="loads no LoRA adapters while it runs"):
        build({"id": "m", "pools": [pool]})


@pytest.mark.parametrize(
    ("status", "answer", "why"),
    [
        (200, None, ""),  # vLLM's sentence is no JSON
        (200, {"success": True, "error_message": ""}, ""),
        (404, {"error": {"message": "No adapter found for /x", "code": 404}}, "No adapter found "),
        (400, {"success": False, "error_message": "already loaded"}, "already loaded"),
        (400, {"success": False, "error_message": None}, "status 400"),
        (404, {"detail": "Not Found"}, "status 404"),
        (500, None, "status 500"),
    ],
)
def test_why_an_engine_refused_is_in_its_own_words(status, answer, why):
    assert why_refused(status, answer).startswith(why) and bool(why) == (status != 200)


@given(rank=st.integers(1, 512), ranks=st.lists(st.none() | st.integers(1, 512)))
def test_room_is_for_the_highest_rank_of_all(rank, ranks):
    first = [LoraAdapter(str(n), "", one) for n, one in enumerate(ranks)]
    known = [one for one in ranks if one is not None]
    assert LoraRoom(1, rank).highest_rank(first) == max([rank, *known])
    assert LoraRoom(0, rank).highest_rank(first) == highest_rank(first)


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_the_simulated_engine_loads_and_unloads_by_its_dialects_own_requests(
    tmp_path, dialect
):
    """Through the adapter that the real engine has."""
    pool = {"name": "p", "engine": "simulated", "model": "m", "adapter_room": 1,
            "engine_args": {"dialect": dialect}}  # fmt: skip
    launch = make_launch("m", PoolSettings.load(pool, "pool"), host="127.0.0.1", port=1, key="k")
    settings = SimulatedSettings.load({"dialect": dialect, "adapter_room": 1}, "engine_args")
    application = Application(Engine(settings, asyncio.get_running_loop()), "m", "m", "k")
    (tmp_path / CONFIG_NAME).write_text("{}")
    asked = partial(httpx.AsyncClient, transport=httpx.ASGITransport(application))
    async with asked(base_url="http://e", headers={"authorization": "Bearer k"}) as client:

        class Http:
            async def post_json(self, path, body):
                answer = await client.post(path, json=body)
                told = answer.headers["content-type"] == "application/json"
                return answer.status_code, answer.json() if told else None

        adapter = adapter_named("simulated")
        here, lost = LoraAdapter("a", str(tmp_path)), LoraAdapter("b", str(tmp_path / "no"))
        assert await adapter.load_lora(launch, Http(), here) == ""
        assert "already" in await adapter.load_lora(launch, Http(), here)
        assert str(tmp_path / "no") in await adapter.load_lora(launch, Http(), lost)
        assert model_names((await client.get("/v1/models")).json()) == {"m", "a"}
        assert await adapter.unload_lora(launch, Http(), "a") == ""
        assert "cannot be found" in await adapter.unload_lora(launch, Http(), "a")
        assert model_names((await client.get("/v1/models")).json()) == {"m"}
    async with asked(base_url="http://e") as client:
        for path in ("/v1/load_lora_adapter", "/load_lora_adapter"):
            assert (await client.post(path, json={})).status_code == 401


@pytest.mark.parametrize("dialect", ["vllm", "sglang"])
async def test_without_room_it_has_no_such_routes(dialect):
    settings = SimulatedSettings.load({"dialect": dialect}, "engine_args")
    application = Application(Engine(settings, asyncio.get_running_loop()), "m", "m", "k")
    transport, headers = httpx.ASGITransport(application), {"authorization": "Bearer k"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://e", headers=headers
    ) as client:
        for path in ("/v1/load_lora_adapter", "/load_lora_adapter"):
            assert (await client.post(path, json={})).status_code == 404
