from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.contracts.start import PoolStart, StartFailure, StartProblem
from app.contracts.status import Sleep
from app.core.tiers import PriorityMode, Tier
from app.gateway.models_route import model_entry
from app.web.model_view import ModelView, count, engine_words, price
from tests.app.web.snapshots import replica, snapshot

pytestmark = pytest.mark.unit

OFF, QUEUE = {"tiers": {"priority": "off"}}, {"tiers": {"priority": "queue"}}
ASLEEP = Sleep(tuple(Tier))
FAILED = {"a": StartFailure("a", StartProblem.OUT_OF_MEMORY, "killed", "less")}


@pytest.mark.parametrize(
    ("seen", "held", "note"),
    [
        (snapshot("m", replica()), True, "takes the slots of lower tiers"),
        (snapshot("m", replica(preempts=False)), True, "in the engine."),
        (snapshot("m", replica(), replica(2, native=False)), True, "in the engine"),
        (snapshot("m", replica(native=False), settings=QUEUE), True, "front of the queue"),
        (snapshot("m", replica(native=False)), False, "No running engine has native priority"),
        (snapshot("m", replica(), settings=OFF), False, "The operator does not offer it"),
        (snapshot("m", sleep=ASLEEP), False, "The first request wakes it"),
        (snapshot("m", sleep=Sleep((Tier.DEFAULT,))), False, "had no native priority"),
        (snapshot("m", sleep=Sleep(tuple(Tier), waking=True)), False, "starting"),
        (snapshot("m", pools=("a",)), False, "Its engines are starting."),
        (snapshot("m", pools=("a",), failed=FAILED), False, "failed to start: it is out of memory"),
        (snapshot("m", pools=("a", "b"), failed=FAILED), False, "Its engines are starting."),
        (snapshot("m", pools=("a", "b"), failed=FAILED, missing={"b": "gpu"}), False, "failed"),
        (snapshot("m", pools=("a",), missing={"a": "gpu"}), False, "No machine of this cluster"),
    ],
)
def test_priority_is_shown_where_it_holds_and_why_not_elsewhere(seen, held, note):
    shown = ModelView.of(seen).priority
    assert (shown.tier, shown.held) == (Tier.PRIORITY, held)
    assert note in shown.note


@given(
    st.lists(st.builds(replica, st.integers(), native=st.booleans(), preempts=st.booleans())),
    st.sampled_from(PriorityMode),
    st.booleans(),
    st.none() | st.builds(Sleep, st.just(tuple(Tier)), st.booleans()),
)
def test_a_tier_is_held_exactly_where_the_models_list_has_it(replicas, mode, flex, sleep):
    seen = snapshot(
        "m",
        *replicas,
        settings={"tiers": {"priority": mode.value, "flex": flex}},
        sleep=None if replicas else sleep,
        pools=("a",),
    )
    shown = ModelView.of(seen)
    held = {one.tier for one in shown.tiers if one.held}
    assert held == (set(seen.service_tiers) if replicas else set())
    assert all(one.note.endswith(".") for one in shown.tiers)
    assert shown.shown_tiers


@given(st.lists(st.sampled_from(["", "downloading 25 %", "compiling"]), max_size=3))
def test_a_model_that_starts_says_what_its_engines_do(phases):
    starts = {f"r{n}": PoolStart(one, 1.0, pool=f"pool{n}") for n, one in enumerate(phases)}
    seen = snapshot("m", pools=("pool0", "pool1", "pool2"), starts=starts)
    notes = {one.note for one in ModelView.of(seen).tiers}
    known = [one for one in dict.fromkeys(phases) if one]
    words = f": {'; '.join(known)}" if known else ""
    assert notes == {f"Its engines are starting{words}."}
    ready = replace(seen, replicas=(replica(),))
    assert not any("starting" in one.note for one in ModelView.of(ready).tiers)
    entry = model_entry(seen)["metadata"]["starting"]
    assert [(one["pool"], one["phase"]) for one in entry] == [
        (start.pool, start.phase) for start in starts.values()
    ]


def test_a_models_replicas_are_shown_by_pool():
    seen = snapshot("m", replica(1), replica(2), replica(3, "sglang", native=False))
    vllm, sglang = ModelView.of(seen).pools
    assert (vllm.engine, vllm.replicas, vllm.slots, vllm.honours) == ("vLLM", 2, 16, True)
    assert (sglang.engine, sglang.replicas, sglang.honours) == ("SGLang", 1, False)


def test_nothing_secret_is_shown():
    shown = repr(ModelView.of(snapshot("m", replica())))
    assert "secret" not in shown and "http" not in shown and "1.2.3" not in shown


def test_a_model_that_only_embeds_has_no_chat():
    assert not ModelView.of(snapshot("m", replica(generates=False))).chats
    assert ModelView.of(snapshot("m", replica(generates=False), replica(2))).chats
    # While no replica is ready, that is not known.
    assert ModelView.of(snapshot("m")).chats


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("0", "$0.00"),
        ("0.02", "$0.02"),
        ("3", "$3.00"),
        ("0.0160", "$0.016"),
        ("1E+3", "$1,000.00"),
    ],
)
def test_prices_have_as_many_digits_as_they_need(value, shown):
    assert price(Decimal(value)) == shown


def test_prices_of_images_recordings_and_cache_writes_are_shown_where_there_are_some():
    card = {"input": 1, "output": 2, "cache_write": 2, "image": "0.01", "audio_second": "0.0001"}
    _, default, flex = ModelView.of(snapshot("m", settings={"rate_card": card})).tiers
    assert default.besides == (
        "Written to the cache $2.00, an image $0.01, a second of a recording $0.0001."
    )
    assert "an image $0.008," in flex.besides
    plain = {"rate_card": {"input": 1, "output": 2}}
    assert {tier.besides for tier in ModelView.of(snapshot("m", settings=plain)).tiers} == {""}


def test_prices_of_long_prompts_are_shown_where_they_differ():
    card = {
        "input": "1",
        "output": "2",
        "long_context": {"above": 128_000, "input": "2", "output": "3"},
        "priority": {"input": "4", "output": "4"},
    }
    priority, default, flex = ModelView.of(snapshot("m", settings={"rate_card": card})).tiers
    assert (priority.input, priority.long) == ("$4.00", "")
    assert default.long == (
        "With more than 128,000 prompt tokens: input $2.00, cached $2.00, output $3.00."
    )
    assert "input $1.60," in flex.long


@given(st.decimals(0, 1_000_000, places=12))
def test_no_digit_of_a_price_is_lost(value):
    assert Decimal(price(value).removeprefix("$").replace(",", "")) == value


def test_words():
    assert (count(1, "token"), count(4096, "token")) == ("1 token", "4,096 tokens")
    assert engine_words("tensorrt_llm") == "TensorRT-LLM"
    assert engine_words("simulated-tensorrt-llm") == "simulated TensorRT-LLM"
    assert engine_words("other") == "other"
