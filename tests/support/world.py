"""A whole ingress on one event loop, before simulated engines on real sockets, without Ray.

Everything from the HTTP request's first byte to the record in the database is the product's own
code, and so are the engines. Only who tells the registry about models, and who listens to the
clients' connections, stand in for Ray Serve. What engines do wrong is planned request by request.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import orjson
import uvicorn
from sqlalchemy import URL

from app.config.ingress import IngressSettings
from app.config.journal import JournalSettings
from app.config.model import ModelSettings
from app.contracts.credits import Renewal
from app.contracts.status import ModelSnapshot, ReplicaStatus
from app.core.dialect import Route
from app.core.tiers import Tier
from app.flow.allocation.allocator import Capacity, CreditAllocator
from app.gateway.asgi import build_api
from app.gateway.registry import ModelRegistry
from app.gateway.response import Reply
from app.gateway.services import Services
from app.gateway.spend_counter import SpendCounter
from app.haproxy.config import NOT_WATCHED
from app.ledger.ledger import Ledger
from app.ledger.record_store import RecordStore, Wanted
from app.ledger.usage import Grouping, add_up
from app.store.database import connect
from app.store.database_url import parse_url
from app.tenants.access import Access
from app.tenants.budget_gate import BudgetGate
from app.tenants.keys import KeyLimits, KeyTable, create_key
from app.tenants.limiter import LimitBooks
from app.tenants.spending import SpendBook
from app.upstream.client import EngineClient
from deployments.engines.base import Launch
from deployments.engines.lora import LoraAdapter
from deployments.engines.simulated import Simulated
from deployments.simulator.__main__ import Server
from deployments.simulator.application import Application
from deployments.simulator.engine import Engine, GivenUpError
from deployments.simulator.observations import Observations
from deployments.simulator.settings import InjectedFailures, SimulatedSettings
from tests.support.records import completed
from tests.support.waiting import SLOWEST

MODEL, ALIAS, ADAPTER = "acme/model", "model", "acme/tuned"
KEY = "engine-key"
ENGINES: dict[str, dict[str, Any]] = {
    "vllm": {"preemption": False, "adapters": [ADAPTER]},
    "unordered": {"policy": "fcfs"},
    "sglang": {"dialect": "sglang", "preemption": False, "adapters": [ADAPTER]},
    "tensorrt": {"dialect": "tensorrt_llm"},
}
"""One honours priority everywhere, one nowhere, two on some routes; two have an adapter. None
preempts: what is silent has failed."""
SLOTS = 2
QUEUE = {
    "priority": {"max_waiting": 3, "max_wait_s": 0.3},
    "default": {"max_waiting": 2, "max_wait_s": 0.3},
    "flex": {"max_waiting": 1, "max_wait_s": 0.3},
}
"""Short, so that requests are displaced and turned away."""

KEYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "premium": {"default_tier": Tier.PRIORITY},
    "frugal": {"default_tier": Tier.FLEX, "tiers": [Tier.FLEX]},
    "sharing": {"limits": KeyLimits(priority_share=Decimal("0.5"))},
    "limited": {"limits": KeyLimits(rpm=60)},
}

_WATCHED = (NOT_WATCHED[0].encode(), NOT_WATCHED[1].encode())

HANG_UP = InjectedFailures(request="truncate", health_hangs=True)
"""The engine closes the connection as the request arrives, and goes on serving others."""

_noting: ContextVar[Callable[[str], None]] = ContextVar("noting")
_serving: ContextVar[SimulatedEngine] = ContextVar("serving")
_planned: ContextVar[InjectedFailures | None] = ContextVar("planned", default=None)


@dataclass
class Attempt:
    """A request as an engine heard it."""

    replica_id: str
    fields: dict[str, Any]
    at: float
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Seen:
    """One request, as its client saw it and as the engines heard it.

    Attributes:
        request: what was asked, as the test describes it.
        plan: what goes wrong with it at the first engine that hears it, at the second, and so on.
        request_id: the ingress's name for it; empty where it did not get that far.
        whole: whether the client got the last byte.
        left: whether the client went away.
        rewrite: what comes of each piece of the engine's answer before it is sent.
        reads: the client takes none of the body before this is set; ``None``: it always reads.
    """

    request: Any
    plan: list[InjectedFailures | None]
    request_id: str = ""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    pieces: int = 0
    last: bytes = b""
    whole: bool = False
    left: bool = False
    began: float = 0.0
    ended: float = 0.0
    attempts: list[Attempt] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    rewrite: Callable[[bytes], bytes] | None = None
    reads: asyncio.Event | None = None


class NotedReply(Reply):
    """The reply of the product, which tells the client's side its request id."""

    def __init__(self, send: Any) -> None:
        super().__init__(send)
        _noting.get()(self.request_id)


