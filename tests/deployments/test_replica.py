"""A replica whose start fails at any step leaves nothing behind, and ends without an error."""

import socket
from types import SimpleNamespace

import pytest
from ray import serve

from app.config.model import MOST_AUTO_SLOTS, PoolSettings
from deployments import replica
from deployments.engines.base import NodeSpan
from deployments.engines.simulated import Simulated
from deployments.hosting.launch import start_engine
from deployments.hosting.ports import reserve_port
from deployments.replica import EngineFailedToStart, EngineReplica, LocalEngine

pytestmark = pytest.mark.unit

POOL = PoolSettings.load({"name": "pool", "engine": "simulated", "model": "m", "slots": 2}, "pool")
STEPS = (
    "keep_on_loopback", "adapter_named", "reserve_port", "lead", "make_launch", "sweep_orphans",
    "start_engine", "until_ready", "start_guard", "make_status",
)  # fmt: skip


# private: the fixture below replaces it
UNTIL_READY = EngineReplica._until_ready  # noqa: SLF001
START_ENGINE = start_engine


class Replica(EngineReplica):
    """Serve awaits ``__del__``; the garbage collector cannot."""

    def __del__(self):
        pass


class Part:
    """A process, a guard, or a port, that knows whether it has been stopped."""

    def __init__(self):
        self.stopped = 0
        self.log_path, self.alive = "/logs/engine.log", True

    async def stop(self, grace_s=None):
        self.stopped += 1

    def close(self):
        self.stopped += 1

    def tail(self, lines=None):
        return ""


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """What a start makes; the fixture stands in for everything outside the replica."""
    made = SimpleNamespace(process=Part(), guard=Part(), meeting=Part(), ports=[])

    def reserve(host):
        made.ports.append(reserve_port(host))
        return made.ports[-1]

    async def start_engine(adapter, launch, pool):
        return made.process

    async def start_guard(launch, pool):
        return made.guard

    async def examine(self):
        pass

    async def until_ready(self):
        return SimpleNamespace(
            version="1", context_length=None, dialect=None, kv_tokens=None, most_running=None
        )

    monkeypatch.setattr(replica, "replica_log", lambda kind: tmp_path / f"{kind}.log")
    monkeypatch.setattr(replica, "start_note", lambda: "")
    monkeypatch.setattr(replica, "log_folder", lambda: tmp_path)
    monkeypatch.setattr(replica, "node_address", lambda: "127.0.0.1")
    monkeypatch.setattr(replica, "keep_on_loopback", lambda: None)
    monkeypatch.setattr(replica, "sweep_orphans", lambda: None)
    # private: it asks Ray which GPUs the replica has, and Ray would start a cluster here
    monkeypatch.setattr(EngineReplica, "_examine", examine)
    monkeypatch.setattr(replica, "reserve_port", reserve)
    monkeypatch.setattr(replica, "lead", lambda pool: (NodeSpan(), made.meeting))
    monkeypatch.setattr(replica, "start_engine", start_engine)
    # private: a guard is a process of HAProxy, which its own tests start
    monkeypatch.setattr(replica, "_start_guard", start_guard)
    # private: there is no engine that could become ready
    monkeypatch.setattr(EngineReplica, "_until_ready", until_ready)
    return made


@pytest.mark.parametrize("step", STEPS)
async def test_a_start_that_fails_at_any_step_leaves_nothing(parts, monkeypatch, step):
    """028cc55: `__del__` raised an AttributeError, and what had been started was not stopped."""

    def fail(*given, **named):
        raise OSError(f"{step} is out of order")

    if step in ("until_ready", "make_status"):
        monkeypatch.setattr(EngineReplica, f"_{step}", fail)
    else:
        monkeypatch.setattr(replica, {"start_guard": "_start_guard"}.get(step, step), fail)
    it = Replica.__new__(Replica)
    with pytest.raises(EngineFailedToStart) as caught:
        await EngineReplica.__init__(it, "m", POOL)
    assert f"{step} is out of order" in str(caught.value)
    await EngineReplica.__del__(it)
    at = STEPS.index(step)
    assert (parts.meeting.stopped > 0) is (at > STEPS.index("lead"))
    assert (parts.process.stopped > 0) is (at > STEPS.index("start_engine"))
    assert (parts.guard.stopped > 0) is (at > STEPS.index("start_guard"))
    for port in parts.ports:
        # Nobody else could bind to it while it is reserved.
        with socket.socket() as listener:
            listener.bind((port.host, port.port))


@pytest.mark.parametrize(
    ("kv_tokens", "estimate", "slots", "obeys"),
    [
        (5 * 2048 + 7, None, 5, True),
        (5 * 2048 + 7, None, 5, False),
        (10**9, None, MOST_AUTO_SLOTS, True),
        (None, 3, 3, True),
        (None, None, 8, True),
    ],
)
async def test_slots_auto_is_what_fits_and_the_engine_runs_no_more(
    parts, monkeypatch, caplog, kv_tokens, estimate, slots, obeys
):
    """A real simulated engine, started for the most."""

    async def refuse(self, launch, http, slots):
        return False

    if not obeys:
        monkeypatch.setattr(Simulated, "limit", refuse)
    pool = PoolSettings.load(
        {
            "name": "pool", "engine": "simulated", "model": "m", "slots": "auto",
            "engine_args": {"kv_tokens": kv_tokens, "first_token_seconds": 60},
        },
        "pool",
    )  # fmt: skip

    async def examine(self):
        self._estimate = estimate

    async def no_guard(launch, pool):
        return None

    class NoMetrics:
        def __init__(self, *given):
            pass

        def start(self):
            pass

        async def stop(self):
            pass

    # private: as in the fixture; the engine is a real one here
    monkeypatch.setattr(EngineReplica, "_examine", examine)
    # private: as above
    monkeypatch.setattr(EngineReplica, "_until_ready", UNTIL_READY)
    # private: as above
    monkeypatch.setattr(replica, "_start_guard", no_guard)
    monkeypatch.setattr(replica, "lead", lambda pool: (NodeSpan(), None))
    monkeypatch.setattr(replica, "start_engine", START_ENGINE)
    monkeypatch.setattr(replica, "ReplicaTelemetry", NoMetrics)
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"), app_name="a")
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    it = Replica.__new__(Replica)
    await EngineReplica.__init__(it, "m", pool)
    try:
        status = await it.status()
        assert status is not None and status.slots == slots
        engine = LocalEngine(status.base_url, status.key)
        _, report = await engine.get_json("/simulate")
        runs = slots if obeys else MOST_AUTO_SLOTS
        assert report["slots"] == report["settings"]["slots"] == runs
        assert ("was not held to 5 requests at once" in caplog.text) is not obeys
    finally:
        await EngineReplica.__del__(it)
