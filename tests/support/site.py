"""The pages of an ingress on a socket of their own, with models that are made up: no cluster."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import uvicorn
from sqlalchemy import make_url

from app.config.ingress import IngressSettings
from app.config.model import ModelSettings
from app.config.usage_reads import UsageSettings
from app.contracts.credits import Demand
from app.contracts.news import ModelNews, PoolChange, ScalingDecision
from app.contracts.start import PoolStart
from app.contracts.stats import IngressBoard, ModelBoard, Suspended
from app.contracts.status import ModelSnapshot, ReplicaStatus, Sleep
from app.contracts.traffic import Outcome, Served, Traffic
from app.core.dialect import Dialect, Route
from app.core.pricing import TokenUsage
from app.core.tiers import Tier
from app.flow.stats import Tally
from app.gateway.asgi import build_api
from app.gateway.registry import ModelRegistry
from app.gateway.services import Services
from app.gateway.usage_reader import UsageReader
from app.history.recorder import Recorder
from app.ledger.record import now_utc
from app.ledger.record_store import RecordStore
from app.store.database import connect
from app.tenants.access import Access
from app.tenants.keys import KeyLimits, KeyTable, create_key
from app.tenants.limiter import LimitBooks
from app.web.routes import add_web_routes
from tests.support.records import completed

BUSY, ASLEEP, STARTING = "acme/busy", "acme/asleep", "acme/starting"
RECORDS = 60
_TTFT_S = {Tier.PRIORITY: 0.05, Tier.DEFAULT: 0.3, Tier.FLEX: 1.5}
_NOTHING = dict.fromkeys(Tier, 0)
_PAST_S = 420
_SLO = {
    "priority": {"ttft_ms": 300, "p": 0.95},
    "default": {"ttft_ms": 300, "p": 0.9},
    "flex": {"ttft_ms": 9000},
}
_SETTINGS = ModelSettings.load({"slo": _SLO}, "user_config")


class BusyModel:
    """A model with two replicas, a queue, sheds, downgrades, objectives and a decision, seven
    minutes old. Nothing has happened yet that counts for the objective of flex."""

    def __init__(self) -> None:
        dialect = Dialect("vllm", False, _NOTHING, frozenset(Route), preempts=True)
        self._replicas = tuple(
            ReplicaStatus(f"busy#vllm#{n}", "vllm", "http://x", "k", 8, "0.32.0", None, dialect)
            for n in range(2)
        )
        self._random = random.Random(1)
        self._traffic = Traffic()
        self._began = time.time() - _PAST_S
        self._second = 0
        self._recorder = Recorder("busy", 0.0, self._began)
        self._report = Tally().report(0.0, headroom=0, grants_per_s=_NOTHING)
        self._recorder.take("one", replace(self._report, traffic=Traffic()), 20.0)
        why = "vllm 1 -> 2: priority needs 12 slots (8 running, 4 waiting up to 0.4 s)"
        change = {"vllm": PoolChange(1, 2, "priority")}
        self._recorder.decided([ScalingDecision(self._began + 60, why, change)])
        for _ in range(_PAST_S):
            self._pass()

    def news(self, life: str, number: int) -> ModelNews:
        """Let a second pass, and return what is new."""
        self._pass()
        return self._recorder.news(life, number)

    def _pass(self) -> None:
        self._second += 1
        for tier in Tier:
            for _ in range(self._random.randint(0, 2)):
                self._serve(tier, self._random.lognormvariate(0, 0.4) * _TTFT_S[tier])
        if self._second % 9 == 0:
            self._traffic.add(Outcome(Tier.FLEX, None, "shed", "queue_full"), None)
        now = 20.0 + self._second
        self._recorder.take("one", replace(self._report, traffic=Traffic.of([self._traffic])), now)
        held = {one.replica_id: (8, self._random.randint(5, 10)) for one in self._replicas}
        waiting = {Tier.PRIORITY: 0, Tier.DEFAULT: self._random.randint(2, 6), Tier.FLEX: 9}
        running = {Tier.PRIORITY: 4, Tier.DEFAULT: 8, Tier.FLEX: 2}
        oldest = {tier: 0.3 * count for tier, count in waiting.items()}
        demand = Demand("one", 1, 0.0, "life", 1, held, running, waiting, oldest, 0)
        snapshot = ModelSnapshot(BUSY, (), "acme", 0, _SETTINGS, self._replicas)
        board = ModelBoard(snapshot, (IngressBoard(demand, self._report),))
        self._recorder.record(
            board, {Tier.FLEX: Suspended(1, 2.0)}, now, self._began + self._second
        )

    def _serve(self, tier: Tier, ttft_s: float) -> None:
        served = Tier.DEFAULT if tier is Tier.PRIORITY and self._second % 50 == 0 else tier
        reason = None if served is tier else "no_replica_honours_priority"
        usage, cost = TokenUsage(300, 0, 120), Decimal("0.0001") * (3 - served.rank)
        if served is not Tier.FLEX:
            self._traffic.attain(served, met=ttft_s < 0.3)
        done = Served(True, ttft_s / 2, ttft_s, ttft_s + 2, usage, cost, False)
        self._traffic.add(Outcome(tier, served, "completed", reason), done)


class Models(ModelRegistry):
    """The busy model, one that is asleep, and one that is starting."""

    def __init__(self) -> None:
        super().__init__(None, discover_s=1)
        self._busy = BusyModel()
        sleeper = ModelSnapshot(
            ASLEEP, (), "acme", 0, ModelSettings(), (), sleep=Sleep((Tier.PRIORITY, Tier.DEFAULT))
        )
        self._asleep = Recorder("asleep", 0.0, time.time())
        self._asleep.record(ModelBoard(sleeper, ()), {}, 0.0, time.time())

        starts = {
            "a": PoolStart("loading weights 40 %", time.time() - 12, 31.0, "vllm"),
            "b": PoolStart("compiling", time.time() - 4, 31.0, "vllm"),
        }
        starter = ModelSnapshot(STARTING, (), "acme", 0, ModelSettings(), (), starts=starts)
        self._starting = Recorder("starting", 0.0, time.time())
        self._starting.record(ModelBoard(starter, ()), {}, 0.0, time.time())

    async def news(self, seen: Any) -> Any:
        return {
            "busy": self._busy.news(*seen.get("busy", ("", 0))),
            "asleep": self._asleep.news(*seen.get("asleep", ("", 0))),
            "starting": self._starting.news(*seen.get("starting", ("", 0))),
        }


class Keys:
    """The keys of an operator and of a tenant."""

    def __init__(self) -> None:
        self.texts, self._keys = {}, []
        for tenant, admin in (("ops", True), ("acme", False)):
            limits = KeyLimits(rpm=600)
            key, text = create_key(tenant, admin=admin, limits=limits, created=datetime.now(UTC))
            self.texts[tenant] = text
            self._keys.append(key)

    def table(self) -> KeyTable:
        return KeyTable.of(self._keys)


class Books:
    """Limits of which nothing is used."""

    def __init__(self) -> None:
        self._books = LimitBooks()

    async def answer(self, asks: Any) -> Any:
        return self._books.answer(asks, time.monotonic())


@contextmanager
def served(folder: Path, keys: Keys | None = None) -> Iterator[str]:
    """Serve the pages on loopback, with some usage, and yield their address."""
    url = make_url(f"sqlite:///{folder}/usage.db")
    _record(url)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        # Whoever comes before the server waits.
        listener.listen()
        server = _Site(url, keys)
        thread = threading.Thread(target=server.run, args=[listener])
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.stop()
            thread.join(30)


def _record(url: Any) -> None:
    engine = connect(url)
    store = RecordStore(engine)
    store.prepare()
    records = []
    for number in range(RECORDS):
        tier = tuple(Tier)[number % 3]
        served = Tier.DEFAULT if number % 6 == 0 else tier
        arrived = now_utc() - timedelta(hours=4 * number)
        for tenant in ("", "acme"):
            one = completed(
                tenant=tenant, model=BUSY, requested=tier, served=served, arrived=arrived
            )
            records.append(one.to_json())
    store.add(records)
    engine.dispose()


class _Site:
    """The server, with an event loop of its own."""

    def __init__(self, url: Any, keys: Keys | None) -> None:
        self._url, self._keys = url, keys
        self._server: uvicorn.Server | None = None
        self._stopping = threading.Event()

    def run(self, listener: socket.socket) -> None:
        asyncio.run(self._serve(listener))

    def stop(self) -> None:
        self._stopping.set()
        if self._server is not None:
            self._server.should_exit = self._server.force_exit = True

    async def _serve(self, listener: socket.socket) -> None:
        auth = "open" if self._keys is None else "keys"
        services = Services(Models(), None, IngressSettings(auth=auth))
        if self._keys is not None:
            services.access = Access("one", self._keys, Books())
            services.access.start()
        services.usage = UsageReader(self._url, UsageSettings(max_reads_per_tenant=2))
        services.ready.set()
        api = build_api(services, add_web_routes)
        config = uvicorn.Config(api, log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        # Signals are the test run's.
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        if not self._stopping.is_set():
            await self._server.serve(sockets=[listener])
        if services.access is not None:
            await services.access.stop()
        await asyncio.to_thread(services.usage.close)
