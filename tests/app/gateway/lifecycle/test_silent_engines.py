"""Streams whose engine sends nothing for a while: before the first token, or while suspended."""

import asyncio
import json
import re
from dataclasses import replace

import httpx
import openai
import pytest

from app.config.ingress import IngressSettings
from app.config.model import ModelSettings
from app.core.dialect import Route
from app.core.tiers import Tier
from app.protocol.sse import DONE, EventReader, parse_block
from tests.support.waiting import until
from tests.support.world import ALIAS, NotedReply, Seen, World

pytestmark = pytest.mark.unit

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
    b"connection: close\r\n\r\n"
)
REFUSAL = b'{"error": {"message": "too long", "type": "BadRequestError", "code": 400}}'
COMMENT = b": keep-alive"
SOON_S, LONG_S = 0.05, 30.0
BEGUN, AGAIN, HELD = object(), object(), object()
"""What an engine waits for: its client has got something, two comments more, ``release``."""
PAUSE_S = 6 * SOON_S
FIELDS = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "stream": True}
MODEL = ModelSettings.load({"queue": {"headroom": 0}}, "user_config")


def event(text="x", **more):
    chunk = {"id": "c", "object": "chat.completion.chunk", "choices": [], **more}
    if text is not None:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
        chunk["choices"] = [choice]
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
END = event("", usage=USAGE) + event(None, usage=USAGE) + b"data: [DONE]\n\n"


def stream(*steps):
    """Return what an engine does for a stream: bytes that it sends, and what it waits for."""
    return (HEAD, *(b"%x\r\n%b\r\n" % (len(s), s) if isinstance(s, bytes) else s for s in steps))


WHOLE = stream(event(), END, b"")
LATE = stream(BEGUN, AGAIN, event(), END, b"")
"""As vLLM: the head comes at once. SGLang sends it with the first event."""
LATE_HEAD = (BEGUN, AGAIN, *WHOLE)
PAUSING = stream(event(), PAUSE_S, event(), END, b"")
PAUSING_LONG = stream(event(), BEGUN, AGAIN, event(), END, b"")
HUNG = stream(event(), LONG_S)
LOST, LOST_HEAD = (BEGUN,), stream(BEGUN)
"""It closes the connection once the stream has begun, without an event."""


def whole(status, body):
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    return head % (status, len(body)) + b"connection: close\r\n\r\n" + body


REJECTED = (BEGUN, whole(b"400 Bad Request", REFUSAL))


