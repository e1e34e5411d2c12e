"""Events are sent where they are received, and whatever has to be waited for is waited for."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.contracts.status import ReplicaStatus
from app.core.dialect import Dialect, Route
from app.gateway.relay import Relay
from app.gateway.response import Reply
from app.upstream.client import EngineBroke, EngineClient, StreamedAnswer

pytestmark = pytest.mark.unit

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LAST = b"data: [DONE]"


class Stamper:
    """Passes everything on; an event ``bad`` makes it fail."""

    ended = failed = broken = False

    def feed(self, blocks):
        assert not self.ended, "nothing comes after the end"
        if b"data: bad" in blocks:
            raise ValueError("bad")
        self.ended = LAST in blocks
        return b"".join(block + b"\n\n" for block in blocks)


def block(number):
    return b'data: {"choices": [], "n": %d}' % number


async def relayed(writes, send, *, cut=False):
    """Relay what an engine writes; return the last piece, how often the task waited, and events."""
    ended = asyncio.Event()

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD)
        for write in writes:
            if reader.at_eof():
                break
            writer.write(b"%x\r\n%b\r\n" % (len(write), write))
            await asyncio.sleep(0.002)
        if not cut:
            writer.write(b"0\r\n\r\n")
        writer.close()
        ended.set()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    replica = ReplicaStatus("r", "p", url, "key", 8, "1", None, Dialect("simulated"))
    client, counted, resumed = EngineClient(), [], 0
    try:
        given = await client.send(replica, Route.CHAT, b"{}", request_id="r", read_timeout_s=5)
        assert isinstance(given, StreamedAnswer)
        wait = given.pass_on

        async def counting(take):
            nonlocal resumed
            resumed += 1
            await wait(take)

        vars(given)["pass_on"] = counting
        meter = SimpleNamespace(progress=counted.append)
        with given:
            relay = Relay(given, Stamper(), meter, Reply(send))
            last = await relay.until_last()
    finally:
        await ended.wait()
        server.close()
        await client.close()
    return last, resumed, sum(counted)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=12),
    st.lists(st.sampled_from([None, 0, 0.001, 0.01]), min_size=1, max_size=5),
)
async def test_all_is_sent_once_and_in_order_whether_or_not_the_client_makes_it_wait(sizes, pauses):
    sent, number, writes = [], 0, []
    for size in sizes:
        writes.append(b"".join(block(number + n) + b"\n\n" for n in range(size)))
        number += size

    async def send(message):
        pause = pauses[len(sent) % len(pauses)]
        if pause is not None:
            await asyncio.sleep(pause)
        sent.append(message["body"])

    last, _, counted = await relayed([*writes, LAST + b"\n\n"], send)
    assert b"".join(sent) + last == b"".join(writes) + LAST + b"\n\n"
    assert last.endswith(LAST + b"\n\n") and counted == number + 1


async def test_the_task_is_not_resumed_for_each_event():
    async def send(message):
        pass

    _, resumed, counted = await relayed([block(n) + b"\n\n" for n in range(50)], send)
    # It waits once, and again at most for the end; events that are read together change nothing.
    assert counted == 50 and resumed <= 3


async def test_what_fails_where_it_is_received_is_raised_in_the_request():
    async def send(message):
        if b'"n": 2' in message["body"]:
            raise OSError("sent")

    with pytest.raises(OSError, match="sent"):
        await relayed([block(n) + b"\n\n" for n in range(5)], send)
    with pytest.raises(ValueError, match="bad"):
        await relayed([block(0) + b"\n\n", b"data: bad\n\n", block(1) + b"\n\n"], send)


async def test_an_engine_that_is_lost_is_told_of_after_its_last_event():
    sent = []

    async def send(message):
        sent.append(message["body"])

    with pytest.raises(EngineBroke):
        await relayed([block(n) + b"\n\n" for n in range(5)], send, cut=True)
    assert b"".join(sent) == b"".join(block(n) + b"\n\n" for n in range(5))


async def test_the_client_is_written_to_in_the_request_s_context():
    variable, seen = ContextVar("variable", default=""), set()

    async def send(message):
        seen.add(variable.get())

    variable.set("the request's")
    await relayed([block(n) + b"\n\n" for n in range(5)], send)
    assert seen == {"the request's"}


async def test_a_request_that_is_cancelled_sends_nothing_more():
    sent = []

    async def send(message):
        sent.append(message["body"])

    task = asyncio.create_task(relayed([block(n) + b"\n\n" for n in range(400)], send))
    while len(sent) < 5:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    count = len(sent)
    await asyncio.sleep(0.05)
    assert len(sent) == count < 400
