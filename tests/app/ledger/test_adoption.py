"""Journals of dead ingresses that hold what nobody expects."""

import json
import logging
import time
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.journal import JournalSettings
from app.core.pricing import TokenUsage
from app.ledger.adoption import Adopter
from app.ledger.codec import Kind, Progress, frame
from app.ledger.ledger import Ledger
from app.ledger.leftovers import INGRESS_LOST
from app.ledger.reading import NotUnderstood, read_record
from app.ledger.record import NOTHING_USED, State
from app.ledger.segments import lock_dead, segment_path
from tests.support.records import NOON, completed, opened, records, shed
from tests.support.stores import MemoryStore, adopt
from tests.support.waiting import until

pytestmark = pytest.mark.unit


def dead_journal(folder, lines, name="0" * 32):
    """A journal as an ingress leaves it that was killed."""
    journal = folder / name
    journal.mkdir(parents=True)
    (journal / "lock").touch()
    segment_path(journal, 1).write_bytes(b"".join(lines) + bytes(100))
    return journal


def settled(*of):
    return [frame(Kind.SETTLED, record.to_json()) for record in of]


def of_version(record, version, **fields):
    return orjson.dumps({**orjson.loads(record.to_json()), "version": version, **fields})


def raw_frame(kind, body):
    """A frame of a kind that is unknown here."""
    return frame(type("Newer", (), {"value": kind}), body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@st.composite
def mutated(draw, body):
    """A body with one of its fields changed, gone or added, or with other bytes."""
    fields = orjson.loads(body)
    how = draw(st.sampled_from(["value", "gone", "added", "version", "bytes", "cut", "other"]))
    if how == "bytes":
        return draw(st.binary(max_size=100))
    if how == "cut":
        return body[: draw(st.integers(0, len(body) - 1))]
    if how == "other":
        return _dumped(draw(json_values))
    if isinstance(fields, list):
        place = draw(st.integers(1, len(fields) - 1))
        fields[place : place + (how == "gone")] = [] if how == "gone" else [draw(json_values)]
        return _dumped(fields)
    name = draw(st.sampled_from(sorted(fields.keys() - {"request_id"})))
    match how:
        case "gone":
            del fields[name]
        case "added":
            fields[draw(st.text(min_size=1))] = draw(json_values)
        case "version":
            fields["version"] = draw(json_values)
        case _:
            values = json_values | st.sampled_from(["open", "completed", "1e99999999", "-1", "NaN"])
            fields[name] = draw(values)
    return _dumped(fields)


def _dumped(value):
    # Not orjson, which writes neither long numbers nor NaN.
    return json.dumps(value).encode()


@given(st.data())
def test_one_entry_that_cannot_be_read_costs_no_other_and_stops_nobody(tmp_path_factory, data):
    """568732b: adopting raised KeyError, TypeError or ValueError, which ended the flusher."""
    folder, store = tmp_path_factory.mktemp("journals"), MemoryStore()
    stream = opened("broken")
    step = Progress("broken", TokenUsage(9, 0, 7), NOON)
    entries = [
        (Kind.OPEN, stream.to_json()),
        (step.kind, step.to_json()),
        (Kind.SETTLED, completed("broken").to_json()),
        (Kind.SETTLED, shed("broken").to_json()),
    ]
    kind, body = data.draw(st.sampled_from(entries))
    changed = data.draw(mutated(body))
    others = [completed(f"other-{number}") for number in range(4)]
    lines = [frame(Kind.OPEN, opened("left").to_json()), *settled(*others)]
    place = data.draw(st.integers(0, len(lines)))
    lines.insert(place, frame(kind, changed))
    dead_journal(folder, lines, "1" * 32)
    last = completed("of another journal")
    dead_journal(folder, settled(last), "2" * 32)
    adopter = Adopter(folder, store)
    adopter.adopt(0.0)
    assert adopter.failing == {}
    for record in (*others, last):
        assert store.records[record.origin.request_id] == record
    assert store.records["left"].reason == INGRESS_LOST
    kept = [journal.name for journal in folder.iterdir()]
    assert kept in ([], ["1" * 32 + ".unread"])
    assert adopter.set_aside == len(kept)


@given(records())
def test_what_is_written_is_read(record):
    assert read_record(record.to_json()) == record
    fields = orjson.loads(record.to_json())
    # As 568732b wrote it, and a2e879e before.
    del fields["version"]
    assert read_record(orjson.dumps(fields)) == record
    if record.preemptions is None:
        del fields["preemptions"]
        assert read_record(orjson.dumps(fields)) == record
    if not record.usage_estimated:
        del fields["usage_estimated"]
        assert read_record(orjson.dumps(fields)) == record
    if not record.origin.ingress:
        del fields["ingress"]
        assert read_record(orjson.dumps(fields)) == record


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0])
def test_another_version_is_not_understood(version):
    with pytest.raises(NotUnderstood, match="version"):
        read_record(of_version(completed(), version))