class ScriptedWorld:
    """A world whose replicas play scripts, one for each request, in the order of the requests."""

    def __init__(self, world):
        self.world = world
        self.scripts = []
        self.released = asyncio.Event()
        self._tasks = set()

    async def start(self):
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]

    async def close(self):
        self._server.close()
        for task in self._tasks:
            task.cancel()

    async def _connected(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        head = await reader.readuntil(b"\r\n\r\n")
        [length] = re.findall(rb"content-length: (\d+)", head)
        await reader.readexactly(int(length))
        try:
            for step in self.scripts.pop(0):
                if isinstance(step, bytes):
                    writer.write(step)
                elif isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    await self._wait(step, head)
        finally:
            writer.close()

    async def _wait(self, step, head):
        if step is HELD:
            await self.released.wait()
            return
        [request_id] = re.findall(rb"x-request-id: (\S+)", head)
        seen = self.world.asked[request_id.decode()]
        more = 0 if step is BEGUN else 2 * len(COMMENT)
        length = len(seen.body)
        await until(lambda: len(seen.body) > (more and length + more))

    def replica(self, name, **dialect):
        """Return a replica; ``dialect``: how it differs from vLLM."""
        status = self.world.engines["vllm"].status
        return replace(
            status,
            replica_id=name,
            base_url=f"http://127.0.0.1:{self._port}",
            dialect=replace(status.dialect, **dialect),
        )

    async def serve(self, *replicas, **settings):
        times = {"stream_timeout_s": 10.0, "stream_headers_after_s": SOON_S}
        times |= {"stream_comment_s": SOON_S, **settings}
        self.world.services.settings = IngressSettings(auth="keys", **times)
        self.world.source.publish(MODEL, replicas or [self.replica("one")])
        admission = self.world.registry.find
        await until(lambda: len(admission("acme/model").snapshot.replicas) == len(replicas or [1]))

    def asking(self, *scripts, route=Route.CHAT, **fields):
        self.scripts += scripts
        body = FIELDS if route is Route.CHAT else {"input": "hello", "stream": True}
        seen = Seen(None, [])
        asking = self.world.ask(seen, route, {"model": ALIAS, **body, **fields}, "plain")
        return seen, asyncio.create_task(asking)

    async def ask(self, *scripts, **fields):
        seen, task = self.asking(*scripts, **fields)
        await asyncio.wait_for(task, 10)
        record = (await self.world.new_records())[seen.request_id]
        assert self.world.taken() == 0
        return seen, record

    @property
    def suspects(self):
        return self.world.registry.find("acme/model").demand().suspects


@pytest.fixture
async def scripted(tmp_path, monkeypatch):
    monkeypatch.setattr("app.gateway.handler.Reply", NotedReply)
    world = World(tmp_path)
    made = ScriptedWorld(world)
    await made.start()
    await world.start()
    yield made
    await made.close()
    await world.close()


def blocks_of(seen):
    return EventReader().blocks(seen.body)


def events_of(seen):
    return [event for block in blocks_of(seen) if (event := parse_block(block))]


def error_of(seen):
    """Return the error of a stream's last event."""
    assert seen.status == 200 and seen.whole
    last = events_of(seen)[-1]
    fields = json.loads(last.data)
    return fields if last.name == b"error" else fields["error"]


@pytest.mark.parametrize("late", [LATE, LATE_HEAD], ids=["vLLM", "SGLang"])
async def test_a_late_stream_begins_with_its_headers_and_comments(scripted, late):
    await scripted.serve()
    seen, record = await scripted.ask(late, service_tier="priority")
    assert (seen.status, seen.headers["x-service-tier"]) == (200, "priority")
    assert blocks_of(seen)[:2] == [COMMENT, COMMENT]
    assert json.loads(events_of(seen)[0].data)["service_tier"] == "priority"
    assert seen.whole and seen.body.endswith(b"data: [DONE]\n\n")
    assert (record["state"], record["completion_tokens"]) == ("completed", 2)
    assert record["ttft_s"] > 1.9 * SOON_S, "a comment is no token"


async def test_a_stream_in_time_gets_no_comment(scripted):
    await scripted.serve(stream_headers_after_s=LONG_S, stream_comment_s=LONG_S)
    for script in (WHOLE, (PAUSE_S, *WHOLE), PAUSING):
        seen, _ = await scripted.ask(script)
        assert COMMENT not in seen.body and seen.whole


async def test_a_stream_that_pauses_gets_comments_meanwhile(scripted):
    await scripted.serve(stream_headers_after_s=LONG_S)
    seen, record = await scripted.ask(PAUSING_LONG)
    blocks = blocks_of(seen)
    assert blocks[0].startswith(b"data:") and blocks[1] == COMMENT
    assert events_of(seen)[-1].data == DONE
    assert record["completion_tokens"] == 2


async def test_a_stream_that_has_ended_gets_no_comment_before_its_connection_ends(scripted):
    await scripted.serve()
    seen, _ = await scripted.ask(stream(event(), END, PAUSE_S, b""))
    assert seen.whole and seen.body.endswith(b"data: [DONE]\n\n")


async def test_an_answer_that_is_not_streamed_gets_none(scripted):
    await scripted.serve()
    body = json.dumps({"choices": [], "usage": USAGE}).encode()
    seen, record = await scripted.ask((PAUSE_S, whole(b"200 OK", body)), stream=False)
    assert (seen.status, record["state"]) == (200, "completed")
    assert json.loads(seen.body)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("route", [Route.CHAT, Route.RESPONSES])
async def test_an_engines_error_before_the_headers_has_its_status(scripted, route):
    await scripted.serve(stream_headers_after_s=LONG_S)
    seen, record = await scripted.ask((PAUSE_S, *REJECTED[1:]), route=route)
    assert (seen.status, json.loads(seen.body)["error"]["message"]) == (400, "too long")
    assert (record["state"], record["reason"]) == ("failed", "engine_rejected")


@pytest.mark.parametrize("route", [Route.CHAT, Route.RESPONSES])
async def test_an_engines_error_after_the_headers_is_the_last_event(scripted, route):
    await scripted.serve()
    seen, record = await scripted.ask(REJECTED, route=route)
    assert COMMENT in blocks_of(seen)
    assert error_of(seen)["message"] == "too long"
    assert (record["state"], record["reason"]) == ("failed", "engine_rejected")
    assert float(record["cost"]) == record["completion_tokens"] == 0


async def test_an_answer_that_is_no_stream_after_the_headers_is_an_error(scripted):
    await scripted.serve()
    body = json.dumps({"choices": [], "usage": USAGE}).encode()
    seen, record = await scripted.ask((BEGUN, whole(b"200 OK", body)))
    assert error_of(seen)["code"] == "engine_error"
    assert (record["state"], float(record["cost"])) == ("failed", 0)


@pytest.mark.parametrize("lost", [LOST, LOST_HEAD])
async def test_the_only_replica_lost_after_the_headers_is_the_last_event(scripted, lost):
    await scripted.serve()
    seen, record = await scripted.ask(lost)
    assert error_of(seen)["code"] == "engine_not_ready"
    assert (record["state"], record["reason"]) == ("failed", "no_other_replica")


@pytest.mark.parametrize("tier", list(Tier))
async def test_a_stream_that_has_begun_goes_to_a_replica_that_honours_its_tier(scripted, tier):
    await scripted.serve(scripted.replica("one"), scripted.replica("two"))
    seen, record = await scripted.ask(LOST, WHOLE, service_tier=tier.value)
    assert seen.headers["x-service-tier"] == tier.value
    assert seen.whole and seen.body.endswith(b"data: [DONE]\n\n")
    assert {json.loads(one.data)["service_tier"] for one in events_of(seen)[:-1]} == {tier.value}
    assert (record["state"], record["served_tier"]) == ("completed", tier.value)


@pytest.mark.parametrize("begun", [True, False])
async def test_a_priority_stream_that_has_begun_is_not_served_as_default(scripted, begun):
    plain = scripted.replica("plain", priority_routes=frozenset())
    headers_after_s = SOON_S if begun else LONG_S
    await scripted.serve(scripted.replica("one"), plain, stream_headers_after_s=headers_after_s)
    lost = LOST if begun else (PAUSE_S,)
    seen, record = await scripted.ask(lost, WHOLE, service_tier="priority")
    if begun:
        assert scripted.scripts == [WHOLE], "the other replica has not received it"
        assert seen.headers["x-service-tier"] == "priority"
        assert error_of(seen)["code"] == "engine_not_ready"
        assert (record["state"], float(record["cost"])) == ("failed", 0)
    else:
        assert seen.headers["x-service-tier"] == record["served_tier"] == "default"
        assert record["state"] == "completed"


async def test_a_stream_that_has_begun_gets_comments_in_the_queue_too(scripted):
    await scripted.serve(*(replace(scripted.replica(name), slots=1) for name in ("one", "two")))
    other, other_task = scripted.asking(stream(event(), HELD, END, b""))
    await until(lambda: other.body)
    first, task = scripted.asking(LOST, WHOLE)
    await until(lambda: first.body.count(COMMENT) > 8)
    assert scripted.scripts == [WHOLE], "it waits for the slot of the other"
    scripted.released.set()
    await asyncio.gather(task, other_task)
    assert first.whole and first.body.endswith(b"data: [DONE]\n\n")


async def test_comments_of_an_engine_before_its_first_token_pass_once_the_stream_has_begun(
    scripted,
):
    await scripted.serve(stream_headers_after_s=6 * SOON_S, stream_comment_s=LONG_S)
    ticks = b": tick 0\n\n", BEGUN, b": tick 1\n\n", SOON_S, b": tick 2\n\n"
    seen, _ = await scripted.ask(stream(*ticks, SOON_S, event(), END, b""))
    assert blocks_of(seen)[:3] == [COMMENT, b": tick 1", b": tick 2"]


async def test_nothing_leaves_before_the_record_is_durable(scripted, monkeypatch):
    await scripted.serve()

    async def refuse(meter):
        from app.ledger.ledger import DiskRefuses

        raise DiskRefuses

    monkeypatch.setattr("app.gateway.metering.Meter.durable", refuse)
    seen, record = await scripted.ask(LATE)
    assert (seen.status, json.loads(seen.body)["error"]["code"]) == (503, "ledger_unavailable")
    assert float(record["cost"]) == 0


SUSPENDED = stream(event(), HELD, event(), END, b"")
SUSPENDED_FIRST = stream(HELD, event(), END, b"")
SHORT = {"stream_timeout_s": 4 * SOON_S}


@pytest.mark.parametrize("script", [SUSPENDED, SUSPENDED_FIRST])
@pytest.mark.parametrize("tier", [Tier.DEFAULT, Tier.FLEX])
async def test_a_suspended_stream_is_not_broken_off_but_its_replica_is_asked(
    scripted, tier, script
):
    await scripted.serve(scripted.replica("one", preempts=True), **SHORT)
    seen, task = scripted.asking(script, service_tier=tier.value)
    await until(lambda: scripted.suspects)
    assert scripted.suspects == {"one": Route.CHAT} and not task.done()
    scripted.released.set()
    await task
    assert seen.whole and seen.body.endswith(b"data: [DONE]\n\n")
    record = (await scripted.world.new_records())[seen.request_id]
    assert (record["state"], record["completion_tokens"]) == ("completed", 2)


HELD_ANSWER = (HELD, whole(b"200 OK", json.dumps({"choices": [], "usage": USAGE}).encode()))


@pytest.mark.parametrize("tier", [Tier.DEFAULT, Tier.FLEX])
async def test_a_suspended_answer_is_not_broken_off_but_its_replica_is_asked(scripted, tier):
    times = {"engine_timeout_s": 4 * SOON_S, "stream_timeout_s": SOON_S}
    await scripted.serve(scripted.replica("one", preempts=True), **times)
    seen, task = scripted.asking(HELD_ANSWER, service_tier=tier.value, stream=False)
    await until(lambda: scripted.suspects)
    assert scripted.suspects == {"one": Route.CHAT} and not task.done()
    scripted.released.set()
    await task
    record = (await scripted.world.new_records())[seen.request_id]
    assert (seen.status, record["state"], record["completion_tokens"]) == (200, "completed", 2)


@pytest.mark.parametrize(("tier", "preempts"), [("priority", True), ("default", False)])
async def test_an_answer_that_cannot_be_suspended_ends_at_its_own_bound(scripted, tier, preempts):
    await scripted.serve(scripted.replica("one", preempts=preempts), engine_timeout_s=4 * SOON_S)
    seen, record = await scripted.ask((LONG_S,), service_tier=tier, stream=False)
    assert seen.status == 503 and record["state"] == "failed"


async def test_an_answer_is_not_suspended_for_ever(scripted):
    times = {"engine_timeout_s": 2 * SOON_S, "suspended_timeout_s": 6 * SOON_S}
    await scripted.serve(scripted.replica("one", preempts=True), **times, stream_timeout_s=SOON_S)
    seen, record = await scripted.ask((LONG_S,), stream=False)
    assert seen.status == 503 and record["state"] == "failed"
    assert seen.ended - seen.began > 7 * SOON_S


@pytest.mark.parametrize(("tier", "preempts"), [("priority", True), ("default", False)])
async def test_a_stream_that_cannot_be_suspended_is_broken_off(scripted, tier, preempts):
    await scripted.serve(scripted.replica("one", preempts=preempts), **SHORT)
    seen, record = await scripted.ask(HUNG, service_tier=tier)
    assert error_of(seen)["code"] == "engine_error"
    assert (record["state"], record["reason"]) == ("interrupted", "engine_lost")


async def test_a_stream_is_not_suspended_for_ever(scripted):
    replica = scripted.replica("one", preempts=True)
    await scripted.serve(replica, **SHORT, suspended_timeout_s=12 * SOON_S)
    seen, record = await scripted.ask(HUNG)
    assert seen.ended - seen.began > 11 * SOON_S
    assert (record["state"], record["reason"]) == ("interrupted", "engine_lost")
    # Never less than the bound for other streams.
    await scripted.serve(replica, **SHORT, suspended_timeout_s=SOON_S)
    seen, record = await scripted.ask(HUNG)
    assert record["state"] == "interrupted" and seen.ended - seen.began > 3 * SOON_S


async def test_a_replica_that_serves_others_is_not_asked(scripted):
    await scripted.serve(scripted.replica("one", preempts=True), stream_timeout_s=12 * SOON_S)
    steady = stream(*[step for _ in range(20) for step in (event(), SOON_S)], END, b"")
    _, other = scripted.asking(steady, service_tier="priority")
    await until(lambda: not scripted.scripts)
    seen, task = scripted.asking(SUSPENDED)
    while not other.done():
        assert not scripted.suspects
        await asyncio.sleep(SOON_S / 5)
    scripted.released.set()
    await asyncio.gather(task, other)
    assert seen.whole


def read_by_sdk(seen):
    """Return the texts that the official SDK reads from an answer."""
    answer = httpx.Response(seen.status, headers=seen.headers, content=seen.body)
    transport = httpx.MockTransport(lambda _: answer)
    with openai.OpenAI(api_key="k", http_client=httpx.Client(transport=transport)) as client:
        chunks = client.chat.completions.create(model="m", messages=[], stream=True)
        return [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]


async def test_the_sdk_skips_comments_and_raises_the_error_after_them(scripted):
    await scripted.serve()
    seen, _ = await scripted.ask(LATE)
    assert COMMENT in blocks_of(seen) and read_by_sdk(seen) == ["x", ""]
    seen, _ = await scripted.ask(REJECTED)
    with pytest.raises(openai.APIError, match="too long"):
        read_by_sdk(seen)
