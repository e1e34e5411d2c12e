"""Every setting of Frontline, typed, validated and documented.

Serve's own settings (replica counts, resources, autoscaling, HTTP options) are set where Serve
wants them and are neither renamed nor repeated here.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from ipaddress import ip_address
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, StringConstraints, model_validator

from app.config.journal import JournalSettings
from app.config.queue import QueueSettings
from app.config.scaling import ScalingSettings
from app.config.usage_reads import UsageSettings
from app.core.pricing import RateCard
from app.core.settings import Problem, Settings, SettingsError
from app.core.tiers import PriorityMode, Tier, TierOffer
from app.gateway.cross_site import ANY_HOST, HOST_NAME, HostRule
from app.store.database_url import DEFAULT_URL, StoreUrl
from app.tenants.concurrency import FlightBounds

ModelId = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$", max_length=200)
]
HostName = Annotated[str, StringConstraints(pattern=HOST_NAME, max_length=253)]
PoolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=60)]

LONGEST_STOP_S = 3700.0
"""How long a replica that was told to stop may go on serving what it has begun. Longer than any
request: the config files let one take an hour (``request_timeout_s``)."""


class IngressSettings(Settings):
    """``user_config`` of the ``Ingress`` deployment. Changes need no restart."""

    auth: Literal["open", "keys"] = Field(
        default="open",
        description="Who may call: `open` lets everyone in who reaches the port, and is for one's "
        "own machine; `keys` asks for an API key (`frontline keys create`) on every route but "
        "`/health` and `/livez`.",
    )
    open_to_network: bool = Field(
        default=False,
        description="Says again that everybody may come in: without it `auth: open` is refused "
        "where Serve's `http_options.host` is not a loopback address, since whoever finds the "
        "port would be served.",
    )
    allowed_hosts: tuple[HostName, ...] | None = Field(
        default=None,
        description="Values of the `Host` header that are served beside `localhost` and loopback "
        "addresses, without ports; `*` allows every host. Others get 403, so that a web page "
        "whose name resolves to 127.0.0.1 (DNS rebinding) cannot use this ingress. If not set: "
        "none with `auth: open` on loopback. With `auth: keys` every host, since such a page has "
        "no key; with `open_to_network` every host too, since whoever reaches the port is served "
        "and the names it is reached by are not known.",
    )
    max_concurrent_per_key: int = Field(
        default=2000,
        gt=0,
        description="Requests of one API key that may be in flight at once, waiting or running; "
        "one more gets 429. Each ingress keeps to its part of it: the bound divided by the number "
        "of ingresses, at least 1. The default is for two clients of the OpenAI SDKs with as many "
        "connections as those open (1,000): it stops loops that never wait, and nobody else.",
    )
    max_concurrent_per_tenant: int = Field(
        default=8000,
        gt=0,
        description="The same for all keys of a tenant together: four keys at their bound.",
    )
    default_tier: Tier = Field(
        default=Tier.DEFAULT,
        description="The tier of requests without `service_tier`, or with `auto`.",
    )
    max_body_bytes: int = Field(
        default=64 * 1024 * 1024,
        gt=0,
        description="Longest request body; longer ones get 413. The default leaves room for "
        "several images in one prompt.",
    )
    body_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="Longest time in which the whole body of a request has to arrive; after it the "
        "client gets 408. Each `body_min_rate_kb` that has arrived adds a second, so that long "
        "bodies get their time. Half a minute is more than a short body takes on any network.",
    )
    body_min_rate_kb: int = Field(
        default=512,
        gt=0,
        description="KiB of a body that add a second to `body_timeout_s`. The default is an upload "
        "of 4 Mbit/s, which homes and phones have: a body of 64 MiB may take 158 s.",
    )
    body_memory_mb: int = Field(
        default=1088,
        gt=0,
        description="Most memory that the bodies of all requests may take in one ingress, in MiB, "
        "while they are read, wait and run; further requests get 503. The default is sixteen of "
        "the longest bodies, and some room for short ones. The first 4 KiB of each body count "
        "25-fold, because a body of that length stays parsed.",
    )
    body_memory_tenant_mb: int = Field(
        default=512,
        gt=0,
        description="Most of `body_memory_mb` that the bodies of one tenant may take, in MiB; its "
        "further requests get 503. The default is less than half, so that two tenants with large "
        "bodies leave room for others. It does not apply with `auth: open`, where there is only "
        "one tenant.",
    )
    engine_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="Longest wait for an answer that is not streamed; then the request is sent "
        "to another replica, once, or gets 503 if there is none. Ten minutes is what the OpenAI "
        "SDKs wait by default.",
    )
    stream_timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="Longest wait for the first or the next event of a stream. Before the first "
        "the request then goes to another replica, once, or gets 503 if there is none; after it "
        "the stream ends with an error. "
        "Where the replica sent nothing at all in that time, to anybody, it is asked for a single "
        "token, and replaced if it does not give one (`probe_timeout_s`). Two minutes is more than "
        "a long prompt takes; raise it where prompts take longer.",
    )
    slow_reader_s: float = Field(
        default=5.0,
        gt=0,
        description="How long a client may take nothing of its stream once 256 KiB wait for it, "
        "about a thousand tokens. Then the engine is stopped and the stream broken off, and billed "
        "to there, so that clients that do not read cannot hold slots. Five seconds bridge a "
        "network that hiccups. A stream whose engine has ended holds no slot, and waits for its "
        "client.",
    )
    catalog_interval_s: float = Field(
        default=2.0,
        gt=0,
        description="How often the ingress asks Serve which model applications there are.",
    )
    ledger: StoreUrl = Field(
        default=SecretStr(DEFAULT_URL),
        description="The database of usage records and keys: `sqlite:///PATH`, which all "
        "ingresses of one node share, or `postgresql://USER:PASSWORD@HOST/DATABASE` for a "
        "cluster. Environment variables are replaced on the ingress's node, so that a password "
        "need not stand here: `postgresql://frontline:${LEDGER_PASSWORD}@db/frontline`.",
    )
    journal: JournalSettings = Field(
        default=JournalSettings(),
        description="Where records are kept until the database has them; see below.",
    )
    usage: UsageSettings = Field(
        default=UsageSettings(), description="How much `GET /v1/usage` may read; see below."
    )

    @cached_property
    def host_rule(self) -> HostRule:
        """Which `Host` headers are served."""
        if self.allowed_hosts is not None:
            return HostRule.of(self.allowed_hosts)
        everywhere = self.auth == "keys" or self.open_to_network
        return HostRule.of([ANY_HOST] if everywhere else [])

    @cached_property
    def in_flight(self) -> FlightBounds:
        """How many requests may be in flight at once."""
        return FlightBounds(self.max_concurrent_per_key, self.max_concurrent_per_tenant)

    def check_open(self, host: str | None, *where: str | int) -> None:
        """Refuse to let everybody in from a network, unless that is said twice.

        Args:
            host: the address that Serve listens on; ``None`` for all of them.
            where: the place of these settings in what the problem is told about.

        Raises:
            SettingsError: ``auth`` is ``open``, and others than this machine can reach the port.
        """
        if self.auth != "open" or self.open_to_network or _is_loopback(host):
            return
        message = (
            "`open` would serve everybody who reaches this port from the network; set `keys`, or "
            "`open_to_network: true` as well"
        )
        raise SettingsError(Problem((*where, "auth"), message))


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ip_address(host or "::").is_loopback
    except ValueError:
        # A name may stand for any address.
        return False


class PoolSettings(Settings):
    """One pool of a model: the replicas of one engine deployment."""

    name: PoolName = Field(description="Name of the pool and of its Serve deployment.")
    engine: str = Field(
        description="The engine adapter: `vllm`, `sglang`, `tensorrt_llm` or `simulated`."
    )
    model: str = Field(
        description="Folder or name of the model that the engine loads. `~`, `${FRONTLINE_HOME}` "
        "and other environment variables are expanded on the replica's node."
    )
    slots: int = Field(
        default=8, gt=0, le=65536, description="Requests that one engine replica runs at once."
    )
    nodes: int = Field(
        default=1,
        gt=0,
        le=64,
        description="Nodes that one engine replica runs on, for tensor or pipeline parallelism "
        "larger than a node (vLLM, SGLang). With more than one, the pool's deployment needs "
        "`placement_group_bundles`, one for each node, and `placement_group_strategy: "
        "STRICT_SPREAD`.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        description="How much of the load the pool takes beside the model's other pools: with 2 "
        "its replicas count as half as busy as they are.",
    )
    cost_per_hour: float = Field(
        default=1.0,
        gt=0,
        description="What one replica costs an hour, in whatever currency. Autoscaling grows the "
        "pool whose slots are cheapest first; it is only compared with the model's other pools.",
    )
    python: str | None = Field(
        default=None,
        description="Interpreter of the engine's environment, expanded like `model`; the one "
        "that Ray's worker runs under if not set.",
    )
    engine_args: dict[str, Any] = Field(
        default={}, description="The engine's own arguments, by name, with underscores."
    )
    environment: dict[str, str] = Field(
        default={}, description="Environment variables for the engine process."
    )
    startup_timeout_s: float = Field(
        default=1800.0,
        gt=0,
        description="Longest time from start to ready; half an hour fits large models on slow "
        "disks.",
    )
    stop_grace_s: float = Field(
        default=10.0,
        ge=0,
        description="Time that an engine gets to end by itself before its processes are killed.",
    )
    health_timeout_s: float = Field(
        default=5.0,
        gt=0,
        description="An engine that does not answer its health route in this time counts as "
        "hung; three times in a row get the replica replaced.",
    )
    probe_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="How long an engine whose streams stand still, though its health route "
        "answers, may take for a request for one token, before all others, until it counts as "
        "hung and is replaced. Engines mix such a request in with a long prompt within seconds.",
    )


class ModelArgs(Settings):
    """``args`` of a model's application. A change restarts this model, and no other."""

    id: ModelId = Field(description="The model's name in requests and in the models list.")
    aliases: tuple[ModelId, ...] = Field(
        default=(), description="Other names that requests may use."
    )
    owned_by: str = Field(default="frontline", description="`owned_by` in the models list.")
    pools: tuple[PoolSettings, ...] = Field(
        min_length=1, description="The engine deployments that serve it; see below."
    )

    @model_validator(mode="after")
    def _names_are_distinct(self) -> ModelArgs:
        names = Counter(pool.name for pool in self.pools)
        if doubled := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"two pools share the name {doubled[0]!r}")
        if "Model" in names:
            raise ValueError("a pool may not be called 'Model': that is the model's own deployment")
        return self


class TierSettings(Settings):
    """Which tiers a model offers."""

    priority: PriorityMode = Field(
        default=PriorityMode.AUTO,
        description="`auto`: on engine replicas that have proved native priority; `queue`: going "
        "to the front of the queue counts as delivery; `off`: never.",
    )
    flex: bool = Field(default=True, description="Whether `flex` is offered.")

    @cached_property
    def offer(self) -> TierOffer:
        """The same as the value that decisions are made from."""
        return TierOffer(self.priority, self.flex)


class ModelSettings(Settings):
    """``user_config`` of a model's ``Model`` deployment. Changes need no restart."""

    rate_card: RateCard = Field(default=RateCard(), description="Its prices; free if not set.")
    tiers: TierSettings = Field(default=TierSettings(), description="The tiers that it offers.")
    queue: QueueSettings = Field(
        default=QueueSettings(), description="Who waits, how long, and who is turned away."
    )
    scaling: ScalingSettings = Field(
        default=ScalingSettings(),
        description="How many replicas it gets, where its application has our autoscaling policy.",
    )
