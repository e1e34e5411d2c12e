import asyncio
from types import SimpleNamespace

import orjson
import pytest

from app import supervision
from app.config.ingress import IngressSettings
from app.config.model import ModelSettings
from app.contracts.status import ModelSnapshot
from app.core import errors
from app.core.dialect import Route
from app.gateway import handler, request_watch
from app.gateway.handler import Handler
from app.gateway.request_body import Bodies
from app.haproxy.config import NOT_WATCHED
from app.observe.observers import Observers
from app.tenants.access import Caller

pytestmark = pytest.mark.unit

BODY = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 100_000}]})


class Failing(Exception):
    pass


class ModelRegistry:
    def require(self, model):
        if model != "m":
            raise errors.ModelNotFound(model)
        return SimpleNamespace(snapshot=ModelSnapshot(model, (), "", 0, ModelSettings(), ()))


class Access:
    async def identify(self, authorization):
        if authorization is None:
            raise errors.InvalidKey(given=False)
        return CALLER


CALLER = Caller("tenant")


class World:
    """One route without a model behind it: a request ends as the test says."""

    def __init__(self, monkeypatch, end=None, with_reply=None, longest_s=None):
        ready = asyncio.Event()
        ready.set()
        self.bodies, self.sent, self.while_running = Bodies(), [], None
        self.refused = []
        services = SimpleNamespace(
            bodies=self.bodies,
            registry=ModelRegistry(),
            access=Access(),
            ready=ready,
            begin_trace=lambda _: None,
            longest_request_s=longest_s,
            observers=Observers(SimpleNamespace(refused=self.refused.append)),
            settings=IngressSettings.load({"auth": "keys"}, "user_config"),
        )
        world = self

        class Lifecycle:
            def __init__(self, *given):
                self.reply = given[4]

            async def run(self):
                world.while_running = world.bodies.memory.used_by("tenant")
                if with_reply is not None:
                    await with_reply(self.reply)
                if end is not None:
                    await end()

        monkeypatch.setattr(handler, "Lifecycle", Lifecycle)
        self.handler = Handler(Route.CHAT, services)

    async def ask(self, body=BODY, headers=((b"authorization", b"Bearer x"),), last=None):
        headers = (*headers, (b"content-type", b"application/json"))
        messages = [{"type": "http.request", "body": body, "more_body": last is not None}, last]

        async def receive():
            return messages.pop(0) if messages[0] else {"type": "http.disconnect"}

        async def send(message):
            self.sent.append(message)

        await self.handler({"type": "http", "headers": headers}, receive, send)


async def served():
    pass


async def shed():
    raise errors.Overloaded(1.0)


async def rejected():
    raise errors.EngineRejected(400, "no", None, None)


async def failing():
    raise Failing


@pytest.mark.parametrize("end", [served, shed, rejected, failing])
async def test_a_body_is_held_until_its_request_has_ended(end, monkeypatch):
    world = World(monkeypatch, end)
    try:
        await world.ask()
    except Failing:
        assert world.sent[0]["status"] == 500
    assert world.while_running is not None and world.while_running > len(BODY)
    assert world.refused == []
    assert world.bodies.memory.used == 0


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"headers": ()}, 401),
        ({"body": BODY[:-1]}, 400),
        ({"body": b'{"model":"other"}'}, 404),
        ({"body": b'{"model":"m","messages":' + b"[" * 600 + b"]" * 600 + b"}"}, 400),
        ({"headers": ((b"authorization", b"x"), (b"content-length", b"9" * 30))}, 413),
    ],
)
async def test_a_refused_request_holds_nothing(asked, status, monkeypatch):
    world = World(monkeypatch)
    await world.ask(**asked)
    assert world.sent[0]["status"] == status
    [refused] = world.refused
    assert (refused.status, refused.route) == (status, "chat/completions")
    assert refused.tenant == ("" if status == 401 else "tenant")
    assert world.while_running is None
    assert world.bodies.memory.used == 0


