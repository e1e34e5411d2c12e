"""The ``Model`` actor: control plane of one model, and root of the model's Serve application.

It polls the status of every engine replica twice a second and publishes it as a ``ModelSnapshot``.
It shares out the slots of the replicas among the ingresses as credits. Every ingress calls
``renew`` for its credits and for a snapshot that has changed, and ``wait_for_wakeup`` to learn at
once that it should renew. Serve calls ``reconfigure`` with changed prices and tiers, and
``record_autoscaling_stats`` for its autoscaling policy; the CLI calls ``board``. It records the
model's recent past once a second (``app.history``), which ingresses fetch by ``news`` while
somebody looks at the board. No inference request passes through this actor.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from app import alarms, supervision
from app.config.model import ModelArgs, ModelSettings, PoolSettings
from app.contracts.adapters import AdapterPlan, adapters_note, plan_adapters, to_note
from app.contracts.credits import Demand, Renewal
from app.contracts.news import ModelNews
from app.contracts.start import PoolStart, StartFailure
from app.contracts.stats import ModelBoard, QueueReport
from app.contracts.status import ModelSnapshot, ReplicaStatus, Sleep, served_tiers
from app.core.names import MODEL_DEPLOYMENT
from app.core.settings import Key, Problem, SettingsError
from app.flow.allocation.allocator import LOOK_AFTER_S, Capacity, CreditAllocator
from app.flow.allocation.stats import ReportStore
from app.history.recorder import POINT_S, Recorder
from app.observe.exporter import Exporter, Sample
from app.ray_compat.notes import post, read_note, read_notes
from app.ray_compat.serve_port import keep_on_loopback
from app.scaling.decisions import DECISIONS_S, note_name, read_decisions
from app.scaling.demand import DemandBook
from deployments import replica
from deployments.control.placement import PlacementWatch
from deployments.control.pool_report import report_pool
from deployments.control.pool_starts import PoolStarts
from deployments.control.pool_state import PoolPhase, Standing, Wakings, standing
from deployments.control.telemetry import ReplicaCounts, model_samples
from deployments.control.wakeups import Wakeups
from deployments.engines.base import Launch
from deployments.engines.lora import LoraAdapter, LoraRoom
from deployments.engines.registry import adapter_named

logger = logging.getLogger("ray.serve")

STATUS_PERIOD_S = 0.5
"""Pause between two rounds of questions to a pool's replicas, in seconds."""
_STATUS_TIMEOUT_S = 5.0
# Shorter while no replica is known: there may be none that could answer.
_FIRST_TIMEOUT_S = 1.0
# How long one `wait_for_wakeup` call waits. It is short because a Model that stops waits for its
# calls to end.
_LISTEN_S = 2.0
# How often the notes about starts are read while there are any. A phase lasts for seconds.
_STARTS_S = 1.0


