"""The ``EngineReplica`` actor: owns one engine process and its OpenAI server.

Serve creates one actor per replica of a pool. The actor starts the engine as a child process, on
several nodes if the pool says so, and counts as started only once the engine is ready. Serve calls
``check_health`` every second and replaces the replica after three failures in a row. The model's
``Model`` actor calls ``status`` twice a second, and ``probe`` when an ingress suspects that the
engine hangs. Inference requests never pass through this actor: ingresses send them to the engine
over HTTP, through the guard where there is one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

import orjson
import ray
from ray import serve
from ray.exceptions import RayError

from app import alarms, supervision
from app.config.ingress import LONGEST_STOP_S
from app.config.model import PoolSettings
from app.contracts.adapters import WantedAdapter, adapters_note, read_wanted
from app.contracts.findings import Examination, Finding, Level
from app.contracts.launch import LaunchPlan
from app.contracts.start import PoolStart, StartFailure
from app.contracts.status import ReplicaStatus
from app.core.dialect import Route
from app.protocol.json_body.spliced import Spliced
from app.ray_compat.notes import post, read_note
from app.ray_compat.serve_logs import replica_log
from app.ray_compat.serve_port import keep_on_loopback
from app.upstream.http1 import ConnectionLost
from app.upstream.pool import fetch
from deployments.engines.base import NO_HEADERS, EngineFacts, Launch, silent_recording
from deployments.engines.lora import model_names
from deployments.engines.registry import adapter_named
from deployments.hosting.adapters import AdapterKeeper
from deployments.hosting.drain import count_connections
from deployments.hosting.guard import LOOPBACK, EngineGuard, GuardFailed, needs_guard
from deployments.hosting.launch import (
    examine_launch,
    fitted,
    log_folder,
    log_name,
    make_launch,
    plan_launch,
    start_engine,
)
from deployments.hosting.multinode import OtherRanks, RankEnded, lead, node_address
from deployments.hosting.ports import reserve_port
from deployments.hosting.preemption_watch import PreemptionWatch
from deployments.hosting.probe import HangProbe, probe_request, probe_route
from deployments.hosting.start_failure import EngineEnded, EngineNotReady, explain
from deployments.hosting.start_report import StartReporter
from deployments.hosting.telemetry import ReplicaTelemetry
from deployments.preflight.gather import examine_pool
from deployments.preflight.slots import size
from deployments.process.supervisor import EngineProcess, sweep_orphans

logger = logging.getLogger("ray.serve")

_READY_POLL_S: Final = 0.2
_PHASE_PERIOD_S: Final = 1.0
_PHASE_LINES: Final = 100
_EXPLAINED_LINES: Final = 300
"""Lines of a log in which the cause of a failed start is looked for: vLLM writes a traceback of
each of its processes, and the cause is in the first one."""
_DRAIN_POLL_S: Final = 0.5
_CHECKS_TO_FAIL: Final = 3
"""Serve replaces a replica after this many failed checks in a row. The number is Serve's own and
cannot be configured."""


class EngineFailedToStart(RuntimeError):
    """An engine failed to start. ``app.contracts.start`` finds the reason in the message."""


class EngineUnhealthy(RuntimeError):
    """A running engine has ended or does not answer. Serve replaces the replica."""


class LocalEngine:
    """HTTP client for the engine's own server on this machine, used to start and monitor it.

    Each request opens its own connection. A connection kept open would be counted as a client's
    when the replica drains.
    """

    def __init__(self, base_url: str, key: str) -> None:
        self._base_url = base_url
        self._key = key

    async def get_json(self, path: str, *, authorized: bool = True) -> tuple[int, Any]:
        """Return the status and the parsed body of a GET; see ``EngineHttp``."""
        return await self._request("GET", path, None, authorized)

    async def post_json(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        authorized: bool = True,
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> tuple[int, Any]:
        """Return the status and the parsed body of a POST; see ``EngineHttp``."""
        return await self._request("POST", path, orjson.dumps(body), authorized, headers)

    async def post_form(self, path: str, form: Spliced) -> tuple[int, Any]:
        """Return the status and the parsed body of a POST of a form; see ``EngineHttp``."""
        return await self._request("POST", path, form, True)

    async def get_text(self, path: str) -> tuple[int, str]:
        """Return the status and the text of a GET.

        Raises:
            ConnectionLost: the engine is gone, or did not answer.
        """
        status, answer = await fetch(self._base_url, "GET", path, key=self._key, json=None)
        return status, answer.decode(errors="replace")

    async def answers(self, path: str, timeout_s: float) -> bool:
        """Return whether a GET is answered with 200 within ``timeout_s`` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                status, _ = await self.get_json(path)
        except (ConnectionLost, TimeoutError):
            return False
        return status == 200

    async def _request(
        self,
        method: str,
        path: str,
        body: bytes | Spliced | None,
        authorized: bool,
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> tuple[int, Any]:
        key = self._key if authorized else None
        status, answer = await fetch(
            self._base_url, method, path, key=key, json=body, headers=headers
        )
        try:
            return status, orjson.loads(answer)
        except orjson.JSONDecodeError:
            return status, None


class EngineReplica:
    """Owns one engine process. The replica becomes ready, for Serve too, when the engine does.

    Args:
        model_id: the name that the engine serves the model under.
        pool: the settings of this replica's pool.
    """

    # Serve awaits it. Until it returns, the replica is starting.
    async def __init__(self, model_id: str, pool: PoolSettings) -> None:  # type: ignore[misc]
        # What has been started is stopped by ``__del__``, also if the start fails midway.
        self._started = AsyncExitStack()
        self._pool = pool
        self._findings: tuple[Finding, ...] = ()
        self._estimate: int | None = None
        name = log_name(model_id, pool)
        self._reporter = StartReporter(
            replica_log("start").with_suffix(".json"),
            log_folder() / f"{name}.usual_start_s",
            model_id,
            pool.name,
            partial(post, start_note()),
        )
        self._started.callback(self._reporter.stopped)
        try:
            await self._start(model_id, pool)
        except Exception as error:
            failure = self._explain(error)
            logger.error("%s", failure.report())
            await asyncio.to_thread(self._reporter.failed, failure)
            raise EngineFailedToStart(failure.to_text()) from error

    async def _start(self, model_id: str, pool: PoolSettings) -> None:
        began = time.monotonic()
        keep_on_loopback()
        self._failed_checks = 0
        self._phase_due = 0.0
        self._probe = HangProbe(pool.probe_timeout_s)
        self._adapter = adapter_named(pool.engine)
        self._port = reserve_port(LOOPBACK)
        self._started.callback(self._port.close)
        span, meeting_place = lead(pool)
        if meeting_place is not None:
            self._started.callback(meeting_place.close)
        self._launch = make_launch(
            model_id, pool, host=self._port.host, port=self._port.port, span=span
        )
        self._http = LocalEngine(self._launch.base_url, self._launch.key)
        await asyncio.to_thread(sweep_orphans)
        await self._examine()
        if not self._adapter.port_stays_reserved:
            self._port.close()
        self._ranks: OtherRanks | None = None
        self._guard: EngineGuard | None = None
        self._process = await start_engine(self._adapter, self._launch, pool)
        self._started.push_async_callback(self._stop_engine)
        await asyncio.to_thread(self._reporter.starting)
        try:
            if span.nodes > 1:
                self._ranks = await OtherRanks.start(
                    model_id, pool, self._launch.key, span, on_end=self._process.kill
                )
            self._facts = await self._until_ready()
            self._slots = await self._size()
            await self._load_adapters()
            self._guard = await _start_guard(self._launch, pool)
        except BaseException:
            await self._process.stop(0.0)
            if self._ranks is not None:
                await self._ranks.stop()
            raise
        took_s = time.monotonic() - began
        await asyncio.to_thread(self._reporter.ready, took_s)
        status = self._make_status(took_s)
        ask = partial(self._adapter.preemption, self._http)
        self._preemption = PreemptionWatch(status, ask)
        self._keeping = (
            supervision.keep_running("adapters", self._adapters.run, about=str(status))
            if pool.adapter_room
            else None
        )
        self._watching = (
            supervision.keep_running("preemption watch", self._preemption.run, about=str(status))
            if status.preempts
            else None
        )
        self._telemetry = ReplicaTelemetry(
            model_id, pool.name, self._http.get_text, *self._adapter.relayed(self._launch)
        )
        self._telemetry.start()
        self._started.push_async_callback(self._stop_serving)
        logger.info("%s is ready: %s", status, self._facts)

    async def _examine(self) -> None:
        """Look at this node first. The engine is started all the same: it has the last word."""
        assigned = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
        gpus = assigned.get("GPU", 0.0)
        try:
            found = await asyncio.to_thread(examine_pool, self._launch, self._pool, gpus)
        except Exception as error:
            alarms.PROCESS.raised("node not examined", "its engine is started all the same", error)
            found = Examination(())
        self._launch = fitted(self._launch, found)
        self._findings, self._estimate = found.findings, found.fits
        for finding in found.findings:
            self._log("before the start", finding)

    def _log(self, when: str, finding: Finding) -> None:
        level = logging.INFO if finding.level is Level.OK else logging.WARNING
        logger.log(level, "%s of pool %r: %s", when, self._pool.name, finding)

    @property
    def _status(self) -> ReplicaStatus:
        status, states = self._preemption.status, self._adapters.states
        if not states:
            return status
        adapters = status.dialect.adapters | self._adapters.serving
        dialect = replace(status.dialect, adapters=adapters)
        return replace(status, dialect=dialect, adapters=states)

    @staticmethod
    def plan(model_id: str, pool: PoolSettings) -> LaunchPlan:
        """Return what a replica would start, without starting it; see ``app.cli.plan``."""
        return plan_launch(model_id, pool)

    @staticmethod
    def examine(model_id: str, pool: PoolSettings, gpus: float) -> Examination:
        """Look at this machine as a replica does before its engine; see ``app.cli.preflight``."""
        return examine_launch(model_id, pool, gpus)

    async def status(self) -> ReplicaStatus | None:
        """Return the engine's status; ``None`` once it has ended, and while it may hang."""
        alive = self._process.alive and (self._guard is None or self._guard.alive)
        return self._status if alive and not self._probe.doubtful else None

    async def load_adapters(self, wanted: tuple[WantedAdapter, ...]) -> None:
        """Have the engine load these LoRA adapters, and unload those that it loaded before.

        Those that it was started with stay. Returns at once; ``status`` shows what has been done.
        """
        self._adapters.want(wanted)

    async def probe(self, replica_id: str, route: str) -> None:
        """Find out whether the engine hangs. Does nothing if ``replica_id`` is another replica's.

        The engine has accepted requests on this route and sent nothing to any of them for long.
        Its health route may still answer: vLLM's does while the GPU is stuck. So the probe requests
        a single token, ahead of all other requests. Any answer proves that the engine is alive.
        """
        if replica_id != self._status.replica_id:
            return
        probed = probe_route(Route(route))
        name = self._launch.served_name
        try:
            if probed.is_form:
                ask = partial(self._http.post_form, probed.path, silent_recording(name))
                hangs = await self._probe.run(ask)
            else:
                request = probe_request(name, probed, self._facts.dialect)
                hangs = await self._probe.run(partial(self._http.post_json, probed.path, request))
        except ConnectionLost:
            return  # the engine has ended: `status` and `check_health` see that by themselves
        if hangs:
            seconds = self._pool.probe_timeout_s
            logger.error("%s hangs: not one token within %s s", self._status, seconds)

    async def check_health(self) -> None:
        """Check the engine, its parts on other nodes, and its guard. Serve calls this.

        Raises:
            EngineUnhealthy: the engine has ended or hangs.
            RankEnded: a part of the engine on another node has ended or does not answer.
            GuardFailed: the engine's guard has ended or hangs.
        """
        self._failed_checks += 1
        if self._ranks is not None:
            await self._ranks.check_answers(self._pool.health_timeout_s)
        if not self._process.alive:
            raise EngineUnhealthy(f"the engine has ended; its last lines:\n{self._process.tail()}")
        if self._probe.hangs:
            raise EngineUnhealthy("the engine hangs: it takes requests and generates nothing")
        timeout_s = self._pool.health_timeout_s
        if not await self._http.answers(self._adapter.health_path, timeout_s):
            raise EngineUnhealthy(f"the engine did not answer within {timeout_s} s")
        if self._guard is not None:
            await self._guard.check(timeout_s)
        self._failed_checks = 0

    async def _until_ready(self) -> EngineFacts:
        deadline = time.monotonic() + self._pool.startup_timeout_s
        while not await self._http.answers(self._adapter.ready_path, self._pool.health_timeout_s):
            self._check_starting(deadline)
            await self._report_phase()
            await asyncio.sleep(_READY_POLL_S)
        return await self._adapter.inspect(self._launch, self._http)

    async def _size(self) -> int:
        """Return the replica's slots, and hold its engine to them where it was started for more."""
        sized = size(self._pool, self._facts, self._estimate)
        if sized.finding is not None:
            self._log("after the start", sized.finding)
        if sized.slots < self._launch.slots:
            limited = await self._adapter.limit(self._launch, self._http, sized.slots)
            if self._facts.dialect.preempts and not limited:
                # It still serves: a burst of priority may wait for memory, and not for a slot.
                logger.warning(
                    "the engine of pool %r was not held to %d requests at once",
                    self._pool.name,
                    sized.slots,
                )
        return sized.slots

    async def _load_adapters(self) -> None:
        """Load the adapters that are in force before requests come. One that fails stops nothing.

        The Model corrects what a note of an earlier deployment says.
        """
        adapter, http = self._adapter, self._http
        self._adapters = AdapterKeeper(
            partial(adapter.load_lora, self._launch, http),
            partial(adapter.unload_lora, self._launch, http),
            partial(_listed, http),
            f"the engine of pool {self._pool.name!r}",
        )
        if not self._pool.adapter_room:
            return
        name = adapters_note(serve.get_replica_context().app_name, self._pool.name)
        try:
            wanted = read_wanted(await asyncio.to_thread(read_note, name))
        except (RayError, ValueError) as error:
            supervision.PROCESS.failed("adapters", error, about=self._pool.name)
            return
        self._adapters.want(wanted)
        await self._adapters.settle()

    async def _report_phase(self) -> None:
        now = time.monotonic()
        if now < self._phase_due:
            return
        self._phase_due = now + _PHASE_PERIOD_S
        phase = self._adapter.start_phase(self._process.tail(_PHASE_LINES))
        await asyncio.to_thread(self._reporter.starting, phase or "")

    def _check_starting(self, deadline: float) -> None:
        if self._ranks is not None:
            self._ranks.check()
        if not self._process.alive:
            raise EngineEnded(self._process.returncode)
        if time.monotonic() > deadline:
            raise EngineNotReady(f"it was not ready after {self._pool.startup_timeout_s:g} s")

    def _explain(self, error: Exception) -> StartFailure:
        # It may have failed before there was one.
        process: EngineProcess | None = getattr(self, "_process", None)
        log, tail = "", ""
        if process is not None:
            log, tail = str(process.log_path), process.tail(_EXPLAINED_LINES)
        node = node_address()
        return explain(self._pool.name, error, tail, log=log, node=node, findings=self._findings)

    def _make_status(self, start_s: float) -> ReplicaStatus:
        return ReplicaStatus(
            replica_id=serve.get_replica_context().replica_id.unique_id,
            pool=self._pool.name,
            base_url=self._guard.base_url if self._guard else self._launch.base_url,
            key=self._launch.key,
            slots=self._slots,
            engine_version=self._facts.version,
            context_length=self._facts.context_length,
            dialect=self._facts.dialect,
            weight=self._pool.weight,
            start_s=start_s,
        )

    async def _drain(self) -> None:
        """Return when no connection to the engine is open, or the engine can serve none any more.

        Serve waits two seconds before it stops the replica. By then the Model no longer reports it,
        and no ingress places requests on it. If draining takes longer than Serve's
        ``graceful_shutdown_timeout_s``, Serve kills this actor, and the engine with it.
        """
        logged = -1
        while not (self._probe.hangs or self._failed_checks >= _CHECKS_TO_FAIL):
            connections = await asyncio.to_thread(count_connections, self._port.port)
            if not connections:
                return
            if connections != logged:
                logger.info("%s drains: %d connections", self._status, connections)
                logged = connections
            await asyncio.sleep(_DRAIN_POLL_S)
            with suppress(EngineUnhealthy, GuardFailed, RankEnded):
                await self.check_health()
        logger.warning("%s does not drain: its engine serves nobody any more", self._status)

    async def _stop_serving(self) -> None:
        await self._telemetry.stop()
        await self._drain()
        await supervision.stop(self._watching, self._keeping)

    async def _stop_engine(self) -> None:
        await self._process.stop()
        if self._ranks is not None:
            await self._ranks.stop()
        if self._guard is not None:
            await self._guard.stop()

    async def __del__(self) -> None:
        await self._started.aclose()


deployment = serve.deployment(
    name="EngineReplica",
    # Only control calls reach this actor; inference requests go to the engine over HTTP.
    max_ongoing_requests=1000,
    # Serve replaces a replica after three failures in a row: a dead engine is noticed in three
    # seconds.
    health_check_period_s=1.0,
    # The engine's streams may last as long as any request.
    graceful_shutdown_timeout_s=LONGEST_STOP_S,
    # A rolling update adds a quarter of the replicas, at least one, so that new replicas serve
    # before old ones stop.
    max_surge_percent=25,
)(EngineReplica)
"""The Serve deployment of a pool; ``options(name=...)`` sets it to the pool's name."""


async def _listed(http: LocalEngine) -> frozenset[str]:
    _, models = await http.get_json("/v1/models")
    return model_names(models)


def start_note() -> str:
    """Return the name of the note about the start of this replica."""
    context = serve.get_replica_context()
    return PoolStart.note_name(context.app_name, context.replica_id.unique_id)


async def _start_guard(launch: Launch, pool: PoolSettings) -> EngineGuard | None:
    address = node_address()
    if not needs_guard(address):
        return None
    name = log_name(launch.served_name, pool)
    return await EngineGuard.start(address, launch.port, launch.key, log_folder(), name=name)
