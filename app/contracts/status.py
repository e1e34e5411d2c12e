"""The status of a model and of its engine replicas at one moment, as plain values.

``EngineReplica`` creates ``ReplicaStatus`` and ``Model`` creates ``ModelSnapshot``. Ingresses read
both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from app.config.model import ModelSettings, TierSettings
from app.contracts.adapters import AdapterState
from app.contracts.grown import set_grown_state
from app.contracts.start import PoolStart, StartFailure
from app.core.dialect import AUDIO_ROUTES, Dialect, Route
from app.core.tiers import Tier


@dataclass(frozen=True, slots=True)
class Preempted:
    """What an engine reports of the requests that it has suspended since it started.

    Attributes:
        preemptions: how often it has suspended one.
        suspended: how many are suspended now.
        suspended_s: for how long, all together, in seconds.
    """

    preemptions: int
    suspended: int
    suspended_s: float


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One engine replica that is ready to serve.

    Attributes:
        replica_id: the replica's name, never reused after a restart.
        pool: the pool that it belongs to.
        base_url: the URL of the engine's own server, without a trailing slash.
        key: the secret that the engine requires as a bearer token. Never shown.
        slots: how many requests it runs at once.
        engine_version: the version that the engine reports.
        context_length: longest prompt and answer together, in tokens; ``None``: unknown.
        dialect: the engine's HTTP dialect.
        weight: the weight of its pool, which sets its share of the load.
        start_s: how long it took from its start until its engine was ready, in seconds.
        preempted: what its engine reported last of suspended requests; ``None`` if it reports
            nothing. A status that differs in this alone is equal: it is sent to no ingress.
        adapters: the LoRA adapters that its engine is to load while it runs, and whether it has.
    """

    replica_id: str
    pool: str
    base_url: str
    key: str
    slots: int
    engine_version: str
    context_length: int | None
    dialect: Dialect
    weight: float = 1.0
    start_s: float = 0.0
    preempted: Preempted | None = field(default=None, compare=False)
    adapters: tuple[AdapterState, ...] = ()

    __setstate__ = set_grown_state

    def honours_priority(self, route: Route) -> bool:
        """Whether the engine has native priority in force on this route."""
        return route in self.dialect.priority_routes

    @property
    def preempts(self) -> bool:
        """Whether a waiting request takes the slot of a running one of a lower tier here."""
        return self.dialect.preempts

    def __repr__(self) -> str:
        # The key stays out of logs and traces.
        return f"<ReplicaStatus {self.replica_id} of {self.pool}>"


