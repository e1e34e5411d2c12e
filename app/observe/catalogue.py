"""Every metric that Frontline exports: name, kind, labels and meaning. Pure.

The exporter, the monitoring files in ``configs/monitoring`` and the tables in docs/monitoring.md
all read this one list. Ray adds the prefix ``ray_`` to each name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from app.contracts.traffic import DURATION_BOUNDS_S, PER_TOKEN_BOUNDS_S, TTFT_BOUNDS_S

RAY_PREFIX: Final = "ray_"
"""What Ray puts before the name of each metric that it exports."""


class Kind(StrEnum):
    """The kind of a metric, as Prometheus defines it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Source(StrEnum):
    """The process that exports a metric."""

    INGRESS = "each ingress"
    MODEL = "the Model"
    REPLICA = "each engine replica"
    PROCESS = "each ingress, Model and engine replica"
    CONTROLLER = "Serve's controller"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: its name, without ``RAY_PREFIX``. Names of counters end with ``_total``.
        kind: its kind.
        labels: the names of its labels.
        source: which process exports it.
        text: its meaning and unit, for operators.
        bounds: the upper bounds of a histogram's buckets; empty if an engine chooses them.
        joined: how values are combined that share the label value ``other``: ``sum`` or ``max``.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    source: Source
    text: str
    bounds: tuple[float, ...] = ()
    joined: str = "sum"

    def __post_init__(self) -> None:
        assert (self.kind is Kind.COUNTER) is self.name.endswith("_total"), self.name
        assert self.kind is Kind.HISTOGRAM or not self.bounds, self.name

    @property
    def series(self) -> tuple[str, ...]:
        """The names that Prometheus sees, with Ray's prefix."""
        name = RAY_PREFIX + self.name
        if self.kind is Kind.HISTOGRAM:
            return (f"{name}_bucket", f"{name}_sum", f"{name}_count")
        return (name,)


_OTEL: Final = (
    "gen_ai_operation_name",
    "gen_ai_provider_name",
    "gen_ai_request_model",
    "openai_request_service_tier",
    "openai_response_service_tier",
    "error_type",
)
_TIER: Final = ("model", "tier")
_POOL: Final = ("model", "pool")


_table: list[Metric] = []


def _add(metric: Metric) -> Metric:
    _table.append(metric)
    return metric


def _counter(name: str, labels: tuple[str, ...], source: Source, text: str) -> Metric:
    return _add(Metric(name, Kind.COUNTER, labels, source, text))


def _gauge(
    name: str, labels: tuple[str, ...], source: Source, text: str, joined: str = "sum"
) -> Metric:
    return _add(Metric(name, Kind.GAUGE, labels, source, text, (), joined))


def _histogram(name: str, labels: tuple[str, ...], bounds: tuple[float, ...], text: str) -> Metric:
    return _add(Metric(name, Kind.HISTOGRAM, labels, Source.INGRESS, text, bounds))


