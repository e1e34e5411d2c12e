"""LoRA adapters: what is read of them, and what engines say of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.model import ModelArgs, PoolSettings
from app.core.dialect import Route
from deployments.engines.base import EngineContractError, Launch, prove_lora
from deployments.engines.lora import (
    CONFIG_NAME,
    LoraAdapter,
    highest_rank,
    listed_loras,
    read_lora,
)
from deployments.engines.registry import adapter_named
from deployments.hosting.launch import make_launch

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
