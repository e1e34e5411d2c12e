"""The guard before an engine that asks nobody for a key: a real HAProxy before a small server."""

import asyncio
import os
import signal
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import httpx
import psutil
import pytest

from app.contracts.status import ReplicaStatus
from app.core.dialect import Dialect, Route
from app.upstream.client import EngineBroke, EngineClient, EngineFailed, EngineUnreachable
from deployments.hosting.guard import EngineGuard, GuardFailed, needs_guard, plan_guard
from tests.support.waiting import PATIENCE_S, until

pytestmark = pytest.mark.unit

NODE = "127.0.0.2"
"""Stands in for a node's address: as good as another, and nobody else's."""
KEY = "an-engine_key"
CHAT = Route.CHAT.path
EVENT = b"data: {}\n\n"


@dataclass
class Keyless:
    """An engine that answers everybody, whatever they ask for, as TensorRT-LLM's server does."""

    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    behaviour: str = "answer"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._answer(head.decode(), reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone.set()
        finally:
            writer.close()

    def break_off(self) -> None:
        """Cut every connection, as the death of a process does."""
        for writer in self.writers:
            writer.transport.abort()

    async def _answer(self, head, reader, writer):
        first, *lines = head.split("\r\n")[:-2]
        headers = dict(line.lower().split(": ", 1) for line in lines)
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.requests.append((first, headers, body))
        if self.behaviour == "answer":
            writer.write(b"HTTP/1.1 200 OK\r\nserver: secret\r\ncontent-length: 2\r\n\r\n{}")
        elif self.behaviour == "refuse":
            writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 4\r\n\r\nbusy")
        elif self.behaviour == "stream":
            await self._stream(reader, writer)
        else:
            await reader.read(1)  # ends when the connection does
            raise ConnectionError

    async def _stream(self, reader, writer):
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
        writer.write(head + b"transfer-encoding: chunked\r\n\r\n")
        ended = asyncio.ensure_future(reader.read())
        while not ended.done():
            writer.write(b"%x\r\n%s\r\n" % (len(EVENT), EVENT))
            told = asyncio.ensure_future(self.go_on.wait())
            await asyncio.wait({told, ended}, return_when=asyncio.FIRST_COMPLETED)
            told.cancel()
            self.go_on.clear()
        await ended
        raise ConnectionError


@asynccontextmanager
async def guarded(tmp_path: Path, engine: Keyless, **options):
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    guard = await EngineGuard.start(NODE, port, KEY, tmp_path, name="test", **options)
    try:
        async with httpx.AsyncClient(
            base_url=guard.base_url, trust_env=False, timeout=PATIENCE_S
        ) as client:
            client.headers["authorization"] = f"Bearer {KEY}"
            yield guard, client, server
    finally:
        engine.go_on.set()
        await guard.stop()
        server.close()


@pytest.fixture
def engine():
    return Keyless()


@pytest.fixture
async def admitted(tmp_path, engine):
    async with guarded(tmp_path, engine) as (_, client, _):
        yield client


@pytest.fixture
async def relay():
    client = EngineClient()
    yield client
    await client.close()


def replica(guard):
    dialect = Dialect(engine="test")
    return ReplicaStatus("r", "pool", guard.base_url, KEY, 1, "1", None, dialect)


def send(relay, guard):
    return relay.send(replica(guard), Route.CHAT, b"{}", request_id="r1", read_timeout_s=20)


async def test_routes_pass_with_the_key(admitted, engine):
    assert plan_guard().paths == tuple(route.path for route in Route)
    for route in Route:
        answer = await admitted.post(route.path, content=b'{"a":1}', headers={"x-request-id": "r1"})
        assert (answer.status_code, answer.content) == (200, b"{}")
        first, headers, body = engine.requests.pop()
        assert (first, body) == (f"POST {route.path} HTTP/1.1", b'{"a":1}')
        assert headers["x-request-id"] == "r1"


WRONG = [
    None,
    "",
    "Bearer",
    "Bearer x",
    f"Bearer {KEY[:-1]}",
    f"Bearer {KEY}x",
    f"bearer {KEY}",
    KEY,
]


async def test_nobody_passes_without_the_key(admitted, engine):
    del admitted.headers["authorization"]
    for authorization, path in product(WRONG, [CHAT, "/invocations", "/metrics"]):
        headers = {} if authorization is None else {"authorization": authorization}
        answer = await admitted.post(path, content=b"{}", headers=headers)
        assert answer.status_code == 403, (authorization, path)
        assert answer.json() == {"error": {"message": "Forbidden."}}
        assert "server" not in answer.headers and not engine.requests


ELSEWHERE = [
    f"GET {CHAT}",
    f"PUT {CHAT}",
    "GET /v1/models",
    "POST /",
    "POST /invocations",
    "POST /v1/chat",
    f"POST {CHAT}/",
    f"POST /{CHAT}",
    f"POST {CHAT.upper()}",
    f"POST /x/..{CHAT}",
    f"POST {CHAT}/../../../metrics",
    "POST /v1/chat%2fcompletions",
    f"POST {CHAT}%00",
    f"POST {CHAT};x",
]


async def test_the_key_opens_nothing_else(admitted, engine):
    for line in ELSEWHERE:
        # httpx would tidy such paths up.
        reader, writer = await asyncio.open_connection(NODE, admitted.base_url.port)
        head = f"{line} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        writer.write(f"{head}content-length: 0\r\n\r\n".encode())
        status = await reader.readline()
        writer.close()
        assert status == b"HTTP/1.1 404 Not Found\r\n" and not engine.requests, line


async def test_it_listens_at_the_nodes_address_alone_and_hides_the_key(tmp_path, engine):
    async with guarded(tmp_path, engine) as (guard, client, _):
        process = psutil.Process(guard.pid)
        # Not by asking: another process may have this port at the other addresses.
        listening = [
            tuple(connection.laddr)
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening == [(NODE, client.base_url.port)]
        assert KEY not in " ".join(process.cmdline())


async def test_another_protocol_does_not_get_in(admitted, engine):
    reader, writer = await asyncio.open_connection(admitted.base_url.host, admitted.base_url.port)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert b"200" not in answer and not engine.requests


async def outcome(address, sent):
    """Send this, then nothing; return what is answered until the connection is closed.

    Nothing if it is closed while this is being sent.
    """
    reader, writer = await asyncio.open_connection(*address)
    writer.write(sent)
    try:
        return await asyncio.wait_for(reader.read(), 8)
    except ConnectionError:
        return b""
    finally:
        writer.transport.abort()


KEYED = f"POST {CHAT} HTTP/1.1\r\nauthorization: Bearer {KEY}\r\n".encode()


async def test_a_head_that_does_not_end_is_closed_at_its_deadline(tmp_path, engine):
    # vLLM's and SGLang's own server, uvicorn, has no deadline for one.
    parts = [b"", KEYED[:7], KEYED, KEYED + b"host: x\r\n"]
    async with guarded(tmp_path, engine, head_timeout_s=1) as (_, client, _):
        address = (client.base_url.host, client.base_url.port)
        answers = await asyncio.gather(*(outcome(address, part) for part in parts * 20))
    assert {answer[8:12] for answer in answers} == {b" 408"}
    assert not engine.writers


@pytest.mark.parametrize("more", [b"x-a: " + b"a" * 1000 + b"\r\n", b"a" * 1000, b"x: y\r\n"])
async def test_a_head_has_a_bound(admitted, engine, more):
    # uvicorn takes all of it into memory.
    address = (admitted.base_url.host, admitted.base_url.port)
    assert (await outcome(address, KEYED + more * 2000))[:12] in (b"HTTP/1.1 400", b"")
    assert not engine.requests


async def test_a_body_without_the_key_is_not_read(admitted, engine):
    address = (admitted.base_url.host, admitted.base_url.port)
    head = f"POST {CHAT} HTTP/1.1\r\ncontent-length: 999999999\r\n\r\n".encode()
    assert (await outcome(address, head)).startswith(b"HTTP/1.1 403")
    assert not engine.writers


async def test_tokens_pass_as_they_come(tmp_path, engine, relay):
    engine.behaviour = "stream"
    async with guarded(tmp_path, engine) as (guard, _, _):
        with await send(relay, guard) as answer:
            for _ in range(5):
                events = await asyncio.wait_for(answer.next_events(), 5)
                assert len(events) == 1
                engine.go_on.set()


@pytest.mark.parametrize("behaviour", ["wait", "stream"])
async def test_the_engine_learns_that_a_client_has_gone(tmp_path, engine, relay, behaviour):
    engine.behaviour = behaviour
    async with guarded(tmp_path, engine) as (guard, _, _):

        async def leave():
            with await send(relay, guard):
                raise ConnectionAbortedError

        asking = asyncio.create_task(leave())
        await asyncio.wait({asking}, timeout=0.3)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.wait_for(engine.gone.wait(), 2)


async def test_an_engine_that_is_gone_is_unreachable_at_once(tmp_path, engine, relay):
    async with guarded(tmp_path, engine) as (guard, _, server):
        server.close()
        await server.wait_closed()
        with pytest.raises(EngineUnreachable):
            await asyncio.wait_for(send(relay, guard), 1)


async def test_an_engine_that_ends_before_it_answers_is_unreachable(tmp_path, engine, relay):
    engine.behaviour = "wait"
    async with guarded(tmp_path, engine) as (guard, _, _):
        asking = asyncio.create_task(send(relay, guard))
        while not engine.requests:
            await asyncio.sleep(0.01)
        engine.break_off()
        with pytest.raises(EngineUnreachable):
            await asyncio.wait_for(asking, 2)


async def test_an_answer_that_breaks_off_breaks_off_here(tmp_path, engine, relay):
    engine.behaviour = "stream"
    async with guarded(tmp_path, engine) as (guard, _, _):
        with await send(relay, guard) as answer, pytest.raises(EngineBroke):
            while await answer.next_events():
                engine.break_off()


async def test_what_the_engine_itself_answers_passes(tmp_path, engine, relay):
    engine.behaviour = "refuse"
    async with guarded(tmp_path, engine) as (guard, _, _):
        with pytest.raises(EngineFailed):
            await send(relay, guard)


async def test_a_connection_is_used_again(admitted, engine):
    for _ in range(5):
        await admitted.post(CHAT, content=b"{}")
    assert len(engine.writers) == 1


async def test_its_death_is_noticed(tmp_path, engine):
    async with guarded(tmp_path, engine) as (guard, _, _):
        await guard.check(2)
        os.kill(guard.pid, signal.SIGKILL)
        await until(lambda: not guard.alive)
        with pytest.raises(GuardFailed, match="has ended"):
            await guard.check(2)


async def test_a_guard_that_hangs_is_noticed(tmp_path, engine):
    async with guarded(tmp_path, engine) as (guard, _, _):
        os.kill(guard.pid, signal.SIGSTOP)
        with pytest.raises(GuardFailed, match="did not answer"):
            await guard.check(0.2)


async def test_an_address_of_another_machine_is_refused(tmp_path):
    with pytest.raises(OSError):
        await EngineGuard.start("192.0.2.1", 1, KEY, tmp_path, name="test")


def test_only_a_cluster_of_one_machine_needs_none():
    assert not needs_guard("127.0.0.1")
    assert needs_guard("10.0.0.7") and needs_guard("fd00::7")