class PlannedEngine(Engine):
    """Fails at those requests that are meant to fail."""

    def failure_of(self, number: int) -> InjectedFailures | None:
        return _planned.get()


def crash() -> None:
    """What takes the place of the engine's own SIGKILL."""
    _serving.get().stop()
    raise GivenUpError


class SimulatedEngine:
    """One engine on a port of its own, which can die and come back under a new name."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.lives = 0
        self.up = False
        self._world = world
        loop = asyncio.get_running_loop()
        # More slots than it is given requests: the queue is in the ingress.
        given = {"slots": 64, "tokens_per_second": 1500, "context_length": 2048, **ENGINES[name]}
        engine = PlannedEngine(SimulatedSettings.load(given, "engine_args"), loop)
        self._app = Application(engine, MODEL, "simulated", KEY)
        self._app.ready = True

    async def start(self) -> None:
        config = uvicorn.Config(
            self, host="127.0.0.1", port=0, loop="none", lifespan="off", log_config=None,
            log_level="critical", access_log=False, ws="none", timeout_keep_alive=5,
        )  # fmt: skip
        self._server = Server(config)
        self._task = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0)
        self.lives += 1
        self.up = True
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        launch = Launch(
            "simulated", MODEL, "127.0.0.1", port, SLOTS, KEY, "", ENGINES[self.name],
            loras=tuple(LoraAdapter(one, "") for one in self._app.engine.settings.adapters),
        )  # fmt: skip
        facts = await Simulated().inspect(launch, PlainHttp(self.url))
        self.status = ReplicaStatus(
            f"{self.name}-{self.lives}", self.name, self.url, KEY, SLOTS, facts.version,
            facts.context_length, facts.dialect,
        )  # fmt: skip

    @property
    def running(self) -> int:
        """How many requests it is working on."""
        return self._app.engine.scheduler.running

    @property
    def observations(self) -> Observations:
        """What it has received."""
        return self._app.engine.observations

    def stop(self) -> None:
        """Die at once: every connection breaks, and none is taken any more."""
        if not self.up:
            return
        self.up = False
        self._world.crashes.append([time.monotonic(), math.inf])
        for listener in self._server.servers:
            listener.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        self._server.should_exit = True

    def _hang_up(self, scope: Any) -> None:
        for connection in self._server.server_state.connections:
            if getattr(connection, "scope", None) is scope:
                connection.transport.abort()

    async def ended(self) -> None:
        self.stop()
        await self._task

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        while message.get("more_body"):
            more = await receive()
            message = {**more, "body": message["body"] + more.get("body", b"")}
        first = [message]
        seen = self._world.asked.get(dict(scope["headers"]).get(b"x-request-id", b"").decode())
        if seen is not None:
            number = len(seen.attempts)
            fields = read_fields(message["body"])
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            seen.attempts.append(Attempt(self.status.replica_id, fields, time.monotonic(), headers))
            seen.changed.set()
            planned = seen.plan[number] if number < len(seen.plan) else None
            if planned is HANG_UP:
                self._hang_up(scope)
                return
            _planned.set(planned)
        _serving.set(self)

        async def again() -> Any:
            return first.pop() if first else await receive()

        rewrite = seen and seen.rewrite
        await self._app(scope, again, rewriting(send, rewrite) if rewrite else send)


def rewriting(send: Any, rewrite: Callable[[bytes], bytes]) -> Any:
    async def sent(message: Any) -> None:
        if message["type"] == "http.response.start":
            # Its length may change.
            headers = [pair for pair in message["headers"] if pair[0] != b"content-length"]
            message = {**message, "headers": headers}
        elif message.get("body"):
            message = {**message, "body": rewrite(message["body"])}
        await send(message)

    return sent


class PlainHttp:
    """A connection to an engine, as its adapter wants it."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def get_json(self, path: str, *, authorized: bool = True) -> tuple[int, Any]:
        headers = {"authorization": f"Bearer {KEY}"} if authorized else {}
        async with (
            aiohttp.ClientSession() as session,
            session.get(self._url + path, headers=headers) as answer,
        ):
            return answer.status, await answer.json()