class Availability(StrEnum):
    """Whether a model can be served now."""

    READY = "ready"
    ASLEEP = "asleep"
    """It has no replica because it had no requests; the first request wakes it."""
    STARTING = "starting"
    FAILED = "failed"
    """Its engines have failed to start. Serve may try again."""
    NOT_OFFERED = "engine_not_offered"
    """No node of the cluster offers what its engines require, and none is expected."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """A model without replicas because it had no requests. A waiting request wakes it.

    Attributes:
        tiers: the tiers at which it will serve, as far as is known.
        waking: whether an engine is starting.
        start_s: how long the last start took, in seconds; ``None`` if unknown.
    """

    tiers: tuple[Tier, ...]
    waking: bool = False
    start_s: float | None = None


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """A model as it is served now.

    Attributes:
        id: the model's name.
        aliases: other names that requests may use.
        owned_by: for the models list.
        created: when the model's application was started, in Unix seconds.
        settings: rate card and tiers in force.
        replicas: the engine replicas that are ready.
        sleep: set if it has no replicas because it sleeps or wakes; ``None`` if its engines are
            being deployed or have failed.
        pools: the names of its pools.
        missing: by pool, the resources that a replica requires and no node offers, in words.
        failed: by pool without replicas, why its last start failed. It names paths, so clients see
            only ``failure_reason``.
        starts: by replica, what each engine that is starting does.
        adapters: the names of its LoRA adapters, which requests may use like a model's.
    """

    id: str
    aliases: tuple[str, ...]
    owned_by: str
    created: int
    settings: ModelSettings
    replicas: tuple[ReplicaStatus, ...]
    sleep: Sleep | None = None
    pools: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, StartFailure] = field(default_factory=dict)
    starts: Mapping[str, PoolStart] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()

    __setstate__ = set_grown_state

    @property
    def state(self) -> Availability:
        """Whether it can be served now."""
        if self.replicas:
            return Availability.READY
        if self.pools and all(pool in self.missing for pool in self.pools):
            return Availability.NOT_OFFERED
        if self.sleep is not None:
            return Availability.STARTING if self.sleep.waking else Availability.ASLEEP
        if self.failed and all(pool in self.missing or pool in self.failed for pool in self.pools):
            return Availability.FAILED
        return Availability.STARTING

    @property
    def failure_reason(self) -> str | None:
        """Why its engines have failed to start, without paths; ``None`` if they have not."""
        if self.state is not Availability.FAILED:
            return None
        return "; ".join(dict.fromkeys(failure.reason for failure in self.failed.values()))

    @property
    def start_phases(self) -> str:
        """What its engines that are starting do, in words; empty if that is unknown."""
        return "; ".join(
            dict.fromkeys(start.phase for start in self.starts.values() if start.phase)
        )

    @property
    def service_tiers(self) -> tuple[Tier, ...]:
        """The tiers at which a request could be served now.

        While the model sleeps, those that it will serve. Otherwise none until a replica is ready.
        """
        if not self.replicas:
            return self.sleep.tiers if self.sleep is not None else ()
        native = any(replica.dialect.native_priority for replica in self.replicas)
        return served_tiers(self.settings.tiers, native=native)

    @property
    def preempts(self) -> bool:
        """Whether every replica that a priority request could use preempts; false without one."""
        honouring = [one.dialect for one in self.replicas if one.dialect.native_priority]
        return bool(honouring) and all(dialect.preempts for dialect in honouring)

    @property
    def pools_to_come(self) -> frozenset[str]:
        """The pools that have no ready replica now and may have one later."""
        ready = {replica.pool for replica in self.replicas}
        return frozenset(self.pools) - ready - self.missing.keys() - self.failed.keys()

    @property
    def routes(self) -> tuple[Route, ...]:
        """The routes that some ready engine has."""
        return self.routes_of("")

    def routes_of(self, adapter: str) -> tuple[Route, ...]:
        """Return the routes on which some ready engine has an adapter; empty: that it has."""
        dialects = [one.dialect for one in self.replicas]
        return tuple(
            route
            for route in Route
            if any(one.serves(route, adapter) for one in dialects)
            and self.has_prices_for(route, adapter)
        )

    def has_prices_for(self, route: Route, adapter: str) -> bool:
        """Return whether the rate card of an adapter, or of the model, says what a route costs.

        Recordings are billed by the second. Without a price of a second they would be free.
        """
        return route not in AUDIO_ROUTES or self.settings.rate_card_of(adapter).prices_audio

    def adapter(self, name: str) -> str:
        """Return the adapter that a name stands for; empty if it stands for the model itself."""
        return name if name in self.adapters else ""

    def awaits_adapter(self, name: str) -> bool:
        """Return whether engines that run are to load an adapter, and none has so far."""
        is_later = any(one.name == name for one in self.settings.adapters)
        return is_later and not any(name in one.dialect.adapters for one in self.replicas)

    def named(self, name: str) -> str:
        """Return the id that a name stands for: an adapter's own, or else the model's."""
        return self.adapter(name) or self.id

    @property
    def context_length(self) -> int | None:
        """The shortest context of its replicas, in tokens, which all of them accept."""
        lengths = [replica.context_length for replica in self.replicas]
        return min((length for length in lengths if length is not None), default=None)

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that serve it now, by name."""
        return tuple(sorted({replica.dialect.engine for replica in self.replicas}))


def served_tiers(tiers: TierSettings, *, native: bool) -> tuple[Tier, ...]:
    """Return the tiers served, given the tiers offered and whether native priority is in force."""
    delivered = tiers.priority.delivers(honoured=native)
    offered = (tier for tier in Tier if tiers.offer.offers(tier))
    return tuple(tier for tier in offered if delivered or tier is not Tier.PRIORITY)
