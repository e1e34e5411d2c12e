import asyncio
import gc
import gzip
import time
import zlib

import orjson
import pytest
from backports import zstd

from app import alarms
from app.config.ingress import IngressSettings
from app.core.dialect import Dialect, Route
from app.core.errors import (
    BodyTooLarge,
    InvalidRequest,
    RequestTimeout,
    Unavailable,
    UnsupportedEncoding,
)
from app.core.tiers import Tier
from app.gateway import request_body as module
from app.gateway.request_body import Bodies, ClientGone
from app.protocol import requests
from app.protocol.json_body.members import Members
from app.protocol.json_body.parse import LONGEST_SPARSE, LONGEST_WHOLE, parse_plain
from app.protocol.requests import rewrite_request

pytestmark = pytest.mark.unit

MIB = 1024 * 1024


def settings(**changes):
    return IngressSettings.load({"auth": "keys", **changes}, "user_config")


def body(length):
    empty = orjson.dumps({"model": "m", "prompt": ""})
    return orjson.dumps({"model": "m", "prompt": "x" * (length - len(empty))})


def client(data, piece=MIB, pause_s=0.0, leaves=False):
    """Return the ``receive`` of a client that sends data in pieces and then waits or leaves."""
    pieces = [data[at : at + piece] for at in range(0, len(data), piece)] or [b""]

    async def receive():
        if not pieces:
            if leaves:
                return {"type": "http.disconnect"}
            await asyncio.Event().wait()
        await asyncio.sleep(pause_s)
        last = len(pieces) == 1 and not leaves
        return {"type": "http.request", "body": pieces.pop(0), "more_body": not last}

    return receive


def declared(length):
    return {b"content-length": str(length).encode()}


async def read(bodies, data, headers=None, tenant="t", *, settings=settings(), **how):  # noqa: B008
    with bodies.room_for(tenant, settings) as room:
        return await room.read(Route.COMPLETIONS, headers or {}, client(data, **how))


@pytest.mark.parametrize(
    "length", [50, LONGEST_WHOLE, LONGEST_WHOLE + 1, LONGEST_SPARSE, LONGEST_SPARSE + 1, 3 * MIB]
)
@pytest.mark.parametrize("piece", [1000, MIB, 10 * MIB])
@pytest.mark.parametrize("says", [True, False])
async def test_a_body_in_any_pieces_is_the_same_request(length, piece, says):
    data = body(length)
    headers = declared(length) if says else {}
    with Bodies().room_for("t", settings()) as room:
        request = await room.read(Route.COMPLETIONS, headers, client(data, piece))
        assert isinstance(request.fields, Members) == (length > LONGEST_SPARSE)
        sent = rewrite_request(request, "m", Dialect("plain"), Tier.DEFAULT)
        whole = sent if isinstance(sent, bytes) else b"".join(sent)
    assert orjson.loads(whole) == orjson.loads(data)


async def test_a_longer_body_is_never_read():
    limit = settings(max_body_bytes=MIB)
    for headers in (declared(MIB + 1), declared(10**30), {}):
        with pytest.raises(BodyTooLarge) as caught:
            await read(Bodies(), body(MIB + 1), headers, settings=limit)
        assert caught.value.headers["connection"] == "close"


async def test_a_body_beyond_its_declared_length_is_refused():
    with pytest.raises(InvalidRequest, match="content-length"):
        await read(Bodies(), body(2 * MIB), declared(MIB))


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize(
    ("tenant", "reason"), [("t", "tenant_request_memory"), ("u", "request_memory")]
)
async def test_a_body_without_room_is_refused_until_others_have_ended(
    tenant, reason, says, monkeypatch
):
    monkeypatch.setattr(alarms, "PROCESS", alarms.Alarms())
    bodies, bounds = Bodies(), settings(body_memory_mb=5, body_memory_tenant_mb=4)
    headers = declared(3 * MIB) if says else {}
    with bodies.room_for("t", bounds) as room:
        await room.read(Route.COMPLETIONS, headers, client(body(3 * MIB)))
        for _ in range(2):
            with pytest.raises(Unavailable) as caught:
                await read(bodies, body(3 * MIB), headers, tenant, settings=bounds)
        error = caught.value
        assert (error.status, error.code) == (503, "request_memory_full")
        assert error.headers["x-shed-reason"] == reason
        assert int(error.headers["retry-after"]) > 0
        assert error.headers["connection"] == "close"
    await read(bodies, body(3 * MIB), headers, tenant, settings=bounds)
    assert bodies.memory.used == 0
    assert alarms.PROCESS.counts() == {f"refused for {reason}": 2}


