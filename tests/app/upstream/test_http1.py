"""Connections to engines, before a server that says what each test wants it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress

import pytest

from app.upstream import http1 as module
from app.upstream import pool
from app.upstream.http1 import ConnectionLost, EngineConnection
from app.upstream.pool import Connections, fetch

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: engine\r\ncontent-length: 2\r\n\r\n"
WHOLE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: Application/JSON; charset=utf-8\r\n"
    b"content-length: 4\r\n\r\nbody"
)
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"

Write = Callable[[asyncio.StreamWriter], None]


class Engine:
    """A server that answers with the next of its answers, a list of writes; None closes."""

    def __init__(self, *answers: list[bytes | None]) -> None:
        self.answers = list(answers)
        self.connections = 0
        self.ended = asyncio.Event()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await reader.readuntil(b"\r\n\r\n") and await reader.readexactly(2):
                for piece in self.answers.pop(0):
                    if piece is None:
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.01)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.ended.set()
        finally:
            writer.close()


@asynccontextmanager
async def engine(*answers: list[bytes | None]) -> AsyncIterator[tuple[Engine, Connections]]:
    running = Engine(*answers)
    server = await asyncio.start_server(running.serve, "127.0.0.1", 0)
    running.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    connections = Connections()
    try:
        yield running, connections
    finally:
        connections.close()
        server.close()
        await server.wait_closed()


async def ask(running: Engine, connections: Connections) -> tuple[int, bytes, list[bytes]]:
    taken = await connections.take(running.url)
    try:
        response = await taken.send(HEAD, b"{}", 5.0)
        pieces = []
        while piece := await response.next_piece():
            pieces.append(piece)
        return response.status, response.content_type, pieces
    finally:
        connections.give_back(running.url, taken)


async def test_requests_go_over_one_kept_connection():
    async with engine([WHOLE], [WHOLE], [WHOLE]) as (running, connections):
        for _ in range(3):
            assert await ask(running, connections) == (200, b"application/json", [b"body"])
        assert running.connections == 1


async def test_what_is_read_at_once_is_one_piece():
    together = CHUNKED + b"1\r\na\r\n1\r\nb\r\n"
    async with engine([together, b"1\r\nc\r\n", b"0\r\n\r\n"]) as (running, connections):
        _, _, pieces = await ask(running, connections)
        assert pieces == [b"ab", b"c"]


async def test_reads_go_to_whoever_takes_them_until_something_has_to_be_waited_for(monkeypatch):
    monkeypatch.setattr(module, "MOST_AT_ONCE", 50)
    large = b"64\r\n" + b"x" * 100 + b"\r\n"
    answer = [CHUNKED, b"1\r\na\r\n", b"1\r\nb\r\n", b"1\r\nc\r\n", large, b"1\r\nd\r\n0\r\n\r\n"]
    async with engine(answer) as (running, connections):
        connection, response = await connections.send(running.url, HEAD, b"{}", 5.0)
        taken: list[bytes] = []

        def take() -> bool:
            taken.append(response.take_piece())
            return taken[-1] == b"b"

        await response.pass_on(take)
        assert taken == [b"a", b"b"]
        # Nobody takes what comes meanwhile, so it is kept.
        await asyncio.sleep(0.015)
        assert response.take_piece() == b"c"
        await response.pass_on(take)
        assert taken == [b"a", b"b"] and response.take_piece() == b"x" * 100
        await response.pass_on(take)
        assert taken == [b"a", b"b"] and response.complete and response.take_piece() == b"d"
        connections.give_back(running.url, connection)


async def test_what_fails_for_whoever_takes_is_raised_where_the_answer_is_awaited():
    async with engine([CHUNKED, b"1\r\na\r\n", b"0\r\n\r\n"]) as (running, connections):
        connection, response = await connections.send(running.url, HEAD, b"{}", 5.0)

        def take() -> bool:
            raise ValueError("taken")

        with pytest.raises(ValueError, match="taken"):
            await response.pass_on(take)
        # The connection is as before.
        assert await response.read() == b"a"
        connections.give_back(running.url, connection)


async def test_an_interim_answer_is_passed_over():
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    async with engine([interim, WHOLE], [WHOLE]) as (running, connections):
        for _ in range(2):
            assert (await ask(running, connections))[2] == [b"body"]
        assert running.connections == 1


@pytest.mark.parametrize("answer", [[None], [WHOLE[:-2], None], [CHUNKED, b"3\r\nabc\r\n", None]])
async def test_an_answer_that_breaks_off_is_no_answer(answer):
    async with engine(answer, [WHOLE]) as (running, connections):
        with pytest.raises(ConnectionLost):
            await ask(running, connections)
        assert (await ask(running, connections))[2] == [b"body"]
        assert running.connections == 2


async def test_what_is_not_http_is_no_answer():
    async with engine([b"Go away\r\n\r\n"]) as (running, connections):
        with pytest.raises(ConnectionLost):
            await ask(running, connections)


async def test_a_connection_that_is_to_close_is_not_kept():
    last = WHOLE.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    async with engine([last], [WHOLE]) as (running, connections):
        for _ in range(2):
            await ask(running, connections)
        assert running.connections == 2


async def test_a_closed_idle_connection_is_not_used():
    async with engine([WHOLE, None], [WHOLE]) as (running, connections):
        await ask(running, connections)
        await asyncio.sleep(0.1)
        await ask(running, connections)
        assert running.connections == 2


async def send(running, connections, timeout_s=5.0):
    taken, response = await connections.send(running.url, HEAD, b"{}", timeout_s)
    body = await response.read()
    connections.give_back(running.url, taken)
    return body


async def test_a_kept_connection_that_is_closed_before_a_byte_is_replaced():
    async with engine([WHOLE], [None], [WHOLE]) as (running, connections):
        for _ in range(2):
            assert await send(running, connections) == b"body"
        assert running.connections == 2


async def test_the_one_that_replaces_it_is_fresh_and_is_not_replaced():
    async with engine([WHOLE], [WHOLE], [None], [None], [WHOLE]) as (running, connections):
        both = [await connections.send(running.url, HEAD, b"{}", 5.0) for _ in range(2)]
        for taken, response in both:
            await response.read()
            connections.give_back(running.url, taken)
        with pytest.raises(ConnectionLost) as lost:
            await send(running, connections)
        assert not lost.value.stale
        assert running.connections == 3, "two kept ones, of which one was tried, and a fresh one"


@pytest.mark.parametrize(
    "answer",
    [[b"HTTP/1.1 200", None], [b"HTTP/1.1 100 Continue\r\n\r\n", None], [b"nonsense", None]],
)
async def test_one_that_has_sent_a_byte_is_not_replaced(answer):
    async with engine([WHOLE], answer, [WHOLE]) as (running, connections):
        await send(running, connections)
        with pytest.raises(ConnectionLost):
            await send(running, connections)
        assert running.connections == 1


async def test_one_that_is_silent_for_too_long_is_not_replaced():
    async with engine([WHOLE], [], [WHOLE]) as (running, connections):
        await send(running, connections)
        with pytest.raises(ConnectionLost) as lost:
            await send(running, connections, 0.1)
        assert lost.value.silent and running.connections == 1


async def test_leaving_an_answer_early_closes_its_connection():
    async with engine([CHUNKED, b"1\r\na\r\n"]) as (running, connections):
        taken = await connections.take(running.url)
        response = await taken.send(HEAD, b"{}", 5.0)
        assert await response.next_piece() == b"a"
        connections.give_back(running.url, taken)
        await asyncio.wait_for(running.ended.wait(), 5)


async def test_silence_ends_an_answer():
    async with engine([CHUNKED, b"1\r\na\r\n", b"1\r\nb\r\n"]) as (running, connections):
        taken = await connections.take(running.url)
        response = await taken.send(HEAD, b"{}", 0.2)
        with pytest.raises(ConnectionLost):
            await response.read()
        connections.give_back(running.url, taken)


async def test_an_engine_waits_for_a_client_that_does_not_read(monkeypatch):
    monkeypatch.setattr(module, "LEAST_UNREAD", 500)
    monkeypatch.setattr(module, "MOST_UNREAD", 1000)
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    async with engine([CHUNKED, *[piece] * 400, b"0\r\n\r\n"]) as (running, connections):
        taken = await connections.take(running.url)
        response = await taken.send(HEAD, b"{}", 5.0)
        await asyncio.sleep(0.3)
        waiting = len(response.take_piece())
        assert waiting < 20 * 65536
        assert waiting + len(await response.read()) == 400 * 65536
        connections.give_back(running.url, taken)


class LongBody:
    """A body in pieces, which notes how many were handed out."""

    def __init__(self, count: int) -> None:
        self.pieces = [bytes([65 + number]) * 262_144 for number in range(count)]
        self.handed_out = 0
        self.head = b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % (count * 262_144)

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.pieces:
            self.handed_out += 1
            yield piece


@asynccontextmanager
async def reading_engine(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[tuple[str, Connections]]:
    """A server that has read the head of a request and does the rest as a test wants it to."""

    async def serve_after_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            # One that is opened and not used has no head.
            with suppress(asyncio.IncompleteReadError):
                await reader.readuntil(b"\r\n\r\n")
                await serve(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve_after_head, "127.0.0.1", 0)
    connections = Connections()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", connections
    finally:
        connections.close()
        server.close()
        await server.wait_closed()


async def test_a_long_body_waits_for_an_engine_that_reads_slowly():
    body, reads, left, got = LongBody(120), asyncio.Event(), asyncio.Event(), bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reads.wait()
        while len(got) < 120 * 262_144:
            got.extend(await reader.read(1 << 20))
        writer.write(WHOLE)
        await left.wait()

    async with reading_engine(serve) as (url, connections):
        sending = asyncio.create_task(connections.send(url, body.head, body, 5.0))
        before = -1
        while body.handed_out > before:
            before = body.handed_out
            await asyncio.sleep(0.1)
        # The kernel's buffers take some megabytes, and the transport no more than two pieces.
        assert 0 < before < 60
        assert not sending.done()
        reads.set()
        connection, response = await sending
        assert (response.status, await response.read()) == (200, b"body")
        assert bytes(got) == b"".join(body.pieces)
        assert connection.reusable
        connections.give_back(url, connection)
        left.set()


async def test_an_engine_that_closes_half_way_through_a_body_is_lost():
    body = LongBody(120)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1_000_000)

    async with reading_engine(serve) as (url, connections):
        with pytest.raises(ConnectionLost) as lost:
            await connections.send(url, body.head, body, 5.0)
        assert not (lost.value.stale or lost.value.silent)
        assert body.handed_out < 120
        following = await connections.take(url)
        assert not following.kept
        following.close()


async def test_an_answer_in_the_middle_of_a_body_ends_the_writing():
    """As where an engine refuses a body that is too long, and reads no more of it."""
    body, left, ended = LongBody(120), asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1_000_000)
        writer.write(WHOLE.replace(b"200 OK", b"413 Too Large"))
        await left.wait()
        with suppress(ConnectionError):
            await reader.read()
        ended.set()

    async with reading_engine(serve) as (url, connections):
        connection, response = await connections.send(url, body.head, body, 5.0)
        assert (response.status, await response.read()) == (413, b"body")
        assert body.handed_out < 120
        assert not connection.reusable, "the rest of the body is missing"
        connections.give_back(url, connection)
        left.set()
        # Closed at once, and not after a while as one that is kept.
        await asyncio.wait_for(ended.wait(), 1)


async def test_idle_connections_are_closed_after_a_while(monkeypatch):
    monkeypatch.setattr(pool, "KEEPALIVE_S", 0.1)
    async with engine([WHOLE]) as (running, connections):
        await ask(running, connections)
        await asyncio.wait_for(running.ended.wait(), 5)


async def test_nobody_listens():
    async with engine() as (running, connections):
        pass
    with pytest.raises(ConnectionLost):
        await connections.take(running.url)
    with pytest.raises(ConnectionLost):
        await EngineConnection().send(HEAD, b"{}", 5.0)


@asynccontextmanager
async def listening(answer: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Give a server's address, and what it has got when the block ends; it answers at once."""
    got: list[bytes] = []
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(answer)
        if not answer.endswith(b"body"):
            writer.close()
        got.append(await reader.read())
        writer.close()
        await writer.wait_closed()
        ended.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", got
        await asyncio.wait_for(ended.wait(), 5)
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(("key", "json"), [(None, None), ("secret", None), ("secret", b'{"a":1}')])
async def test_a_single_request_has_a_connection_of_its_own(key, json):
    async with listening(WHOLE) as (url, got):
        method = "GET" if json is None else "POST"
        assert await fetch(url, method, "/health", key=key, json=json) == (200, b"body")
        head, *fields = got[0].decode().split("\r\n")
    assert head == f"{method} /health HTTP/1.1"
    sent = dict(field.split(": ") for field in fields if field)
    assert sent.pop("host") == url.removeprefix("http://")
    assert sent.pop("connection") == "close"
    assert sent.pop("authorization", None) == (f"Bearer {key}" if key else None)
    body = {} if json is None else {"content-type": "application/json", "content-length": "7"}
    assert sent == body
    assert b"".join(got[1:]) == (json or b""), "and it has closed the connection"


async def test_a_single_request_that_gets_no_answer_says_so():
    async with listening(WHOLE.removesuffix(b"dy")) as (url, _):
        with pytest.raises(ConnectionLost):
            await fetch(url, "GET", "/health")
    with pytest.raises(ConnectionLost):
        await fetch(url, "GET", "/health")