class Model:
    """The control plane of one model: replica status, credits, and demand for autoscaling.

    Args:
        args: the model's names and pools.
        pools: the handle of each pool's deployment, by the pool's name.
    """

    # Serve awaits it. Until it returns, this Model is starting and the previous one keeps running.
    async def __init__(  # type: ignore[misc]
        self, args: ModelArgs, pools: dict[str, DeploymentHandle[Any]]
    ) -> None:
        keep_on_loopback()
        self._args = args
        self._pools = pools
        self._settings = ModelSettings()
        self._adapters = AdapterPlan()
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._created = int(time.time())
        self._application = serve.get_replica_context().app_name
        self._replicas: dict[str, tuple[ReplicaStatus, ...]] = {}
        # Last known status of each pool; for pools without replicas, whether they are asleep,
        # waking or away.
        self._seen: dict[str, ReplicaStatus] = {}
        self._standings: dict[str, PoolPhase] = {}
        self._failures: dict[str, StartFailure] = {}
        self._starts = PoolStarts()
        self._wakings = Wakings()
        self._life = uuid.uuid4().hex
        self._changes = 0
        self._placement = PlacementWatch(self._application, self._without_replicas, self._publish)
        self._snapshot = self._make_snapshot()
        self._allocator = CreditAllocator(self._life, self._settings.queue, time.monotonic())
        self._reports = ReportStore()
        self._recorder = Recorder(self._life, time.monotonic(), time.time())
        self._demand = DemandBook()
        self._wakeups = Wakeups()
        self._probes: dict[str, asyncio.Task[None]] = {}
        # How many replicas that Serve runs were not ready at the last look, by pool.
        self._failing: dict[str, int] = {}
        self._counts = ReplicaCounts()
        # An ingress with a snapshot without replicas would refuse requests although some run.
        await asyncio.gather(*map(self._look, pools))
        self._watchers = [
            supervision.keep_running("pool watch", partial(self._watch, pool), about=pool)
            for pool in pools
        ]
        self._watchers += [
            supervision.keep_running("history", self._record, about=args.id),
            supervision.keep_running("scaling decisions", self._read_decisions, about=args.id),
            supervision.keep_running("starts", self._read_starts, about=args.id),
        ]
        exporter = Exporter(self._samples)
        self._watchers.append(supervision.keep_running("metrics", exporter.run))

    def _samples(self) -> Iterator[Sample]:
        replicas = {pool: self._replicas.get(pool, ()) for pool in self._pools}
        suspended = self._allocator.suspended(time.monotonic())
        return model_samples(self._args.id, replicas, self._counts, suspended)

    # Async, because Serve would call a plain method on a thread, concurrently with the event loop.
    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply changed prices, tiers and adapters. Requests already decided keep theirs.

        Raises:
            SettingsError: ``user_config`` has an unknown key or a bad value.
        """
        self._settings = ModelSettings.load(user_config, "user_config")
        if "rate_card" not in self._settings.model_fields_set:
            logger.warning("%s has no rate card, so requests to it cost nothing", self._args.id)
        self._allocator.configure(self._settings.queue)
        self._share_out_adapters()
        self._publish()

    def _share_out_adapters(self) -> None:
        """Work out which pool gets which adapters; ``_look`` has its replicas load them."""
        self._adapters = plan_adapters(self._args, self._settings.adapters)
        for problem in self._adapters.problems.values():
            alarms.PROCESS.raised("adapter not loaded", f"{self._args.id}: {problem}")
        for pool, wanted in self._adapters.by_pool.items():
            # For engines that start later: they load them before they count as ready.
            post(adapters_note(self._application, pool), to_note(wanted))

    async def renew(self, demand: Demand, report: QueueReport | None, known: str) -> Renewal:
        """Renew the credits of an ingress.

        Args:
            demand: what the ingress runs and queues, and the replicas that it suspects of hanging.
            report: the statistics of its queue, if it sends any this time.
            known: the version of the snapshot that it has.

        Returns:
            Its grant, and the snapshot if the version is no longer ``known``.
        """
        version = f"{self._life}.{self._changes}"
        now = time.monotonic()
        self._reports.take(demand, report, now)
        self._recorder.take(demand.ingress, report, now)
        for replica_id, route in demand.suspects.items():
            self._probe(replica_id, route)
        self._wakeups.renewed(demand.ingress)
        grant = self._allocator.renew(demand, now)
        self._nudge()
        asyncio.get_running_loop().call_later(LOOK_AFTER_S, self._nudge)
        return Renewal(version, None if version == known else self._snapshot, grant)

    async def wait_for_wakeup(self, ingress: str) -> bool:
        """Return ``True`` as soon as an ingress should renew, ``False`` after two seconds.

        An idle ingress renews once a second. That is too slow in two cases: it holds slots that
        waiting priority requests at another ingress could use, or replicas have come or gone.
        """
        return await self._wakeups.wait(ingress, _LISTEN_S)

    def _nudge(self) -> None:
        now = time.monotonic()
        for ingress in self._allocator.wakeups(now):
            self._wakeups.wake(ingress, now)

    async def board(self) -> ModelBoard:
        """Return the model and its queue at every ingress, for display by the CLI."""
        # Made anew: counts that change by themselves are sent to no ingress.
        return ModelBoard(
            self._make_snapshot(),
            self._reports.ingresses(time.monotonic()),
            self._recorder.slo(self._settings.slo),
            self._recorder.downgrades(),
        )

    async def news(self, life: str, number: int) -> ModelNews:
        """Return the model as it is now, and its history after a point, for the board."""
        return self._recorder.news(life, number)

    async def _record(self) -> None:
        while True:
            now = time.monotonic()
            board = ModelBoard(self._snapshot, self._reports.ingresses(now))
            self._recorder.record(board, self._allocator.suspended(now), now, time.time())
            await asyncio.sleep(POINT_S)

    async def _read_decisions(self) -> None:
        name = note_name(self._application)
        while True:
            note = await asyncio.to_thread(read_note, name)
            self._recorder.decided(read_decisions(note))
            await asyncio.sleep(DECISIONS_S)

    async def _read_starts(self) -> None:
        prefix = PoolStart.note_prefix(self._application)
        while True:
            awaited = any(
                self._standings[pool] is not PoolPhase.ASLEEP for pool in self._without_replicas()
            )
            if self._starts.due(time.monotonic(), awaited=awaited):
                notes = await asyncio.to_thread(read_notes, prefix)
                for name in self._starts.take(notes, time.monotonic()):
                    post(name, None)
                self._publish()
            await asyncio.sleep(_STARTS_S)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the demand by tier and the pools; Serve passes it on to ``app.autoscaling``.

        Empty while no ingress is known, because the demand is unknown then.
        """
        ingresses = self._reports.ingresses(time.monotonic())
        if not ingresses:
            return {}
        settings = self._settings
        pools = {
            pool.name: report_pool(
                pool,
                settings.tiers.priority,
                self._replicas.get(pool.name) or (),
                self._seen.get(pool.name),
            )
            for pool in self._args.pools
        }
        report = self._demand.report(
            ingresses,
            pools,
            settings.queue.headroom_share(preempts=self._snapshot.preempts),
            settings.scaling,
            self._allocator.suspended(time.monotonic()),
        )
        return report.to_metrics()

    def _publish(self) -> None:
        snapshot = self._make_snapshot()
        if snapshot != self._snapshot:
            self._snapshot = snapshot
            self._changes += 1
            self._allocator.set_replicas(
                _capacity(snapshot, status) for status in snapshot.replicas
            )
            now = time.monotonic()
            for demand in self._allocator.demands(now):
                self._wakeups.wake(demand.ingress, now)

    def _make_snapshot(self) -> ModelSnapshot:
        return ModelSnapshot(
            id=self._args.id,
            aliases=self._args.aliases,
            owned_by=self._args.owned_by,
            created=self._created,
            settings=self._settings,
            replicas=tuple(r for pool in self._pools for r in self._replicas.get(pool, ())),
            sleep=self._sleep_state(),
            pools=tuple(self._pools),
            missing=self._placement.missing,
            failed=dict(self._failures),
            starts=self._starts.current(time.monotonic()),
            adapters=self._args.adapters + self._adapters.names,
        )

    def _sleep_state(self) -> Sleep | None:
        """Return the sleep state; ``None`` if a pool has replicas, or no pool sleeps or wakes."""
        # An engine that fails to start wakes nobody up.
        standings = [one for pool, one in self._standings.items() if pool not in self._failures]
        if any(self._replicas.values()) or all(one is PoolPhase.AWAY for one in standings):
            return None
        native = not self._seen or any(s.dialect.native_priority for s in self._seen.values())
        return Sleep(
            tiers=served_tiers(self._settings.tiers, native=native),
            waking=PoolPhase.WAKING in standings,
            start_s=min(map(self._wakes_s, self._seen), default=None),
        )

    def _wakes_s(self, pool: str) -> float:
        """Return how long a pool took to wake the last time, in seconds."""
        return max(self._seen[pool].start_s, self._wakings.took_s(pool))

    def _without_replicas(self) -> list[str]:
        return [pool for pool in self._pools if not self._replicas.get(pool)]

    async def _watch(self, pool: str) -> None:
        while True:
            await asyncio.sleep(STATUS_PERIOD_S)
            await self._look(pool)

    async def _look(self, pool: str) -> None:
        replicas = await self._ask(pool)
        now = PoolPhase.AWAY
        if replicas is None:
            # A Model that has just started may not know yet which replicas run. No request is
            # refused for that: the pool counts as waking.
            before = self._standings.get(pool, PoolPhase.WAKING)
            found = await standing(self._application, pool, before)
            now = found.phase
            self._note_failure(pool, found)
        elif replicas:
            self._seen[pool] = max(replicas, key=lambda status: status.start_s)
            self._failures.pop(pool, None)
        self._wakings.note(pool, None if replicas else now, time.monotonic())
        self._replicas[pool], self._standings[pool] = replicas or (), now
        ready = frozenset(one.replica_id for one in replicas or ())
        self._counts.look(pool, ready, self._failing.get(pool, 0))
        self._publish()
        self._have_adapters_loaded(pool)

    def _have_adapters_loaded(self, pool: str) -> None:
        """Have a pool's replicas load what they are to load, if one of them is to load others."""
        wanted = self._adapters.by_pool.get(pool)
        if wanted is None or pool in self._loads:
            return
        if all(tuple(s.wanted for s in r.adapters) == wanted for r in self._replicas[pool]):
            return
        ask = partial(_broadcast, self._pools[pool], "load_adapters", wanted)
        task = self._loads[pool] = supervision.run_once("adapters", ask, about=pool)
        task.add_done_callback(lambda _: self._loads.pop(pool))

    def _note_failure(self, pool: str, found: Standing) -> None:
        """Keep the failure of a pool's last start until it has a replica, sleeps or is changed.

        Serve tries again by itself, and meanwhile may say something else about the pool.
        """
        if found.failure is not None:
            self._failures[pool] = found.failure
        elif found.phase is PoolPhase.ASLEEP or not found.told:
            self._failures.pop(pool, None)

    def _probe(self, replica_id: str, route: str) -> None:
        """Have a replica probe whether its engine hangs, unless a probe of it is under way."""
        if replica_id in self._probes:
            return
        for status in self._snapshot.replicas:
            if status.replica_id == replica_id:
                pool = self._pools[status.pool]
                ask = partial(_broadcast, pool, "probe", replica_id, route)
                task = supervision.run_once("engine probe", ask, about=replica_id)
                task.add_done_callback(lambda _: self._probes.pop(replica_id))
                self._probes[replica_id] = task

    async def _ask(self, pool: str) -> tuple[ReplicaStatus, ...] | None:
        """Return the replicas that are ready; ``None`` if Serve runs none."""
        known = self._replicas.get(pool)
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S if known else _FIRST_TIMEOUT_S):
                response = self._pools[pool].broadcast("status")
                answers = await response.results_async(return_exceptions=True)
        except DeploymentUnavailableError:
            return None
        except TimeoutError:
            # One replica hangs, and Serve will replace it: keep the last known status of all. Or
            # there has never been a replica.
            return known or None
        except (RayError, RayServeException) as error:
            supervision.PROCESS.failed("pool status", error, about=pool)
            return ()
        ready = [answer for answer in answers if isinstance(answer, ReplicaStatus)]
        self._failing[pool] = len(answers) - len(ready)
        return tuple(sorted(ready, key=lambda status: status.replica_id))

    async def __del__(self) -> None:
        await self._placement.stop()
        await supervision.stop(*self._watchers, *self._probes.values(), *self._loads.values())


