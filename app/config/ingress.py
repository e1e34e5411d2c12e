"""Every setting of Frontline, typed, validated and documented.

Serve's own settings (replica counts, resources, autoscaling, HTTP options) keep their place in
Serve's config. They are neither renamed nor repeated here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from ipaddress import ip_address
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr, StringConstraints

from app.config.access_log import AccessLogSettings
from app.config.budget_webhook import BudgetWebhookSettings
from app.config.hosts import ANY_HOST, HOST_NAME, HostRule
from app.config.journal import JournalSettings
from app.config.origins import ORIGIN, OriginRule
from app.config.usage_reads import UsageSettings
from app.core.addresses import Network, parse_network
from app.core.settings import Problem, Settings, SettingsError
from app.core.tiers import Tier
from app.store.database_url import DEFAULT_URL, StoreUrl

HostName = Annotated[str, StringConstraints(pattern=HOST_NAME, max_length=253)]


def _is_network(text: str) -> str:
    parse_network(text)
    return text


Proxies = Annotated[str, AfterValidator(_is_network)]
Origin = Annotated[str, StringConstraints(pattern=ORIGIN, max_length=300)]

LONGEST_STOP_S = 3700.0
"""How long a stopping replica may go on serving requests that it has accepted, in seconds. Longer
than any request: the config files allow a request an hour (``request_timeout_s``)."""


@dataclass(frozen=True, slots=True)
class FlightBounds:
    """Bounds on the requests in flight at once, over all ingresses.

    Attributes:
        key: of one key.
        tenant: of all keys of one tenant.
    """

    key: int
    tenant: int


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Bounds in bytes: on one body, on all bodies of one tenant, and on all bodies."""

    longest: int
    tenant: int
    total: int

    def longest_for(self, tenant: str) -> int:
        """Return the length of the longest body that can ever fit, in bytes.

        ``tenant`` is empty where the ingress is open to all.
        """
        return min(self.longest, self.tenant if tenant else self.total, self.total)