# --- requests --------------------------------------------------------------------------------
DURATION: Final = _histogram(
    "gen_ai_server_request_duration_seconds",
    _OTEL,
    DURATION_BOUNDS_S,
    "From a request's arrival to its end, in seconds. OpenTelemetry's "
    "`gen_ai.server.request.duration`.",
)
TTFT: Final = _histogram(
    "gen_ai_server_time_to_first_token_seconds",
    _OTEL,
    TTFT_BOUNDS_S,
    "From a stream's arrival to its first byte, time in the queue included, in seconds. "
    "OpenTelemetry's `gen_ai.server.time_to_first_token`.",
)
PER_TOKEN: Final = _histogram(
    "gen_ai_server_time_per_output_token_seconds",
    _OTEL,
    PER_TOKEN_BOUNDS_S,
    "Seconds per output token of a stream after its first. OpenTelemetry's "
    "`gen_ai.server.time_per_output_token`.",
)
REQUESTS: Final = _counter(
    "frontline_requests_total",
    ("model", "requested_tier", "served_tier", "state"),
    Source.INGRESS,
    "Requests to a known model that have ended. `state`: `completed`, `interrupted`, `failed`, "
    "`shed` or `refused`. `requested_tier` is `auto` for none; `served_tier` is empty if no engine "
    "received it.",
)
REFUSED: Final = _counter(
    "frontline_refused_requests_total",
    ("route", "status", "reason"),
    Source.INGRESS,
    "Requests refused before their model was known. `reason` is the error's code.",
)
KEYS_REFUSED: Final = _counter(
    "frontline_keys_refused_total",
    (),
    Source.INGRESS,
    "Requests refused with 401: no API key, or one that does not work.",
)
LIMITS_REFUSED: Final = _counter(
    "frontline_limits_refused_total",
    ("model", "reason"),
    Source.INGRESS,
    "Requests refused before the queue, by error code: `rate_limit_exceeded` and "
    "`concurrency_limit_exceeded` are limits of keys, `insufficient_quota` is a spent budget; the "
    "others say that the model or the ledger is not available.",
)
BUDGET_ALERTS: Final = _counter(
    "frontline_budget_alerts_total",
    ("percent", "mode"),
    Source.INGRESS,
    "Budgets of keys and tenants of which 50, 80 or 100 percent were reached, as this ingress saw "
    "it; `mode`: `hard` or `warn`. The log names the owner.",
)
BUDGET_WEBHOOK: Final = _counter(
    "frontline_budget_webhook_total",
    ("outcome",),
    Source.INGRESS,
    "Budget alerts that the webhook's receiver has taken (`outcome`: `delivered`), that it has not "
    "(`given_up`) or that were not sent (`dropped`), and tries that `failed` and were repeated.",
)
# --- the queue -------------------------------------------------------------------------------
QUEUE_WAIT: Final = _histogram(
    "frontline_queue_wait_seconds",
    _TIER,
    TTFT_BOUNDS_S,
    "Time in the queue of requests that an engine received, by served tier, in seconds.",
)
QUEUE_LENGTH: Final = _gauge(
    "frontline_queue_length",
    _TIER,
    Source.INGRESS,
    "Slots that the waiting requests would take: one each, or one for each of its sequences.",
)
QUEUE_OLDEST: Final = _gauge(
    "frontline_queue_oldest_wait_seconds",
    _TIER,
    Source.INGRESS,
    "How long the oldest waiting request has waited, in seconds; 0 if none waits.",
    "max",
)
RUNNING: Final = _gauge(
    "frontline_running",
    _TIER,
    Source.INGRESS,
    "Slots that running requests take, by tier in the queue. More than the slots where the engine "
    "has suspended some.",
)
SHEDS: Final = _counter(
    "frontline_sheds_total",
    ("model", "tier", "reason"),
    Source.INGRESS,
    "Requests that the queue turned away, by tier in the queue and reason.",
)
DISPLACEMENTS: Final = _counter(
    "frontline_displacements_total",
    _TIER,
    Source.INGRESS,
    "Waiting requests that were shed to make room for a better tier. Also in "
    "`frontline_sheds_total`, as `displaced`.",
)
DOWNGRADES: Final = _counter(
    "frontline_downgrades_total",
    ("model", "requested_tier", "reason"),
    Source.INGRESS,
    "Requests not served as requested, by the reason in `x-service-tier-reason`, or "
    "`answer_cut_off`: the tier differs, and the record has only the reason of the cut. "
    "`requested_tier` is `default` for words such as `scale`, and `auto` for none. Requests that "
    "`start_within` has raised are left out, unless they could not have priority.",
)
PREEMPTIONS: Final = _counter(
    "frontline_preemptions_total",
    _TIER,
    Source.INGRESS,
    "Slots that requests of this tier took although all were taken, so that the engine suspends "
    "running requests of lower tiers.",
)
SUSPENDED: Final = _gauge(
    "frontline_suspended",
    _TIER,
    Source.MODEL,
    "Slots of requests that engines have suspended for better tiers.",
)
SUSPENDED_OLDEST: Final = _gauge(
    "frontline_suspended_oldest_seconds",
    _TIER,
    Source.MODEL,
    "For how long a replica has had suspended requests without a break, at most, in seconds.",
    "max",
)
CREDITS: Final = _gauge(
    "frontline_credits",
    _POOL,
    Source.INGRESS,
    "Slots that this ingress may use.",
)
SLOTS: Final = _gauge(
    "frontline_slots",
    ("model", "pool", "state"),
    Source.INGRESS,
    "Slots of this ingress: `taken` by its requests, or `free` for a request of any tier.",
)
# --- service levels --------------------------------------------------------------------------
SLO_REQUESTS: Final = _counter(
    "frontline_slo_requests_total",
    ("model", "tier", "met"),
    Source.INGRESS,
    "Streams whose tier has an `slo`, by whether the first byte came in time (`met`: `true`, "
    "`false`). Sheds and failures before the first byte count as missed.",
)
SLO_OBJECTIVE: Final = _gauge(
    "frontline_slo_objective",
    _TIER,
    Source.INGRESS,
    "The share of streams that should meet it: `p` of the model's `slo`.",
    "max",
)
SLO_TTFT: Final = _gauge(
    "frontline_slo_ttft_seconds",
    _TIER,
    Source.INGRESS,
    "The time to first token that should be met, in seconds: `ttft_ms` of the model's `slo`.",
    "max",
)
# --- engines ---------------------------------------------------------------------------------
REPLICAS: Final = _gauge(
    "frontline_replicas_ready",
    _POOL,
    Source.MODEL,
    "Engine replicas that serve.",
)
REPLICA_SLOTS: Final = _gauge(
    "frontline_replica_slots",
    _POOL,
    Source.MODEL,
    "Slots of the engine replicas that serve.",
)
REPLICA_STARTS: Final = _counter(
    "frontline_replica_starts_total",
    _POOL,
    Source.MODEL,
    "Engine replicas that became ready since the Model started.",
)
REPLICA_LOSSES: Final = _counter(
    "frontline_replica_losses_total",
    _POOL,
    Source.MODEL,
    "Ready engine replicas that ended, hang or stopped answering, without having been told to "
    "stop.",
)
ENGINE_SCRAPES_FAILED: Final = _counter(
    "frontline_engine_scrapes_failed_total",
    ("model_name", "pool"),
    Source.REPLICA,
    "Reads of an engine's own metrics that failed, so that they are not relayed.",
)
# --- autoscaling -----------------------------------------------------------------------------
SCALING_REPLICAS: Final = _gauge(
    "frontline_scaling_replicas",
    ("application", "pool", "reason"),
    Source.CONTROLLER,
    "How many replicas a pool should have, and why not fewer.",
)
SCALING_CHANGES: Final = _counter(
    "frontline_scaling_changes_total",
    ("application", "pool", "direction", "reason"),
    Source.CONTROLLER,
    "How often a pool was given more or fewer replicas (`direction`: `up`, `down`), and why.",
)
# --- money -----------------------------------------------------------------------------------
COST: Final = _counter(
    "frontline_cost_usd_total",
    _TIER,
    Source.INGRESS,
    "Cost of ended requests by served tier, in USD. For dashboards; bills come from the ledger.",
)
TOKENS: Final = _counter(
    "frontline_tokens_total",
    ("model", "tier", "kind"),
    Source.INGRESS,
    "Tokens of ended requests by served tier. `kind`: `input` (without those of the next two), "
    "`cached_input` (read from a prefix cache), `cache_write` (written to one) or `output`.",
)
IMAGES: Final = _counter(
    "frontline_images_total",
    _TIER,
    Source.INGRESS,
    "Images in the prompts of ended requests by served tier, where they have a price.",
)
AUDIO_SECONDS: Final = _counter(
    "frontline_audio_seconds_total",
    _TIER,
    Source.INGRESS,
    "Begun seconds of the recordings of ended requests by served tier.",
)
WITHOUT_USAGE: Final = _counter(
    "frontline_answers_without_usage_total",
    _TIER,
    Source.INGRESS,
    "Answers without a usable count of tokens from their engine; Frontline estimated it.",
)
LEDGER_LAG: Final = _gauge(
    "frontline_ledger_lag_seconds",
    (),
    Source.INGRESS,
    "Age of the oldest journal entry that has not been moved to the database, in seconds.",
    "max",
)
JOURNAL_PENDING: Final = _gauge(
    "frontline_journal_pending_bytes",
    (),
    Source.INGRESS,
    "Bytes in the journal that have not been moved to the database.",
)
JOURNAL_LIMIT: Final = _gauge(
    "frontline_journal_limit_bytes",
    (),
    Source.INGRESS,
    "Most disk space for the journals of a node: `journal.max_mb`. Once they are full, requests "
    "are refused.",
    "max",
)
JOURNALS_STUCK: Final = _gauge(
    "frontline_journals_stuck",
    ("state",),
    Source.INGRESS,
    "Journals of this node that need an operator: `set_aside` (unreadable parts) or `failing` "
    "(cannot be moved to the database).",
    "max",
)
UNCOUNTED: Final = _counter(
    "frontline_ledger_uncounted_total",
    (),
    Source.INGRESS,
    "Shed or refused requests without a record, because the journal had no room. They cost "
    "nothing.",
)
# --- faults ----------------------------------------------------------------------------------
PROBLEM: Final = _gauge(
    "frontline_ingress_problem",
    ("reason",),
    Source.INGRESS,
    "1 while `GET /health` reports this reason, else 0.",
    "max",
)
FAILURES: Final = _counter(
    "frontline_background_failures_total",
    ("name",),
    Source.PROCESS,
    "Failures of background work, by its name.",
)
RESTARTS: Final = _counter(
    "frontline_background_restarts_total",
    ("name",),
    Source.PROCESS,
    "Failures of background work that were followed by a restart.",
)
ALARMS: Final = _counter(
    "frontline_alarms_total",
    ("name",),
    Source.PROCESS,
    "Alarms: what should not happen and goes on all the same, by name.",
)

METRICS: Final = tuple(_table)
"""All metrics, in the order above. Engines' own metrics are listed by their adapters."""
