import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.queue import QueueSettings
from app.core.dialect import Route
from app.flow.weight import weight

pytestmark = pytest.mark.unit

QUEUE = QueueSettings()


@pytest.mark.parametrize(
    ("route", "sequences", "slots", "expected"),
    [
        (Route.CHAT, 1, 8, 1),
        (Route.CHAT, 5, 8, 5),
        (Route.CHAT, 24, 8, 8),
        (Route.COMPLETIONS, 24, 256, 24),
        (Route.EMBEDDINGS, 1, 8, 1),
        (Route.EMBEDDINGS, 32, 8, 1),
        (Route.EMBEDDINGS, 33, 8, 2),
        (Route.EMBEDDINGS, 100, 8, 4),
        (Route.EMBEDDINGS, 2048, 8, 8),
        ("embeddings", 33, 8, 2),
        (Route.RERANK, 33, 8, 2),
        (Route.SCORE, 33, 8, 2),
        (Route.MESSAGES, 33, 8, 8),
    ],
)
def test_a_request_takes_a_slot_for_each_sequence_and_embeddings_share_them(
    route, sequences, slots, expected
):
    assert weight(sequences, route, QUEUE, slots) == expected


@given(st.integers(-5, 10**9), st.sampled_from(Route), st.integers(1, 10**4), st.integers(0, 10**4))
def test_a_request_takes_at_least_one_slot_and_never_more_than_there_are(
    sequences, route, inputs_per_slot, slots
):
    queue = QueueSettings(inputs_per_slot=inputs_per_slot)
    taken = weight(sequences, route, queue, slots)
    assert 1 <= taken <= max(slots, 1)
    assert taken <= weight(sequences + 1, route, queue, slots)
    assert weight(sequences, Route.EMBEDDINGS, queue, slots) <= taken
    if route is Route.EMBEDDINGS and taken < slots:
        assert (taken - 1) * inputs_per_slot < max(sequences, 1) <= taken * inputs_per_slot