def test_the_older_version_leaves_the_newer_ones_stream_to_it(tmp_path, monkeypatch, caplog):
    """Its end is written in a way that is not understood here: it was not interrupted."""
    store, ended = MemoryStore(), completed("stream")
    lines = [
        frame(Kind.OPEN, opened("stream").to_json()),
        raw_frame("P", b'["stream",{"tokens":[1,2,3]}]'),
        frame(Kind.SETTLED, of_version(ended, 2)),
        *settled(completed("other")),
        frame(Kind.OPEN, opened("counted").to_json()),
        raw_frame("P", b'["counted",{"tokens":[1,2,3]}]'),
    ]
    dead_journal(tmp_path, lines)
    assert adopt(tmp_path, store) == 1
    assert set(store.records) == {"other"}
    (kept,) = tmp_path.iterdir()
    assert kept.name.endswith(".unread") and "can be read (3 entries" in caplog.text
    # One that starts later, and is newer.
    monkeypatch.setattr("app.ledger.reading.VERSION", 2)
    newer = Adopter(tmp_path, store)
    newer.adopt(0.0)
    assert store.records["stream"] == ended
    assert "counted" not in store.records and newer.set_aside == 1
    # It does not look again and again.
    assert newer.adopt(100.0) == 0 and newer.set_aside == 1


def test_a_kept_journal_goes_once_all_of_it_is_understood(tmp_path, monkeypatch):
    store, record = MemoryStore(), completed("new")
    dead_journal(tmp_path, [frame(Kind.SETTLED, of_version(record, 2))])
    adopt(tmp_path, store)
    assert store.records == {}
    monkeypatch.setattr("app.ledger.reading.VERSION", 2)
    assert adopt(tmp_path, store) == 1
    assert store.records == {"new": record} and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["read_bytes", "rename", "lock"])
def test_a_journal_that_cannot_be_read_stops_neither_the_others_nor_itself(
    tmp_path, monkeypatch, caplog, call
):
    """568732b: the first such journal ended each round; one with a closed lock was passed over."""
    store = MemoryStore()
    records = [completed(str(number)) for number in range(3)]
    for number, record in enumerate(records):
        lines = settled(record) if number != 1 else [*settled(record), frame(Kind.OPEN, b"?")]
        dead_journal(tmp_path, lines, str(number) * 32)
    denied = True

    def unless_denied(real):
        def called(path, *more):
            if denied and "1" * 32 in str(path):
                raise PermissionError(13, "denied")
            return real(path, *more)

        return called

    if call == "lock":
        monkeypatch.setattr("app.ledger.adoption.lock_dead", unless_denied(lock_dead))
    else:
        monkeypatch.setattr(Path, call, unless_denied(getattr(Path, call)))
    adopter = Adopter(tmp_path, store)
    adopter.adopt(0.0)
    assert {"0", "2"} <= set(store.records)
    assert list(adopter.failing) == ["1" * 32]
    adopter.adopt(1.0)
    adopter.adopt(61.0)
    errors = [line for line in caplog.records if line.levelno == logging.ERROR]
    assert sum("cannot be moved" in line.getMessage() for line in errors) == 1
    denied = False
    adopter.adopt(62.0)
    assert adopter.failing, "it is not looked at every time"
    adopter.adopt(122.0)
    assert (set(store.records), adopter.failing) == ({"0", "1", "2"}, {})


async def test_the_own_journal_goes_on_beside_one_that_cannot_be_read(tmp_path):
    store = MemoryStore()
    dead_journal(tmp_path, [frame(Kind.SETTLED, of_version(completed("new"), 2))])
    dead_journal(tmp_path, settled(completed("old")), "1" * 32)
    ours = Ledger(tmp_path, JournalSettings(flush_interval_s=0.01, adopt_interval_s=0.01), store)
    await ours.settle(completed("own"))
    await until(lambda: len(store.records) == 2)
    await until(lambda: ours.journals_set_aside == 1)
    await ours.settle(completed("later"))
    await until(lambda: "later" in store.records)
    assert ours.store_away_s(time.monotonic()) == 0 and ours.journals_failing == 0
    await ours.close()
    assert set(store.records) == {"own", "old", "later"}
    assert [path.name for path in tmp_path.iterdir()] == ["0" * 32 + ".unread"]


def test_a_record_of_another_kind_than_its_frame_is_not_understood(tmp_path):
    ended = opened("a").settle(State.FAILED, NOTHING_USED, ended=NOON)
    dead_journal(
        tmp_path,
        [frame(Kind.OPEN, ended.to_json()), frame(Kind.SETTLED, opened("b").to_json())],
    )
    store = MemoryStore()
    assert adopt(tmp_path, store) == 0 and store.records == {}
    assert [path.suffix for path in tmp_path.iterdir()] == [".unread"]
