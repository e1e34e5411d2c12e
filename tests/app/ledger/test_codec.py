from dataclasses import replace
from datetime import timedelta

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.pricing import TokenUsage
from app.ledger.codec import (
    Kind,
    Progress,
    frame,
    read_segment,
)
from app.ledger.leftovers import INGRESS_LOST, Leftovers
from app.ledger.reading import read_record
from app.ledger.record import State
from tests.support.records import NOON, completed, opened, records, usages

pytestmark = pytest.mark.unit

bodies = st.lists(st.binary(min_size=1, max_size=80).map(lambda b: b.replace(b"\n", b"")))
garbage = st.binary(max_size=200) | st.integers(0, 5000).map(bytes)


def written(bodies):
    return [frame(Kind.SETTLED, body) for body in bodies]


def read(data):
    return [found.body for found in read_segment(data).frames]


@given(bodies)
def test_what_was_written_is_read(bodies):
    data = b"".join(written(bodies)) + bytes(1000)
    segment = read_segment(data)
    assert ([f.body for f in segment.frames], segment.damaged) == (bodies, False)


@given(bodies, bodies, st.data())
def test_whatever_becomes_of_the_tail_nothing_before_it_is_lost(before, after, data):
    """Acknowledged frames, then some that are cut or overwritten at any byte."""
    acknowledged = b"".join(written(before))
    tail = bytearray(b"".join(written(after)))
    del tail[data.draw(st.integers(0, len(tail))) :]
    for place in data.draw(st.lists(st.integers(0, max(len(tail) - 1, 0)), max_size=5)):
        if tail:
            tail[place] = data.draw(st.integers(0, 255))
    found = read(acknowledged + bytes(tail) + data.draw(garbage))
    assert found[: len(before)] == before


@given(bodies, bodies, garbage.filter(bool))
def test_damage_in_the_middle_costs_nothing_but_itself(before, after, noise):
    data = b"".join([*written(before), noise, b"\n", *written(after)])
    segment = read_segment(data)
    assert [found.body for found in segment.frames] == before + after
    assert segment.damaged is bool(after)


@given(st.lists(st.binary(min_size=1).map(lambda b: b.replace(b"\n", b"")), min_size=1), st.data())
def test_one_flipped_bit_is_noticed(bodies, data):
    whole = bytearray(b"".join(written(bodies)))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= 1 << data.draw(st.integers(0, 7))
    segment = read_segment(bytes(whole))
    ends = {frame_of.end - 1 for frame_of in read_segment(b"".join(written(bodies))).frames}
    # A line break is not what anybody is billed for. 59dfe9e: the frame after it was lost, too.
    assert len(segment.frames) == len(bodies) - (place not in ends)
    assert all(found.body in bodies for found in segment.frames) and not segment.whole
    last = begins_last(bodies)
    assert segment.damaged is (place < last)


def begins_last(bodies):
    return sum(map(len, written(bodies)[:-1]))


@given(records(), usages, st.booleans())
def test_entries_come_back(record, usage, estimated):
    step = Progress(record.origin.request_id, usage, record.origin.arrived, estimated)
    [written_down] = read_segment(frame(step.kind, step.to_json())).frames
    assert Progress.of(written_down) == step
    (found,) = read(frame(Kind.SETTLED, record.to_json()))
    assert read_record(found) == record


def left_behind(*entries):
    data = b"".join(frame(kind, body) for kind, body in entries)
    found = Leftovers().settled(read_segment(data).frames)
    return [read_record(body) for body in found]


def test_an_open_stream_is_interrupted_with_its_last_progress():
    record = opened("a")
    steps = [
        Progress("a", TokenUsage(10, 0, tokens), NOON + timedelta(seconds=tokens))
        for tokens in (5, 9)
    ]
    (found,) = left_behind(
        (Kind.OPEN, record.to_json()), *((Kind.PROGRESS, step.to_json()) for step in steps)
    )
    assert (found.state, found.reason) == (State.INTERRUPTED, INGRESS_LOST)
    assert (found.usage.completion_tokens, found.duration_s) == (9, 9)
    assert found.served is record.served
    assert record.prices and found.cost == record.prices.cost(TokenUsage(10, 0, 9))


def test_a_stream_settled_from_estimated_progress_says_so():
    counted = Progress("a", TokenUsage(10, 0, 5), NOON)
    estimated = Progress("a", TokenUsage(10, 0, 9), NOON, estimated=True)
    for steps, flag in ([counted, estimated], True), ([estimated, counted], False):
        (found,) = left_behind(
            (Kind.OPEN, opened("a").to_json()), *((step.kind, step.to_json()) for step in steps)
        )
        assert (found.usage, found.usage_estimated) == (steps[-1].usage, flag)


@given(st.booleans())
def test_a_stream_with_images_is_settled_with_them(estimated):
    step = Progress("a", TokenUsage(10, 2, 5, 3, 2, 7), NOON, estimated)
    assert step.kind is Kind.DETAILED
    (found,) = left_behind((Kind.OPEN, opened("a").to_json()), (step.kind, step.to_json()))
    assert (found.usage, found.usage_estimated) == (step.usage, estimated)


def test_frames_from_before_estimates_are_read():
    """As a2e879e wrote them."""
    old = {name: value for name, value in orjson.loads(opened("a").to_json()).items()}
    del old["usage_estimated"], old["preemptions"], old["ingress"]
    step = b'["a",10,0,9,"2026-11-22T12:00:09+00:00"]'
    (found,) = left_behind((Kind.OPEN, orjson.dumps(old)), (Kind.PROGRESS, step))
    assert (found.usage, found.usage_estimated) == (TokenUsage(10, 0, 9), False)


def test_an_open_stream_without_progress_costs_nothing():
    (found,) = left_behind((Kind.OPEN, opened("a").to_json()))
    assert (found.state, found.cost, found.duration_s) == (State.INTERRUPTED, 0, 0)


def test_a_stream_that_was_settled_is_not_interrupted():
    record = replace(completed("a"))
    entries = [
        (Kind.OPEN, opened("a").to_json()),
        (Kind.SETTLED, record.to_json()),
        # A step that was taken note of before, and written after.
        (Kind.PROGRESS, Progress("a", TokenUsage(1, 0, 1), NOON).to_json()),
    ]
    assert left_behind(*entries) == [record]