async def _broadcast(pool: DeploymentHandle[Any], method: str, *given: Any) -> None:
    """Call all replicas of a pool. What it has done shows in their status."""
    try:
        await pool.broadcast(method, *given).results_async(return_exceptions=True)
    except (RayError, RayServeException) as error:
        logger.info("%s did not reach the replicas: %s", method, type(error).__name__)


_deployment = serve.deployment(
    name=MODEL_DEPLOYMENT,
    # It serves a few small calls a second from each ingress, and computes next to nothing.
    ray_actor_options={"num_cpus": 0},
    max_ongoing_requests=10_000,
    # There is always exactly one. It has an autoscaling configuration because Serve collects
    # metrics only from autoscaled deployments; here every second, keeping only the latest.
    autoscaling_config={
        "min_replicas": 1,
        "max_replicas": 1,
        "metrics_interval_s": 1.0,
        "look_back_period_s": 5.0,
    },
    # While it is down no credits move. Serve notices a dead replica only at a health check.
    health_check_period_s=2.0,
    # In an update the new Model knows its replicas before the old one stops.
    max_surge_percent=100,
)(Model)


def build(args: dict[str, Any]) -> serve.Application:
    """Return a model's application. Serve config files name this function as ``import_path``.

    Args:
        args: the fields of ``ModelArgs``.

    Raises:
        SettingsError: ``args`` has an unknown key or a bad value; each is named.
    """
    settings = ModelArgs.load(args, "args")
    for index, pool in enumerate(settings.pools):
        _check_pool(("args", "pools", index), pool)
    pools = {
        pool.name: replica.deployment.options(name=pool.name).bind(settings.id, pool)
        for pool in settings.pools
    }
    return _deployment.bind(settings, pools)