class Source:
    """Tells the registry about one model, as its Model actor would."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._changes = 0
        self._news = asyncio.Event()
        self._allocator = CreditAllocator("life", ModelSettings().queue, time.monotonic() - 60)
        self.snapshot = ModelSnapshot(MODEL, (ALIAS,), "acme", 0, ModelSettings(), ())

    async def applications(self) -> set[str]:
        return {"model"}

    async def renew(self, application: str, demand: Any, report: Any, known: str) -> Renewal:
        version = str(self._changes)
        grant = self._allocator.renew(demand, time.monotonic())
        if known != version:
            # The registry takes it before anything else can happen.
            self._world.cards.append((time.monotonic(), self.snapshot.settings))
        return Renewal(version, None if known == version else self.snapshot, grant)

    async def wait_for_wakeup(self, application: str, ingress: str) -> bool:
        try:
            async with asyncio.timeout(SLOWEST * 2):
                await self._news.wait()
        except TimeoutError:
            return False
        self._news.clear()
        return True

    def publish(
        self, settings: ModelSettings, replicas: Iterable[ReplicaStatus], **more: Any
    ) -> None:
        self._changes += 1
        self.snapshot = replace(self.snapshot, settings=settings, replicas=tuple(replicas), **more)
        self._allocator.configure(settings.queue)
        self._allocator.set_replicas(
            Capacity(
                one.replica_id,
                one.pool,
                one.slots,
                one.dialect.native_priority,
                one.dialect.preempts,
            )
            for one in self.snapshot.replicas
        )
        self._news.set()


def read_fields(body: bytes) -> dict[str, Any]:
    """The fields of a JSON body; a form's is in ``form``, as text."""
    try:
        fields: dict[str, Any] = orjson.loads(body)
    except orjson.JSONDecodeError:
        return {"form": body.decode("latin-1")}
    return fields


class Books:
    """The limits' books, beside the ingress."""

    def __init__(self) -> None:
        self._books = LimitBooks()
        self._spend = SpendBook()

    async def answer(self, asks: Any) -> Any:
        return self._books.answer(asks, time.monotonic())

    async def spend(self, report: Any) -> Any:
        return self._spend.answer(report, time.monotonic())


class KeptKeys:
    """The keys of all tenants, in memory."""

    def __init__(self) -> None:
        made = {
            tenant: create_key(tenant, created=datetime.now(UTC), **more)
            for tenant, more in KEYS.items()
        }
        self.texts = {tenant: text for tenant, (_, text) in made.items()}
        self._table = KeyTable.of(key for key, _ in made.values())

    def table(self) -> KeyTable:
        return self._table


class CountingStore(RecordStore):
    """The real store, which counts how often each record came."""

    added: Counter[str]

    def add(self, bodies: Any) -> None:
        super().add(bodies)
        self.added.update(orjson.loads(body)["request_id"] for body in bodies)