async def test_what_never_fits_is_too_large():
    bounds = settings(body_memory_tenant_mb=2)
    with pytest.raises(BodyTooLarge, match=f"at most {2 * MIB} bytes"):
        await read(Bodies(), body(3 * MIB), settings=bounds)


async def fails(**how):
    bodies = Bodies()
    raised = how.pop("raises")
    with pytest.raises(raised):
        await read(bodies, **how)
    return bodies.memory.used


@pytest.mark.parametrize(
    "how",
    [
        {"data": body(MIB)[:-1], "leaves": True, "raises": ClientGone},
        {"data": body(MIB)[:-1], "raises": InvalidRequest},
        {"data": b"[" * MIB, "raises": InvalidRequest},
        {"data": b"", "headers": declared(MIB), "leaves": True, "raises": ClientGone},
        {"data": b"x" * 2 * MIB, "headers": declared(MIB), "raises": InvalidRequest},
    ],
)
async def test_a_body_that_comes_to_nothing_holds_nothing(how):
    assert await fails(**how) == 0


async def test_a_cancelled_request_holds_nothing():
    bodies = Bodies()
    reading = asyncio.create_task(read(bodies, body(MIB), declared(MIB), pause_s=60))
    while not bodies.memory.used:
        await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert bodies.memory.used == 0


async def test_the_deadline_is_of_the_whole_body():
    """A byte every 20 ms restarted a deadline of each piece for ever."""
    brief = settings(body_timeout_s=0.1)
    bodies = Bodies()
    async with asyncio.timeout(10):
        with pytest.raises(RequestTimeout) as caught:
            await read(bodies, body(5000), piece=1, pause_s=0.02, settings=brief)
    assert caught.value.headers["connection"] == "close"
    assert bodies.memory.used == 0


async def test_what_has_come_adds_to_the_deadline():
    brief = settings(body_timeout_s=0.1, body_min_rate_kb=1)
    data = body(20_000)
    request = await read(Bodies(), data, piece=2000, pause_s=0.03, settings=brief)
    assert request.length == len(data)


async def test_long_bodies_take_turns_with_each_other_and_with_others():
    """While two are scanned, something else runs between any two slices."""
    bodies, ended = Bodies(), 0

    async def scanned():
        nonlocal ended
        await read(bodies, body(8 * MIB), piece=8 * MIB)
        ended += 1

    reading = [asyncio.create_task(scanned()) for _ in range(2)]
    turns = 0
    while ended < 1:
        turns += 1
        await asyncio.sleep(0)
    assert turns > 2 * 8 * MIB // (256 * 1024)
    await asyncio.gather(*reading)


async def test_there_is_one_step_in_a_turn_however_many_bodies_there_are():
    bodies, turn, steps = Bodies(), 0, []

    def stepping(number):
        for _ in range(5):
            steps.append((turn, number))
            yield
        return number

    reading = [asyncio.ensure_future(bodies.in_turns(stepping(number))) for number in range(4)]
    while not all(one.done() for one in reading):
        await asyncio.sleep(0)
        turn += 1
    assert [one.result() for one in reading] == [0, 1, 2, 3]
    turns = [of for of, _ in steps]
    assert len(turns) == len(set(turns)) == 20
    assert [number for _, number in steps] == [0, 1, 2, 3] * 5, "they take turns"


async def test_one_long_body_is_parsed_in_a_turn_however_many_come_at_once(monkeypatch):
    """Two that were parsed in one turn would stop the event loop for 10 ms."""
    turn, parsed_in = 0, []

    def parse(data):
        parsed_in.append(turn)
        return parse_plain(data)

    monkeypatch.setattr(requests, "parse_plain", parse)
    bodies, data = Bodies(), body(LONGEST_SPARSE)
    reading = [asyncio.create_task(read(bodies, data)) for _ in range(5)]
    while not all(one.done() for one in reading):
        await asyncio.sleep(0)
        turn += 1
    assert [(await one).length for one in reading] == [LONGEST_SPARSE] * 5
    assert len(set(parsed_in)) == len(parsed_in) == 5