def _capacity(snapshot: ModelSnapshot, status: ReplicaStatus) -> Capacity:
    mode = snapshot.settings.tiers.priority
    honours = mode.delivers(honoured=status.dialect.native_priority)
    return Capacity(status.replica_id, status.pool, status.slots, honours, status.preempts)


def _check_pool(where: Key, pool: PoolSettings) -> None:
    """Reject an engine or engine argument now that would fail only when a replica starts."""
    launch = Launch(
        model=pool.model,
        served_name="",
        host="",
        port=0,
        slots=pool.most_slots,
        key="",
        python="",
        engine_args=pool.engine_args,
        loras=tuple(LoraAdapter(one.name, one.path) for one in pool.adapters),
        lora_room=LoraRoom(pool.adapter_room, pool.adapter_rank),
    )
    try:
        adapter = adapter_named(pool.engine)
        if pool.nodes > 1 and not adapter.spans_nodes:
            raise SettingsError(Problem(("nodes",), f"{pool.engine} runs on one node only"))
        if pool.adapters and not adapter.loads_lora:
            raise SettingsError(Problem(("adapters",), f"{pool.engine} loads no LoRA adapters"))
        if pool.adapter_room and not adapter.swaps_lora:
            told = f"{pool.engine} loads no LoRA adapters while it runs"
            raise SettingsError(Problem(("adapter_room",), told))
        adapter.command(launch)
        if taken := sorted(adapter.reserved_environment & pool.environment.keys()):
            told = "Frontline sets this itself"
            raise SettingsError(*(Problem(("environment", name), told) for name in taken))
    except SettingsError as error:
        problems = (Problem((*where, *p.key), p.message) for p in error.problems)
        raise SettingsError(*problems) from None
