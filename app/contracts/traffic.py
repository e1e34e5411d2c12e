"""What has happened to the requests of one model: outcomes, times, tokens, cost. Plain counts.

Counts only grow, so that two states of them yield true rates. Each ingress keeps one per model; an
ingress reports it to the Model, which sums those of all ingresses.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, NamedTuple, Self

from app.core.pricing import EXACT, TokenUsage
from app.core.tiers import Tier

TTFT_BOUNDS_S: Final = (
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0,
)  # fmt: skip
"""OpenTelemetry's for ``gen_ai.server.time_to_first_token``, and vLLM's above ten seconds."""
DURATION_BOUNDS_S: Final = (
    .01, .02, .04, .08, .16, .32, .64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68,
)  # fmt: skip
"""OpenTelemetry's for ``gen_ai.server.request.duration``, and two more."""
PER_TOKEN_BOUNDS_S: Final = (
    .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1.0, 2.5,
)  # fmt: skip
"""OpenTelemetry's for ``gen_ai.server.time_per_output_token``."""


def seconds_per_token(duration_s: float, ttft_s: float, tokens: int) -> float | None:
    """Return the time per output token after the first; ``None`` if there is no second token."""
    return max(duration_s - ttft_s, 0.0) / (tokens - 1) if tokens > 1 else None


class Histogram:
    """Counts of values by bucket, with Prometheus' meaning: a bucket holds values up to its bound.

    Attributes:
        bounds: the upper bounds, ascending; a last bucket has none.
        counts: how many values each bucket has; not cumulative.
        total: the sum of all values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    @property
    def count(self) -> int:
        """How many values there are."""
        return sum(self.counts)

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def join(self, other: Histogram) -> None:
        """Add the counts of another histogram with the same bounds."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def since(self, earlier: Histogram) -> Histogram:
        """Return what was counted since an earlier state of the same histogram."""
        difference = Histogram(self.bounds)
        difference.counts = [a - b for a, b in zip(self.counts, earlier.counts, strict=True)]
        difference.total = self.total - earlier.total
        return difference

    def copy(self) -> Histogram:
        """Return its present state."""
        return self.since(Histogram(self.bounds))

    def quantile(self, share: float) -> float | None:
        """Return the value below which this share of the values lies; ``None`` without values.

        Linear within a bucket, as ``histogram_quantile`` of Prometheus; the last bound for values
        above it.
        """
        rank, seen = share * self.count, 0
        for number, count in enumerate(self.counts):
            if count and seen + count >= rank:
                if number == len(self.bounds):
                    return self.bounds[-1]
                low = self.bounds[number - 1] if number else 0.0
                return low + (self.bounds[number] - low) * max(rank - seen, 0) / count
            seen += count
        return None


class Outcome(NamedTuple):
    """How a request ended.

    Attributes:
        requested: the requested tier; ``None`` for none, or ``auto``.
        served: the tier that it was served and billed at; ``None`` if it reached no engine.
        state: a ``State`` of ``app.ledger.record``, such as ``completed`` or ``shed``.
        reason: why the tier is not the requested one, or why there is no whole answer.
    """

    requested: Tier | None
    served: Tier | None
    state: str
    reason: str | None


@dataclass(slots=True)
class TierTraffic:
    """The requests that were served at one tier.

    Attributes:
        ttft: time to the first byte, in seconds, of streams only.
        per_token: seconds per output token after the first, of streams only.
        duration: from arrival to the end, in seconds.
        queue: time in the queue, in seconds.
        prompt_tokens, cached_tokens, completion_tokens: sums; cached ones are part of the prompt's.
        cost: the sum billed, in USD, exact.
        estimated: how many had no usable count of tokens from their engine.
    """

    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_BOUNDS_S))
    per_token: Histogram = field(default_factory=lambda: Histogram(PER_TOKEN_BOUNDS_S))
    duration: Histogram = field(default_factory=lambda: Histogram(DURATION_BOUNDS_S))
    queue: Histogram = field(default_factory=lambda: Histogram(TTFT_BOUNDS_S))
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: Decimal = Decimal(0)
    estimated: int = 0

    def add(self, done: Served) -> None:
        """Count one request."""
        self.queue.add(done.queue_s)
        self.duration.add(done.duration_s)
        if done.stream and done.ttft_s is not None:
            self.ttft.add(done.ttft_s)
            pace_s = seconds_per_token(done.duration_s, done.ttft_s, done.usage.completion_tokens)
            if pace_s is not None:
                self.per_token.add(pace_s)
        self.prompt_tokens += done.usage.prompt_tokens
        self.cached_tokens += done.usage.cached_tokens
        self.completion_tokens += done.usage.completion_tokens
        self.cost = EXACT.add(self.cost, done.cost)
        self.estimated += done.estimated

    def join(self, other: TierTraffic) -> None:
        """Add the counts of another ingress."""
        for mine, theirs in zip(self.histograms(), other.histograms(), strict=True):
            mine.join(theirs)
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens
        self.cost = EXACT.add(self.cost, other.cost)
        self.estimated += other.estimated

    def since(self, earlier: TierTraffic) -> TierTraffic:
        """Return what was counted since an earlier state of the same counts."""
        pairs = zip(self.histograms(), earlier.histograms(), strict=True)
        ttft, per_token, duration, queue = (mine.since(theirs) for mine, theirs in pairs)
        return TierTraffic(
            ttft,
            per_token,
            duration,
            queue,
            self.prompt_tokens - earlier.prompt_tokens,
            self.cached_tokens - earlier.cached_tokens,
            self.completion_tokens - earlier.completion_tokens,
            EXACT.subtract(self.cost, earlier.cost),
            self.estimated - earlier.estimated,
        )

    def histograms(self) -> tuple[Histogram, ...]:
        """Return all its histograms, in a fixed order."""
        return (self.ttft, self.per_token, self.duration, self.queue)