async def test_the_memory_of_a_body_is_given_back_a_part_at_a_time():
    with Bodies().room_for("t", settings()) as room:
        request = await room.read(Route.COMPLETIONS, {}, client(body(5 * MIB)))
        data = request.fields["prompt"].data
        assert data[1] == data[-2] == ord("x")
    assert data[-2] == ord("x"), "not all of it at once"
    for _ in range(64 * MIB // module.FREED):
        await asyncio.sleep(0)
    assert data[1] == data[-2] == 0


async def test_several_long_bodies_at_once_leave_the_event_loop_to_others():
    """By CPU time, which other processes do not add to. Usually the longest turn takes 5 ms."""
    roomy = settings(body_memory_mb=512, body_memory_tenant_mb=512)
    message = orjson.dumps({"role": "user", "content": "some words " * 30})
    data = b'{"model":"m","prompt":[%b]}' % b",".join([message] * (24 * MIB // len(message)))
    bodies = Bodies()
    reading = [
        asyncio.create_task(read(bodies, data, settings=roomy, piece=65_536)) for _ in range(5)
    ]
    # In the first turn the clients make their pieces.
    await asyncio.sleep(0)
    turns, before = [], time.thread_time()
    gc.disable()
    try:
        while not all(one.done() for one in reading):
            await asyncio.sleep(0)
            turns.append(-before + (before := time.thread_time()))
    finally:
        gc.enable()
    for one in reading:
        assert (await one).length == len(data)
    assert max(turns) < 0.02


async def test_others_run_while_a_body_is_copied_that_is_there_already():
    data, turns = body(4 * MIB), 0
    pieces = [data[at : at + 65_536] for at in range(0, len(data), 65_536)]

    async def receive():
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    with Bodies().room_for("t", settings()) as room:
        reading = asyncio.create_task(room.read(Route.COMPLETIONS, {}, receive))
        while pieces:
            await asyncio.sleep(0)
            turns += 1
        await reading
    assert turns > 50


ENCODERS: dict = {
    b"gzip": gzip.compress,
    b"deflate": zlib.compress,
    b"zstd": zstd.compress,
    b"identity": bytes,
}
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("length", [50, LONGEST_WHOLE, LONGEST_WHOLE + 1, 3 * MIB])
@pytest.mark.parametrize("coding", list(ENCODERS))
@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("mark", [b"", BOM])
async def test_a_body_may_be_compressed_and_have_a_byte_order_mark(length, coding, says, mark):
    data = body(length)
    sent = ENCODERS[coding](mark + data)
    headers = {b"content-encoding": coding} | (declared(len(sent)) if says else {})
    bodies = Bodies()
    with bodies.room_for("t", settings()) as room:
        request = await room.read(Route.COMPLETIONS, headers, client(sent, 1000))
        assert bodies.memory.used >= length
        made = rewrite_request(request, "m", Dialect("plain"), Tier.DEFAULT)
        whole = made if isinstance(made, bytes) else b"".join(made)
        assert orjson.loads(whole) == orjson.loads(data)
        del made, whole
    assert bodies.memory.used == 0


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"zstd"])
@pytest.mark.parametrize("says", [True, False])
async def test_what_decodes_to_too_much_is_not_decoded_further(coding, says):
    sent = ENCODERS[coding](b" " * 100 * MIB)
    headers = {b"content-encoding": coding} | (declared(len(sent)) if says else {})
    bodies, begun = Bodies(), time.process_time()
    with pytest.raises(BodyTooLarge):
        await read(bodies, sent, headers, settings=settings(max_body_bytes=MIB))
    assert time.process_time() - begun < 0.2 and bodies.memory.used == 0


@pytest.mark.parametrize("coding", [b"gzip", b"zstd"])
async def test_members_that_decode_to_nothing_are_bounded_too(coding):
    sent = ENCODERS[coding](b"") * 200_000
    begun = time.process_time()
    with pytest.raises(InvalidRequest, match="not valid"):
        await read(Bodies(), sent, {b"content-encoding": coding})
    assert time.process_time() - begun < 0.5


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"zstd"])
async def test_others_run_while_a_body_is_decoded(coding):
    sent = ENCODERS[coding](body(40 * MIB))
    assert len(sent) < MIB
    turns, longest = 0, 0.0

    async def watch():
        nonlocal turns, longest
        while True:
            begun = time.process_time()
            await asyncio.sleep(0)
            turns, longest = turns + 1, max(longest, time.process_time() - begun)

    watching = asyncio.create_task(watch())
    await read(Bodies(), sent, {b"content-encoding": coding})
    watching.cancel()
    assert turns > 150 and longest < 0.02


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"zstd"])
@pytest.mark.parametrize("cut", [0, 1, -1])
async def test_a_body_that_is_not_in_its_coding_is_refused(coding, cut):
    for sent in (body(100), ENCODERS[coding](body(100))[:cut]):
        with pytest.raises(InvalidRequest, match=f"not valid {coding.decode()}") as caught:
            await read(Bodies(), sent, {b"content-encoding": coding})
        assert caught.value.headers["connection"] == "close"


@pytest.mark.parametrize("coding", [b"br", b"compress", b"gzip, zstd"])
async def test_other_codings_are_refused_and_told_which_are_not(coding):
    with pytest.raises(UnsupportedEncoding) as caught:
        await read(Bodies(), body(100), {b"content-encoding": coding})
    assert caught.value.status == 415
    assert caught.value.headers["accept-encoding"] == "gzip, deflate, zstd"