async def test_a_client_that_leaves_gets_nothing_and_holds_nothing(monkeypatch):
    world = World(monkeypatch)
    await world.ask(BODY[:-1], last={"type": "http.disconnect"})
    assert (world.sent, world.bodies.memory.used) == ([], 0)
    [refused] = world.refused
    assert (refused.status, refused.reason, refused.tenant) == (499, "client_gone", "tenant")


async def test_observers_are_told_of_a_request_that_fails_before_its_model_is_known(monkeypatch):
    world = World(monkeypatch)
    monkeypatch.setattr(ModelRegistry, "require", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await world.ask()
    [refused] = world.refused
    assert (refused.status, refused.reason) == (500, "internal_error")


async def test_a_cancelled_request_holds_nothing(monkeypatch):
    running = asyncio.Event()

    async def never():
        running.set()
        await asyncio.Event().wait()

    world = World(monkeypatch, never)
    asking = asyncio.create_task(world.ask())
    await running.wait()
    assert world.bodies.memory.used > 0
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert world.bodies.memory.used == 0


OURS_TO_WATCH = ((b"authorization", b"Bearer x"), tuple(part.encode() for part in NOT_WATCHED))


async def test_a_client_that_leaves_while_its_request_runs_ends_it(monkeypatch):
    # Serve leaves it to the ingress, as HAProxy's header says.
    ended = []

    async def never():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    world = World(monkeypatch, never)
    with pytest.raises(asyncio.CancelledError):
        await world.ask(headers=OURS_TO_WATCH)
    assert ended and world.bodies.memory.used == 0
    # What Serve writes into its metrics and its log; nobody reads it.
    assert [message["status"] for message in world.sent] == [499]


async def test_a_cancelled_request_is_not_taken_for_one_whose_client_has_gone(monkeypatch):
    running = asyncio.Event()

    async def never():
        running.set()
        await asyncio.Event().wait()

    world = World(monkeypatch, never)
    asking = asyncio.create_task(world.ask(headers=OURS_TO_WATCH))
    await running.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert world.sent == []


async def test_an_answer_that_was_sent_is_settled_in_peace(monkeypatch):
    # Servers tell of a disconnect after the last byte, too.
    monkeypatch.setattr(request_watch, "BEGINS_AFTER_S", 0.0)
    settled = []

    async def answered(reply):
        await reply.write(b"", more=False)
        await asyncio.sleep(0.05)
        settled.append(True)

    world = World(monkeypatch, with_reply=answered)
    await world.ask(headers=OURS_TO_WATCH)
    assert settled == [True]


async def test_a_request_that_takes_too_long_is_told_so(monkeypatch):
    async def never():
        await asyncio.Event().wait()

    world = World(monkeypatch, never, longest_s=0.01)
    await world.ask(headers=OURS_TO_WATCH, last=None)
    assert world.sent[0]["status"] == 408
    assert orjson.loads(world.sent[1]["body"])["error"]["code"] == "request_timeout"
    assert world.bodies.memory.used == 0


async def test_a_stream_that_takes_too_long_is_cut_off(monkeypatch):
    async def begun(reply):
        reply.started = True
        await asyncio.Event().wait()

    world = World(monkeypatch, with_reply=begun, longest_s=0.01)
    with pytest.raises(asyncio.CancelledError):
        await world.ask(headers=OURS_TO_WATCH)
    assert world.sent == []


async def test_a_request_that_ends_soon_takes_no_task(monkeypatch):
    begun = []
    monkeypatch.setattr(supervision, "run_once", lambda *_: begun.append(True))
    world = World(monkeypatch, served)
    await world.ask(headers=OURS_TO_WATCH)
    await asyncio.sleep(2 * request_watch.BEGINS_AFTER_S)
    assert begun == []


async def test_nothing_is_watched_where_serve_watches(monkeypatch):
    waited = []

    async def for_long():
        await asyncio.sleep(2 * request_watch.BEGINS_AFTER_S)
        waited.append(True)

    world = World(monkeypatch, for_long)
    await world.ask()
    assert waited == [True]