class IngressSettings(Settings):
    """``user_config`` of the ``Ingress`` deployment. Changes need no restart."""

    auth: Literal["open", "keys"] = Field(
        default="open",
        description="Who may call. `open`: everyone who reaches the port; meant for a developer's "
        "own machine. `keys`: every route except `/health`, `/livez`, `/login` and `/static` "
        "requires an API key (`frontline keys create`); pages take a session instead.",
    )
    open_to_network: bool = Field(
        default=False,
        description="Confirms that unauthenticated access from the network is intended. Without "
        "it, `auth: open` is rejected unless Serve's `http_options.host` is a loopback address, "
        "because anyone who finds the port would be served.",
    )
    allowed_hosts: tuple[HostName, ...] | None = Field(
        default=None,
        description="Accepted values of the `Host` header besides `localhost` and loopback "
        "addresses, without ports; `*` accepts every host. Other values get 403. This stops a web "
        "page whose name resolves to 127.0.0.1 (DNS rebinding) from using this ingress. Not set, "
        "with `auth: open` on loopback: no further host. Not set, with `auth: keys`: every host, "
        "because such a page has no key. Not set, with `open_to_network`: every host, because "
        "anyone who reaches the port is served and the names that it is reached by are unknown.",
    )
    cors_origins: tuple[Origin, ...] = Field(
        default=(),
        description="Origins whose web pages may call the API from a browser, such as "
        "`https://app.example.com` or, with any port, `http://localhost:*`; `*` allows all. "
        "Preflights need no key. None by default: with `auth: open`, any page that a user of the "
        "machine opens could otherwise use the models.",
    )
    trusted_proxies: tuple[Proxies, ...] = Field(
        default=(),
        description="Addresses and networks of the proxies and load balancers before Serve's "
        "HAProxy whose `X-Forwarded-For` is believed, such as `10.1.0.0/16`. The client of a "
        "request is the last address that is none of theirs; keys with allowed addresses need it. "
        "None by default: then it is the address that has connected to HAProxy. HAProxy itself is "
        "not named here: an ingress recognises it by a proof made of Ray's token.",
    )
    max_concurrent_per_key: int = Field(
        default=2000,
        gt=0,
        description="Most requests of one API key in flight at once, waiting or running; further "
        "ones get 429. Each ingress enforces its part: the bound divided by the number of "
        "ingresses, at least 1. The default fits two clients of the OpenAI SDKs with all their "
        "connections open (1,000 each). It stops only loops that never wait.",
    )
    max_concurrent_per_tenant: int = Field(
        default=8000,
        gt=0,
        description="The same bound for all keys of one tenant together. The default is four keys "
        "at their bound.",
    )
    default_tier: Tier = Field(
        default=Tier.DEFAULT,
        description="Tier of requests without `service_tier`, or with `auto`.",
    )
    list_aliases: bool = Field(
        default=False,
        description="Whether the models list has an entry for each alias, too. Off, because most "
        "clients show the list to people, to whom one model is one entry.",
    )
    affinity_by_user: bool = Field(
        default=False,
        description="Whether requests of one `user` (on messages `metadata.user_id`) prefer one "
        "replica, if they have no `prompt_cache_key`. Off, because prompts of different users "
        "often begin alike, and are then better kept together.",
    )
    max_body_bytes: int = Field(
        default=64 * 1024 * 1024,
        gt=0,
        description="Longest request body, in bytes; longer ones get 413. The default leaves room "
        "for several images in one prompt.",
    )
    body_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="Longest time for the whole body of a request to arrive, in seconds; then the "
        "client gets 408. Each `body_min_rate_kb` received adds a second, so that long bodies "
        "have enough time. Half a minute is more than a short body takes on any network.",
    )
    body_min_rate_kb: int = Field(
        default=512,
        gt=0,
        description="KiB of received body that add a second to `body_timeout_s`. The default is "
        "an upload of 4 Mbit/s, which home and phone networks reach: a body of 64 MiB may take "
        "158 s.",
    )
    body_memory_mb: int = Field(
        default=1088,
        gt=0,
        description="Most memory for the bodies of all requests in one ingress, in MiB, while "
        "they are read, wait and run. Further requests get 503. The default fits sixteen of the "
        "longest bodies and some short ones. The first 4 KiB of each body count 25-fold, because "
        "a body of that length stays parsed.",
    )
    body_memory_tenant_mb: int = Field(
        default=512,
        gt=0,
        description="Most of `body_memory_mb` that the bodies of one tenant may take, in MiB; "
        "further requests of the tenant get 503. The default is less than half, so that two "
        "tenants with large bodies leave room for others. Without effect under `auth: open`, "
        "which has only one tenant.",
    )
    engine_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="Longest wait for an answer that is not streamed, in seconds. Then the "
        "request is sent to another replica, once, or gets 503 if there is none. Ten minutes is "
        "what the OpenAI SDKs wait by default. On an engine that preempts, default and flex may "
        "take `suspended_timeout_s` longer; meanwhile the replica is only asked for a token.",
    )
    stream_timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="Longest wait for the first or the next event of a stream, in seconds. Before "
        "the first event, the request then goes to another replica, once, or gets 503 if there is "
        "none. After it, the stream ends with an error. A replica that sent nothing to any "
        "request in that time is asked for a single token, and replaced if it does not produce "
        "one (`probe_timeout_s`). Two minutes is more than a long prompt takes; raise it where "
        "prompts take longer. Comments of an engine are no events.",
    )
    suspended_timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="The same bound for a default or flex stream on an engine that preempts, in "
        "seconds; never less than `stream_timeout_s`. Such an engine suspends it while requests of "
        "a better tier need its slot. After `stream_timeout_s` the replica is only asked for a "
        "token, and replaced if it does not produce one. Ten minutes is what flex may wait, and "
        "what the OpenAI SDKs wait by default.",
    )
    stream_headers_after_s: float = Field(
        default=10.0,
        gt=0,
        description="A stream without its first event this long after it was placed gets status "
        "200, its headers and a comment, in seconds. Until then an error still gets its own "
        "status; afterwards it is an event that ends the stream. Most first tokens come within "
        "ten seconds, and proxies wait at least 30.",
    )
    stream_comment_s: float = Field(
        default=15.0,
        gt=0,
        description="How often a stream that has begun gets an SSE comment (`: keep-alive`) while "
        "its engine sends nothing, in seconds. Half of the shortest usual idle timeout of load "
        "balancers, 30 s. Clients skip comments.",
    )
    slow_reader_s: float = Field(
        default=5.0,
        gt=0,
        description="How long a client may read nothing of its stream once 256 KiB wait for it "
        "(about a thousand tokens), in seconds. Then generation is stopped, and the stream is "
        "broken off and billed to that point, so that clients that do not read cannot hold slots. "
        "Five seconds bridge a network hiccup. A stream whose engine has finished holds no slot, "
        "and waits for its client.",
    )
    discovery_interval_s: float = Field(
        default=2.0,
        gt=0,
        description="How often the ingress asks Serve which model applications exist, in seconds.",
    )
    ledger: StoreUrl = Field(
        default=SecretStr(DEFAULT_URL),
        description="Database of usage records and keys: `sqlite:///PATH`, shared by all "
        "ingresses of one node, or `postgresql://USER:PASSWORD@HOST/DATABASE` for a cluster. "
        "Environment variables are expanded on the ingress's node, so the password need not be "
        "written here: `postgresql://frontline:${LEDGER_PASSWORD}@db/frontline`.",
    )
    journal: JournalSettings = Field(
        default=JournalSettings(),
        description="Where records are kept until they are in the database; see below.",
    )
    access_log: AccessLogSettings = Field(
        default=AccessLogSettings(), description="One line of JSON for each request; see below."
    )
    usage: UsageSettings = Field(
        default=UsageSettings(), description="Bounds on `GET /v1/usage`; see below."
    )
    budget_alert_webhook: BudgetWebhookSettings | None = Field(
        default=None,
        description="Where alerts of budgets are sent over HTTP; see below. Not set: they are in "
        "the log and in a metric only.",
    )

    @cached_property
    def host_rule(self) -> HostRule:
        """Which `Host` headers are served."""
        if self.allowed_hosts is not None:
            return HostRule.of(self.allowed_hosts)
        everywhere = self.auth == "keys" or self.open_to_network
        return HostRule.of([ANY_HOST] if everywhere else [])

    @cached_property
    def trusted_networks(self) -> tuple[Network, ...]:
        """The networks of trusted proxies."""
        return tuple(map(parse_network, self.trusted_proxies))

    @cached_property
    def cors_rule(self) -> OriginRule:
        """Which origins' pages may call."""
        return OriginRule.of(self.cors_origins)

    @cached_property
    def body_limits(self) -> BodyLimits:
        """How much memory request bodies may take, in bytes."""
        tenant, total = self.body_memory_tenant_mb, self.body_memory_mb
        mib = 1024 * 1024
        return BodyLimits(self.max_body_bytes, tenant * mib, total * mib)

    @cached_property
    def in_flight(self) -> FlightBounds:
        """Bounds on the requests in flight."""
        return FlightBounds(self.max_concurrent_per_key, self.max_concurrent_per_tenant)

    def check_open(self, host: str | None, *where: str | int) -> None:
        """Reject unauthenticated access from the network unless it is confirmed.

        Args:
            host: the address that Serve listens on; ``None`` for all of them.
            where: the key of these settings in the configuration, for the error.

        Raises:
            SettingsError: ``auth`` is ``open`` without ``open_to_network``, and other machines can
                reach the port.
        """
        if self.auth != "open" or self.open_to_network or _is_loopback(host):
            return
        message = (
            "`open` would serve everyone who reaches this port from the network; set `keys`, or "
            "confirm `open` with `open_to_network: true`"
        )
        raise SettingsError(Problem((*where, "auth"), message))


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ip_address(host or "::").is_loopback
    except ValueError:
        # A name may resolve to any address.
        return False
