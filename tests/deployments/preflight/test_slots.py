"""How many slots a replica has, by what its engine reports."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.model import FALLBACK_SLOTS, MOST_AUTO_SLOTS, PoolSettings
from app.contracts.findings import Level
from app.core.dialect import Dialect
from deployments.engines.base import EngineFacts
from deployments.preflight.memory import USUAL_TOKENS
from deployments.preflight.slots import size

pytestmark = pytest.mark.unit

DIALECT = Dialect(engine="test")


def pool(slots):
    return PoolSettings.load({"name": "p", "engine": "vllm", "model": "m", "slots": slots}, "pool")


def sized(slots, kv_tokens=None, context=4096, most=None, estimated=None):
    return size(pool(slots), EngineFacts("1", context, DIALECT, kv_tokens, most), estimated)


@pytest.mark.parametrize(
    ("context", "slots", "said"),
    [
        (4096, 8, "ok: the KV cache holds 23,296 tokens, 11 requests of a usual 2,048"),
        (4096, 16, "Fix: slots: 11, or a larger KV cache"),
        # Requests are no longer than the engine takes.
        (1000, 8, "23 requests of a usual 1,000; slots is 8"),
        (50_000, 12, "warning: the KV cache holds 23,296 tokens, 11 requests of a usual 2,048"),
    ],
)
def test_a_number_of_slots_is_compared_with_the_kv_cache_and_kept(context, slots, said):
    compared = sized(slots, 23_296, context)
    assert said in str(compared.finding) and compared.slots == slots
    assert sized(slots, None, context) == size(pool(slots), EngineFacts("1", None, DIALECT), 3)
    assert sized(slots, 23_296, None).finding is None


@pytest.mark.parametrize(
    ("given", "slots", "said"),
    [
        ({"kv_tokens": 23_296}, 11, "ok: the KV cache holds 23,296 tokens, 11 requests"),
        ({"kv_tokens": 23_296, "context": None}, 11, "a usual 2,048; slots: auto takes 11"),
        ({"kv_tokens": 23_296, "context": 1000}, 23, "a usual 1,000; slots: auto takes 23"),
        ({"kv_tokens": 23_296, "most": 4}, 4, "11 requests of a usual 2,048; slots: auto takes 4"),
        ({"kv_tokens": 10**7, "most": 1024}, 256, "slots: auto takes 256"),
        ({"kv_tokens": 23_296, "estimated": 60}, 11, "slots: auto takes 11"),
        ({"estimated": 60}, 60, "does not report the size of its KV cache; slots: auto takes 60"),
        ({"estimated": 600, "most": 32}, 32, "takes 32, as computed before its start"),
        ({}, 8, "warning: the engine does not report the size of its KV cache; slots: auto"),
    ],
)
def test_auto_takes_what_fits(given, slots, said):
    result = sized("auto", **given)
    assert result.slots == slots and said in str(result.finding)


maybe = st.none() | st.integers(1, 10**8)


@given(kv=maybe, context=maybe, most=st.none() | st.integers(1, 4096), estimated=maybe)
def test_auto_is_at_least_one_and_never_more_than_runs_or_fits(kv, context, most, estimated):
    result = sized("auto", kv, context, most, estimated)
    assert 1 <= result.slots <= min(most or MOST_AUTO_SLOTS, MOST_AUTO_SLOTS)
    usual = min(USUAL_TOKENS, context or USUAL_TOKENS)
    if kv:
        assert result.slots == 1 or result.slots * usual <= kv
    else:
        assert result.slots <= (estimated or FALLBACK_SLOTS)
        assert (result.finding.level is Level.WARNING) is (not estimated)
