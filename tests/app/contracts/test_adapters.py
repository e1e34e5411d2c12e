"""Which pool loads which later adapters."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.model import LaterAdapterSettings, ModelArgs, ModelSettings
from app.contracts.adapters import (
    AdapterPlan,
    WantedAdapter,
    plan_adapters,
    read_wanted,
    to_note,
)

pytestmark = pytest.mark.unit

NAMES = st.sampled_from(["a", "b", "c", "d", "org/m", "short", "first"])
POOLS = st.sampled_from(["p0", "p1", "p2", "none"])


def model(rooms):
    pools = [
        {"name": f"p{n}", "engine": "vllm", "model": "m", "adapter_room": room,
         "adapters": [{"name": "first", "path": "/first"}]}
        for n, room in enumerate(rooms)
    ]  # fmt: skip
    return ModelArgs.load({"id": "org/m", "aliases": ["short"], "pools": pools}, "args")


def later(*given):
    return tuple(
        LaterAdapterSettings(name=name, path=f"/{name}", pools=pools) for name, pools in given
    )


@given(
    rooms=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    asked=st.lists(
        st.tuples(NAMES, st.lists(POOLS, unique=True).map(tuple)), unique_by=lambda one: one[0]
    ),
)
def test_each_adapter_is_in_all_its_pools_or_in_none_with_a_reason(rooms, asked):
    args, adapters = model(rooms), later(*asked)
    plan = plan_adapters(args, adapters)
    roomy = {pool.name: pool.adapter_room for pool in args.pools if pool.adapter_room}
    assert plan.by_pool.keys() == roomy.keys()
    for pool, wanted in plan.by_pool.items():
        assert len(wanted) <= roomy[pool]
        assert max(Counter(one.name for one in wanted).values(), default=1) == 1
    for place, one in enumerate(adapters):
        holding = {pool for pool, of in plan.by_pool.items() if one.name in {w.name for w in of}}
        assert holding == (set() if place in plan.problems else set(one.pools or roomy))
        assert bool(holding) != (place in plan.problems)
    assert not set(plan.names) & {"org/m", "short", "first"}


@pytest.mark.parametrize(
    ("rooms", "asked", "problem"),
    [
        ([1], ("short", ()), "the name 'short' is taken already"),
        ([1], ("first", ()), "the name 'first' is taken already"),
        ([0], ("a", ()), "no pool of the model has `adapter_room`"),
        ([0, 1], ("a", ("p0",)), "the model has no pool 'p0' with `adapter_room`"),
        ([1], ("a", ("p0", "p7")), "the model has no pool 'p7' with `adapter_room`"),
    ],
)
def test_why_an_adapter_is_not_loaded_is_said(rooms, asked, problem):
    plan = plan_adapters(model(rooms), later(asked))
    assert plan.problems == {0: problem} and plan.names == ()


def test_one_more_than_there_is_room_for_is_the_last():
    plan = plan_adapters(model([1]), later(("a", ()), ("b", ())))
    assert plan.problems == {1: "the pool 'p0' has `adapter_room` for 1 only"}
    assert plan == AdapterPlan({"p0": (WantedAdapter("a", "/a"),)}, plan.problems)


@given(st.lists(st.builds(WantedAdapter, st.text(), st.text())))
def test_a_note_is_read_as_it_was_written(wanted):
    assert read_wanted(to_note(wanted)) == tuple(wanted)


def test_without_a_note_there_are_none_and_another_versions_is_refused():
    assert read_wanted(None) == ()
    for note in (b'[{"name": "a"}]', b"[1]", b"{"):
        with pytest.raises(ValueError):
            read_wanted(note)


def test_a_name_twice_is_refused():
    twice = [{"name": "a", "path": "/a"}, {"name": "a", "path": "/b"}]
    with pytest.raises(ValueError, match="taken already"):
        ModelSettings.load({"adapters": twice}, "user_config")
