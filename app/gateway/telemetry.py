"""The metrics of an ingress: reads the state of its parts, once a second."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping

from app.config.slo import SloSettings
from app.contracts.traffic import Attainment, Outcome, TierTraffic, Traffic
from app.core.shed_reason import ShedReason
from app.core.tier_decision import DOWNGRADE_REASONS, downgrade_reason
from app.core.tiers import AUTO, Tier
from app.flow.stats import QueueState
from app.gateway.health import HealthReason, judge
from app.gateway.health_route import read_signs
from app.gateway.services import Services
from app.ledger.backlog import Lag
from app.ledger.ledger import Ledger
from app.ledger.record import State
from app.observe import catalogue as c
from app.observe.exporter import Exporter, Sample
from app.observe.measurements import Measurements
from app.observe.process import process_samples
from app.observe.slo import LIMITS, SloWatch
from app.observe.tallies import NO_EXTRAS, Extras
from app.ray_compat.metrics import MetricsBackend
from app.tenants.budget_webhook import Outcome as WebhookOutcome
from app.tenants.spending import ALERTS

_NO_KEY = 401


class Telemetry:
    """The metrics of one ingress. ``exporter.run`` is to be kept running.

    Attributes:
        exporter: exports them.
    """

    def __init__(self, services: Services, backend: MetricsBackend | None = None) -> None:
        self._services = services
        self._measurements = Measurements()
        self._lag = Lag()
        self.exporter = Exporter(self.samples, backend)
        services.observers.add(self._measurements)
        services.observers.add(SloWatch(self._slo_of, services.tallies))

    def _slo_of(self, model: str) -> SloSettings | None:
        admission = self._services.registry.find(model)
        return None if admission is None else admission.snapshot.settings.slo

    def samples(self) -> Iterator[Sample]:
        """Yield the present value of every series of this ingress."""
        services, now = self._services, time.monotonic()
        for admission in services.registry.admissions():
            yield from queue_samples(admission.snapshot.id, admission.state())
        models = services.registry.models()
        for model in models:
            traffic = services.tallies.of(model.id)
            yield from traffic_samples(model.id, traffic, services.tallies.extras)
            yield from slo_samples(model.id, model.settings.slo, traffic)
        yield from self._measurements.samples([model.id for model in models])
        yield from refusal_samples(services.tallies.refused_requests)
        yield from budget_samples({} if services.budgets is None else services.budgets.alerts)
        for outcome in WebhookOutcome:
            sent = services.budget_webhook.counts[outcome]
            yield Sample(c.BUDGET_WEBHOOK, (outcome.value,), sent)
        if services.ledger is not None:
            yield from ledger_samples(services.ledger, self._lag, now)
        found = judge(read_signs(services, now)).reasons
        for reason in HealthReason:
            yield Sample(c.PROBLEM, (reason.value,), float(reason in found))
        yield from process_samples()


def queue_samples(model: str, state: QueueState) -> Iterator[Sample]:
    """Yield the queue and the slots of one model. Every tier and reason is there from the start."""
    for tier in Tier:
        yield Sample(c.QUEUE_LENGTH, (model, tier.value), state.waiting[tier])
        yield Sample(c.QUEUE_OLDEST, (model, tier.value), state.oldest_s[tier])
        yield Sample(c.RUNNING, (model, tier.value), state.running[tier])
        yield Sample(c.PREEMPTIONS, (model, tier.value), state.preemptions[tier])
        displaced = state.sheds.get((tier, ShedReason.DISPLACED), 0)
        yield Sample(c.DISPLACEMENTS, (model, tier.value), displaced)
        for reason in ShedReason:
            shed = state.sheds.get((tier, reason), 0)
            yield Sample(c.SHEDS, (model, tier.value, reason.value), shed)
    for pool, slots in state.pools.items():
        yield Sample(c.CREDITS, (model, pool), slots.credits)
        yield Sample(c.SLOTS, (model, pool, "taken"), slots.taken)
        yield Sample(c.SLOTS, (model, pool, "free"), slots.free)


def traffic_samples(
    model: str, traffic: Traffic, extras: Mapping[tuple[str, Tier], Extras]
) -> Iterator[Sample]:
    """Yield what has happened to the requests of one model; ``extras`` are those of all models."""
    yield from _outcome_samples(model, traffic.outcomes)
    for tier in Tier:
        done = traffic.tiers.get(tier) or TierTraffic()
        yield from _tier_samples(model, tier, done, extras.get((model, tier), NO_EXTRAS))


def _outcome_samples(model: str, outcomes: dict[Outcome, int]) -> Iterator[Sample]:
    ends = Counter({(tier.value, tier.value, State.COMPLETED.value): 0 for tier in Tier})
    downgrades = Counter({(Tier.PRIORITY.value, reason): 0 for reason in DOWNGRADE_REASONS})
    limits = Counter(dict.fromkeys(sorted(LIMITS), 0))
    for (requested, served, state, reason), count in outcomes.items():
        asked = AUTO if requested is None else requested.value
        ends[asked, "" if served is None else served.value, state] += count
        if (why := downgrade_reason(requested, served, reason)) is not None:
            downgrades[asked, why] += count
        elif state == State.REFUSED:
            limits[reason or state] += count
    for labels, count in ends.items():
        yield Sample(c.REQUESTS, (model, *labels), count)
    for (asked, why), count in downgrades.items():
        yield Sample(c.DOWNGRADES, (model, asked, why), count)
    for why, count in limits.items():
        yield Sample(c.LIMITS_REFUSED, (model, why), count)


def _tier_samples(model: str, tier: Tier, done: TierTraffic, more: Extras) -> Iterator[Sample]:
    labels = (model, tier.value)
    yield Sample(c.QUEUE_WAIT, labels, done.queue)
    yield Sample(c.COST, labels, float(done.cost))
    read, written = done.cached_tokens, more.cache_write_tokens
    yield Sample(c.TOKENS, (*labels, "input"), done.prompt_tokens - read - written)
    yield Sample(c.TOKENS, (*labels, "cached_input"), read)
    yield Sample(c.TOKENS, (*labels, "cache_write"), written)
    yield Sample(c.TOKENS, (*labels, "output"), done.completion_tokens)
    yield Sample(c.IMAGES, labels, more.images)
    yield Sample(c.AUDIO_SECONDS, labels, more.audio_seconds)
    yield Sample(c.WITHOUT_USAGE, labels, done.estimated)


def slo_samples(model: str, slo: SloSettings, traffic: Traffic) -> Iterator[Sample]:
    """Yield the objectives of one model, and how many streams met them."""
    for tier in Tier:
        if (target := slo.of(tier)) is None:
            continue
        labels = (model, tier.value)
        attained = traffic.slo.get(tier, Attainment())
        yield Sample(c.SLO_OBJECTIVE, labels, target.p)
        yield Sample(c.SLO_TTFT, labels, target.ttft_ms / 1000)
        yield Sample(c.SLO_REQUESTS, (*labels, "true"), attained.met)
        yield Sample(c.SLO_REQUESTS, (*labels, "false"), attained.missed)


def refusal_samples(refused: dict[tuple[str, int, str], int]) -> Iterator[Sample]:
    """Yield the requests that were refused before their model was known."""
    keys = sum(count for (_, status, _), count in refused.items() if status == _NO_KEY)
    yield Sample(c.KEYS_REFUSED, (), keys)
    for (route, status, reason), count in refused.items():
        yield Sample(c.REFUSED, (route, str(status), reason), count)


def budget_samples(alerts: Mapping[tuple[int, bool], int]) -> Iterator[Sample]:
    """Yield the alerts of budgets, by percentage and whether the budget is hard."""
    for percent in ALERTS:
        for hard, mode in ((True, "hard"), (False, "warn")):
            yield Sample(c.BUDGET_ALERTS, (str(percent), mode), alerts.get((percent, hard), 0))


def ledger_samples(ledger: Ledger, lag: Lag, now: float) -> Iterator[Sample]:
    """Yield how far the store is behind the journal, and which journals are stuck."""
    backlog = ledger.backlog()
    yield Sample(c.LEDGER_LAG, (), lag.seconds(backlog, now))
    yield Sample(c.JOURNAL_PENDING, (), backlog.size)
    yield Sample(c.JOURNAL_LIMIT, (), ledger.limit_bytes)
    yield Sample(c.JOURNALS_STUCK, ("set_aside",), ledger.journals_set_aside)
    yield Sample(c.JOURNALS_STUCK, ("failing",), ledger.journals_failing)
    yield Sample(c.UNCOUNTED, (), ledger.uncounted)
