"""What the measured requests amount to, and whether that meets the goals. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.bench.load import Answer
from scripts.bench.trial import Trial, Window

MOST_TTFT_GROWTH = 1.3
LEAST_LEAD = 10.0
MOST_LOSS = 0.05


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of all values do not exceed."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@dataclass(frozen=True, slots=True)
class Row:
    """One tier in one phase at one endpoint. Times in seconds; ``nan`` where nothing was measured.

    Attributes:
        count: how many first tokens came, with whom the percentiles are.
        served: how many answers said which tier, by tier.
        errors: how many requests failed otherwise than by 429.
    """

    endpoint: str
    phase: str
    tier: str
    count: int
    ttft_p50: float
    ttft_p99: float
    queue_p50: float
    queue_p99: float
    requests_per_s: float
    tokens_per_s: float
    sheds: int
    served: dict[str, int]
    errors: int


@dataclass(frozen=True, slots=True)
class Goal:
    """Something that was promised, and what was measured."""

    endpoint: str
    what: str
    measured: str
    met: bool


def rows_of(trial: Trial) -> list[Row]:
    """Return the rows of one endpoint."""
    return [
        _row(trial, "idle", [trial.idle], "priority"),
        _row(trial, "alone", trial.alone, "default"),
        _row(trial, "together", [trial.together], "priority"),
        _row(trial, "together", [trial.together], "default"),
    ]


def first_tokens(trial: Trial, windows: Sequence[Window], tier: str) -> list[Answer]:
    """Return the answers whose first token came in one of the windows.

    By the first token and not by the arrival: else those who waited longest would be missing.
    """
    return [
        answer
        for answer in trial.answers
        if answer.tier == tier and answer.first and any(w.has(answer.first) for w in windows)
    ]


def tokens_in(answers: Sequence[Answer], windows: Sequence[Window]) -> float:
    """Return how many tokens came in the windows, those of each answer taken as evenly spread."""
    return sum(
        answer.tokens * sum(window.overlap(answer.first, answer.ended) for window in windows)
        for answer in answers
        if answer.first
    )


def goals_of(rows: Sequence[Row], *, simulated: bool) -> list[Goal]:
    """Check what is promised against the rows of one endpoint."""
    idle, alone, priority, default = rows
    name = idle.endpoint
    goals = []
    if simulated:
        for what, before, now in (
            ("p50", idle.ttft_p50, priority.ttft_p50),
            ("p99", idle.ttft_p99, priority.ttft_p99),
        ):
            limit = f"priority TTFT {what} at most {MOST_TTFT_GROWTH} x idle"
            growth = now / before
            told = f"{growth:.2f} x ({before * 1e3:.1f} to {now * 1e3:.1f} ms)"
            goals.append(Goal(name, limit, told, growth <= MOST_TTFT_GROWTH))
    else:
        lead = default.ttft_p50 / priority.ttft_p50
        limit = f"priority TTFT p50 at most 1/{LEAST_LEAD:.0f} of default's"
        told = f"1/{lead:.1f} ({priority.ttft_p50:.3f} of {default.ttft_p50:.3f} s)"
        goals.append(Goal(name, limit, told, lead >= LEAST_LEAD))
    loss = 1 - default.tokens_per_s / alone.tokens_per_s
    told = f"{loss:+.1%} ({alone.tokens_per_s:.1f} to {default.tokens_per_s:.1f} tokens/s)"
    what = f"default loses at most {MOST_LOSS:.0%} of its throughput"
    goals.append(Goal(name, what, told, loss <= MOST_LOSS))
    goals.append(Goal(name, "no priority request is shed", str(priority.sheds), not priority.sheds))
    return goals


def total_change(rows: Sequence[Row]) -> float:
    """Return by which share all tokens a second together changed when priority came."""
    _, alone, priority, default = rows
    return (default.tokens_per_s + priority.tokens_per_s) / alone.tokens_per_s - 1


def _row(trial: Trial, phase: str, windows: Sequence[Window], tier: str) -> Row:
    mine = [answer for answer in trial.answers if answer.tier == tier]
    seen = first_tokens(trial, windows, tier)
    waits = [answer.queue_s for answer in seen if answer.queue_s is not None]
    ended = [a for a in mine if any(window.has(a.ended) for window in windows)]
    seconds = sum(window.seconds for window in windows)
    return Row(
        endpoint=trial.endpoint,
        phase=phase,
        tier=tier,
        count=len(seen),
        ttft_p50=percentile([answer.ttft for answer in seen], 0.5),
        ttft_p99=percentile([answer.ttft for answer in seen], 0.99),
        queue_p50=percentile(waits, 0.5),
        queue_p99=percentile(waits, 0.99),
        requests_per_s=sum(not answer.error for answer in ended) / seconds,
        tokens_per_s=tokens_in(mine, windows) / seconds,
        sheds=sum(t == tier and any(w.has(at) for w in windows) for at, t in trial.sheds),
        served=dict(Counter(answer.served for answer in ended if answer.served)),
        errors=sum(bool(answer.error) for answer in ended),
    )