class Served(NamedTuple):
    """What ``TierTraffic`` counts of one request; times in seconds, ``cost`` in USD."""

    stream: bool
    queue_s: float
    ttft_s: float | None
    duration_s: float
    usage: TokenUsage
    cost: Decimal
    estimated: bool


@dataclass(slots=True)
class Attainment:
    """Streams of a tier with an objective (``slo`` in a model's settings) that met or missed it."""

    met: int = 0
    missed: int = 0

    @property
    def share(self) -> float | None:
        """The share that met it; ``None`` without any stream."""
        streams = self.met + self.missed
        return self.met / streams if streams else None

    def join(self, other: Attainment) -> None:
        """Add the counts of another ingress."""
        self.met += other.met
        self.missed += other.missed

    def since(self, earlier: Attainment) -> Attainment:
        """Return what was counted since an earlier state of the same counts."""
        return Attainment(self.met - earlier.met, self.missed - earlier.missed)


@dataclass(slots=True)
class Traffic:
    """The requests of one model that have ended.

    Attributes:
        outcomes: how many ended in each way.
        tiers: those that an engine served, by served tier.
        slo: whether streams met their tier's objective; tiers without one are left out.
    """

    outcomes: dict[Outcome, int] = field(default_factory=dict)
    tiers: dict[Tier, TierTraffic] = field(default_factory=dict)
    slo: dict[Tier, Attainment] = field(default_factory=dict)

    def add(self, outcome: Outcome, served: Served | None) -> None:
        """Count one request; ``served`` is ``None`` if it reached no engine."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        if outcome.served is not None and served is not None:
            self.tier(outcome.served).add(served)

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return sum(self.outcomes.values())

    def attain(self, tier: Tier, *, met: bool) -> None:
        """Count a stream of a tier that has an objective."""
        attained = self.slo.get(tier)
        if attained is None:
            attained = self.slo[tier] = Attainment()
        attained.met += met
        attained.missed += not met

    def tier(self, tier: Tier) -> TierTraffic:
        """Return the counts of one tier, to be added to."""
        # Not `setdefault`, which would make four histograms for every request.
        counts = self.tiers.get(tier)
        if counts is None:
            counts = self.tiers[tier] = TierTraffic()
        return counts

    def join(self, other: Traffic) -> None:
        """Add the counts of another ingress."""
        for outcome, count in other.outcomes.items():
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + count
        for tier, counts in other.tiers.items():
            self.tier(tier).join(counts)
        for tier, attained in other.slo.items():
            self.slo.setdefault(tier, Attainment()).join(attained)

    def since(self, earlier: Traffic) -> Traffic:
        """Return what was counted since an earlier state of the same counts."""
        nothing = TierTraffic()
        outcomes = {
            outcome: grown
            for outcome, count in self.outcomes.items()
            if (grown := count - earlier.outcomes.get(outcome, 0))
        }
        tiers = {
            tier: counts.since(earlier.tiers.get(tier, nothing))
            for tier, counts in self.tiers.items()
        }
        slo = {
            tier: attained.since(earlier.slo.get(tier, Attainment()))
            for tier, attained in self.slo.items()
        }
        return Traffic(outcomes, tiers, slo)

    @classmethod
    def of(cls, parts: Iterable[Traffic]) -> Self:
        """Return the sum of several, as a value of its own."""
        whole = cls()
        for part in parts:
            whole.join(part)
        return whole
