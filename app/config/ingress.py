"""Every setting of Frontline, typed, validated and documented.

Serve's own settings (replica counts, resources, autoscaling, HTTP options) are set where Serve
wants them and are neither renamed nor repeated here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from ipaddress import ip_address
from typing import Annotated, Literal

from pydantic import Field, SecretStr, StringConstraints

from app.config.hosts import ANY_HOST, HOST_NAME, HostRule
from app.config.journal import JournalSettings
from app.config.usage_reads import UsageSettings
from app.core.settings import Problem, Settings, SettingsError
from app.core.tiers import Tier
from app.store.database_url import DEFAULT_URL, StoreUrl

HostName = Annotated[str, StringConstraints(pattern=HOST_NAME, max_length=253)]

LONGEST_STOP_S = 3700.0
"""How long a replica that was told to stop may go on serving what it has begun. Longer than any
request: the config files let one take an hour (``request_timeout_s``)."""


@dataclass(frozen=True, slots=True)
class FlightBounds:
    """How many requests may be in flight at once, at all ingresses together.

    Attributes:
        key: of one key.
        tenant: of all keys of one tenant.
    """

    key: int
    tenant: int


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Bounds in bytes: of one body, of all of one tenant, and of all."""

    longest: int
    tenant: int
    total: int

    def longest_for(self, tenant: str) -> int:
        """Return the length of the longest body that can ever have room.

        ``tenant`` is empty where the ingress is open to all.
        """
        return min(self.longest, self.tenant if tenant else self.total, self.total)


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
    discovery_interval_s: float = Field(
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
    def body_limits(self) -> BodyLimits:
        """How much memory request bodies may take."""
        tenant, total = self.body_memory_tenant_mb, self.body_memory_mb
        mib = 1024 * 1024
        return BodyLimits(self.max_body_bytes, tenant * mib, total * mib)

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