class World:
    """All of it. To be made, used and closed on one event loop."""

    def __init__(self, folder: Path, timeout_s: float = 0.25) -> None:
        self.asked: dict[str, Seen] = {}
        self.cards: list[tuple[float, ModelSettings]] = []
        # From when to when the ingress believed in an engine that was dead.
        self.crashes: list[list[float]] = []
        self._database = folder / "usage.db"
        self._engine = connect(parse_url(f"sqlite:///{self._database}"))
        self.store = CountingStore(self._engine)
        self.store.added = Counter()
        self.store.prepare()
        journal = JournalSettings(segment_mb=1, flush_interval_s=0.01, progress_tokens=1)
        self.ledger = Ledger(folder / "journal", journal, self.store)
        self.source = Source(self)
        self.registry = ModelRegistry(self.source, discover_s=60)
        self._keys = KeptKeys()
        settings = IngressSettings(
            auth="keys", engine_timeout_s=timeout_s, stream_timeout_s=timeout_s
        )
        self.services = Services(
            self.registry, EngineClient(), settings,
            self.ledger, Access(self.registry.ingress, self._keys, books := Books()), self.store,
        )  # fmt: skip
        self.budgets = BudgetGate(self.registry.ingress, books, self.store.spent)
        self.services.budgets = self.budgets
        self.services.observers.add(SpendCounter(self.budgets))
        self._api = build_api(self.services)
        self.engines = {name: SimulatedEngine(self, name) for name in ENGINES}
        self._row = 0

    async def start(self) -> None:
        for engine in self.engines.values():
            await engine.start()
        self.registry.start()
        assert self.services.access is not None
        self.services.access.start()
        self.budgets.start()
        await self.registry.wait_known(5)
        self.services.ready.set()

    async def close(self) -> None:
        await self.registry.stop()
        assert self.services.access is not None
        await self.services.access.stop()
        await self.budgets.stop()
        await self.services.engines.close()
        await self.ledger.close()
        # uvicorn looks ten times a second whether it is to end.
        await asyncio.gather(*(engine.ended() for engine in self.engines.values()))
        self._engine.dispose()

    async def set(self, model: ModelSettings, engines: Iterable[str], **more: Any) -> None:
        """Change the model, and return once the ingress knows; ``more`` is of its snapshot."""
        published = time.monotonic()
        up = [self.engines[name] for name in sorted(engines)]
        self.source.publish(model, [engine.status for engine in up if engine.up], **more)
        while (admission := self.registry.find(MODEL)) is None or (
            admission.snapshot is not self.source.snapshot
        ):
            await asyncio.sleep(0.001)
        for crash in self.crashes:
            # It still believes in one that has died since.
            if crash[0] < published:
                crash[1] = min(crash[1], time.monotonic())

    def key(self, tenant: str) -> str:
        """The key of a tenant."""
        return self._keys.texts[tenant]

    def client(self, tenant: str) -> httpx.AsyncClient:
        """A client of the ingress that sends the key of a tenant."""
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self._api),
            base_url="http://127.0.0.1",
            headers={"x-api-key": self.key(tenant)},
        )

    @property
    def store_url(self) -> URL:
        """Where its records are, for whoever reads them."""
        return parse_url(f"sqlite:///{self._database}")

    def taken(self) -> int:
        """How many slots are taken, as the ingress believes."""
        admission = self.registry.find(MODEL)
        assert admission is not None
        return sum(admission.demand().running.values())

    async def restart(self, name: str) -> None:
        """Have an engine that died come back as another replica."""
        engine = self.engines[name]
        await engine.ended()
        await engine.start()

    async def front(self, scope: Any, receive: Any, send: Any) -> None:
        """The ingress as an application, for clients over HTTP."""
        _noting.set(lambda _: None)
        await self._api(scope, receive, send)

    async def ask(
        self,
        seen: Seen,
        route: Route,
        fields: dict[str, Any],
        tenant: str,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        """Send a request, and return when its answer or its connection has ended."""
        body, gone = orjson.dumps(fields), asyncio.Event()
        key = self._keys.texts.get(tenant, "none")
        scope: dict[str, Any] = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": f"/v1/{route.value}", "root_path": "", "query_string": b"",
            "headers": [
                (b"host", b"127.0.0.1"), (b"content-type", b"application/json"),
                (b"authorization", f"Bearer {key}".encode()), _WATCHED, *headers,
            ],
            "client": None,
            "server": ("127.0.0.1", 80),
        }  # fmt: skip
        scope["raw_path"] = scope["path"].encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if not messages:
                await gone.wait()
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                seen.headers = {n.decode(): v.decode() for n, v in message["headers"]}
            else:
                if seen.reads is not None:
                    await seen.reads.wait()
                seen.body += message.get("body", b"")
                seen.pieces += 1
                seen.last = message.get("body", b"")
                seen.whole = not message.get("more_body", False)
            seen.changed.set()

        def note(request_id: str) -> None:
            seen.request_id = request_id
            self.asked[request_id] = seen

        _noting.set(note)
        seen.began = time.monotonic()
        try:
            await self._api(scope, receive, send)
        finally:
            seen.ended = time.monotonic()

    async def new_records(self) -> dict[str, dict[str, Any]]:
        """Return what has been added to the bill since the last call, by request id.

        Records are moved in the order of their ends, so all are there once the last one is.
        """
        last = completed()
        await self.ledger.settle(last)
        while not self.store.added[last.origin.request_id]:
            await asyncio.sleep(0.002)
        with closing(sqlite3.connect(self._database)) as database:
            database.row_factory = sqlite3.Row
            rows = database.execute(
                "SELECT rowid, * FROM usage_records WHERE rowid > ?", (self._row,)
            ).fetchall()
        self._row = max(row["rowid"] for row in rows)
        records = {row["request_id"]: dict(row) for row in rows}
        del records[last.origin.request_id]
        return records

    def total(self) -> tuple[int, Decimal]:
        """How many requests all tenants have made, and what they owe, as usage is told."""
        totals = self.store.totals(Wanted(), [Grouping.TENANT])
        whole = add_up([one for one in totals if one.group["tenant"] in KEYS])
        return whole.requests, whole.cost
