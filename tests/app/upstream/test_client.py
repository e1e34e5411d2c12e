import asyncio
from contextlib import asynccontextmanager

import pytest

from app.contracts.status import ReplicaStatus
from app.core.dialect import Dialect, Route
from app.upstream.client import EngineBroke, EngineClient, EngineFailed, EngineUnreachable

pytestmark = pytest.mark.unit

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": []}\n\n'
TIMEOUT_S = 0.3


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


@asynccontextmanager
async def engine(*behaviours):
    """An engine that treats its connections by turns as the behaviours say; yields its replica."""
    waiting, connected = list(behaviours), set()

    async def connect(reader, writer):
        connected.add(writer)
        await reader.readuntil(b"\r\n\r\n")
        await waiting.pop(0)(writer)

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield ReplicaStatus(
            "r", "pool", f"http://127.0.0.1:{port}", "key", 8, "1", None, Dialect("simulated")
        )
    finally:
        server.close()
        for writer in connected:
            writer.close()


async def silent(writer):
    await asyncio.sleep(60)


async def headers_alone(writer):
    writer.write(HEAD)
    await asyncio.sleep(60)


async def one_event(writer):
    writer.write(HEAD + chunk(EVENT))
    await asyncio.sleep(60)


async def commenting(writer, *events):
    writer.write(HEAD)
    for event in events:
        writer.write(chunk(event))
    for _ in range(40):
        await asyncio.sleep(TIMEOUT_S / 6)
        writer.write(chunk(b": keep-alive\n\n"))


async def event_then_comments(writer):
    await commenting(writer, EVENT)


async def steady(writer):
    writer.write(HEAD)
    for _ in range(12):
        writer.write(chunk(EVENT))
        await asyncio.sleep(0.1)
    writer.write(chunk(b""))


async def hung_up(writer):
    writer.close()


async def without_room(writer):
    writer.write(b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\ncontent-length: 2\r\n\r\n{}")


async def ask(client, replica):
    events = []
    answer = await client.send(replica, Route.CHAT, b"{}", request_id="r", read_timeout_s=TIMEOUT_S)
    with answer:
        while some := await answer.next_events():
            events += some
    return events


@pytest.fixture
async def client():
    client = EngineClient()
    yield client
    await client.close()


@pytest.mark.parametrize("behaviour", [silent, headers_alone])
async def test_an_engine_that_sends_nothing_of_an_answer_is_silent(client, behaviour):
    async with engine(behaviour) as replica:
        with pytest.raises(EngineUnreachable) as lost:
            await ask(client, replica)
    assert lost.value.silent


async def test_an_engine_that_falls_silent_in_the_middle_is_too(client):
    async with engine(one_event) as replica:
        with pytest.raises(EngineBroke) as lost:
            await ask(client, replica)
    assert lost.value.silent


@pytest.mark.parametrize("behaviour", [commenting, event_then_comments])
async def test_comments_are_no_sign_of_life(client, behaviour):
    async with engine(behaviour) as replica:
        with pytest.raises((EngineUnreachable, EngineBroke)) as lost:
            await asyncio.wait_for(ask(client, replica), 5)
    assert vars(lost.value)["silent"]


async def test_comments_are_read_as_they_came(client):
    async with engine(event_then_comments) as replica:
        answer = await client.send(replica, Route.CHAT, b"{}", request_id="r", read_timeout_s=5)
        with answer:
            read = [await answer.next_events() for _ in range(3)]
    assert read == [[EVENT.strip()], [b": keep-alive"], [b": keep-alive"]]


@pytest.mark.parametrize("behaviour", [silent, one_event])
async def test_one_that_serves_others_meanwhile_is_not(client, behaviour):
    async with engine(steady, behaviour) as replica:
        other = asyncio.create_task(ask(client, replica))
        await asyncio.sleep(0.1)
        with pytest.raises((EngineUnreachable, EngineBroke)) as lost:
            await ask(client, replica)
        assert vars(lost.value)["silent"] is False
        assert len(await other) == 12


async def test_one_that_hangs_up_is_lost_but_not_silent(client):
    async with engine(hung_up) as replica:
        with pytest.raises(EngineUnreachable) as lost:
            await ask(client, replica)
    assert not lost.value.silent


async def test_an_engine_without_room_says_when_to_try_again(client):
    async with engine(without_room) as replica:
        with pytest.raises(EngineFailed) as failed:
            await ask(client, replica)
    assert failed.value.error.headers["retry-after"] == "7"
