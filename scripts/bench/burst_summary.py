"""What measured bursts amount to, and whether that meets the goals. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from statistics import median

from scripts.bench.burst import BurstTrial
from scripts.bench.load import Answer
from scripts.bench.summary import Goal, percentile
from scripts.bench.trial import Window

HEADROOM = "Frontline, headroom"
PREEMPTION = "Frontline, preemption"
"""The names of the endpoints that the goals are about."""

MOST_GROWTH = {True: 1.3, False: 2.0}
"""Burst TTFT p99 to that on the idle engine, by whether the engine is simulated."""
LEAST_LEAD = 5.0
MOST_LOSS = 0.03
LEAST_GAIN = 0.08


@dataclass(frozen=True, slots=True)
class BurstRow:
    """One endpoint. Times in seconds; ``nan`` where nothing was measured.

    Attributes:
        idle_p50: TTFT of the bursts on the idle engine.
        ttft_p50: TTFT of the bursts while the engine was saturated.
        count: how many first tokens of those there were.
        default_alone: default's tokens per second without bursts.
        default_with: the same with bursts.
        all_alone: tokens per second of all tiers without bursts.
        all_with: the same with bursts.
        taken: the share of the engine's time that the bursts take from the other tiers, by how long
            a burst takes on the idle engine, prompts included.
        met: answers of lower tiers that were running when a burst was sent.
        whole: those of them that ended with exactly the tokens that were asked for.
        longest_pause: between two events of one of them.
        preemptions: how often the engine suspended a request; ``None``: unknown.
        errors: how many requests failed otherwise than by 429, of all tiers.
        sheds: how many priority requests were answered 429.
        lowered: how many of them were served at another tier, where the server says which.
    """

    endpoint: str
    idle_p50: float
    idle_p99: float
    count: int
    ttft_p50: float
    ttft_p99: float
    default_alone: float
    default_with: float
    all_alone: float
    all_with: float
    taken: float
    met: int
    whole: int
    longest_pause: float
    preemptions: float | None
    errors: int
    sheds: int
    lowered: int

    @property
    def lost(self) -> float:
        """The share of default's tokens that it loses beyond the time that the bursts take."""
        return 1 - self.taken - self.default_with / self.default_alone


def row_of(trial: BurstTrial) -> BurstRow:
    """Return the row of one endpoint."""
    idle, burst = (ttfts(trial, windows) for windows in (trial.idle, trial.bursts))
    answers = [*trial.answers, *trial.unfinished]
    default = [answer for answer in answers if answer.tier == "default"]
    met = met_by_bursts(answers, trial.starts)
    priority = [answer for answer in trial.answers if answer.tier == "priority"]
    return BurstRow(
        endpoint=trial.endpoint,
        idle_p50=percentile(idle, 0.5),
        idle_p99=percentile(idle, 0.99),
        count=len(burst),
        ttft_p50=percentile(burst, 0.5),
        ttft_p99=percentile(burst, 0.99),
        default_alone=tokens_per_s(default, trial.alone),
        default_with=tokens_per_s(default, trial.bursts),
        all_alone=tokens_per_s(answers, trial.alone),
        all_with=tokens_per_s(answers, trial.bursts),
        taken=taken(trial),
        met=len(met),
        whole=sum(is_whole(answer) for answer in met),
        longest_pause=max(map(longest_pause, met), default=math.nan),
        preemptions=trial.preemptions,
        errors=sum(bool(answer.error) for answer in trial.answers),
        sheds=sum(answer.sheds for answer in priority),
        lowered=sum(answer.served not in ("", "priority") for answer in priority),
    )


def ttfts(trial: BurstTrial, windows: Sequence[Window]) -> list[float]:
    """Return the TTFT of every priority request that was sent in the windows and answered."""
    return [
        answer.ttft
        for answer in trial.answers
        if answer.tier == "priority"
        and answer.first
        and any(window.has(answer.started) for window in windows)
    ]


def taken(trial: BurstTrial) -> float:
    """Return the share of the engine's time that the bursts would take if nothing else ran.

    A burst's prompts yield no tokens, so tokens alone do not tell what it takes.
    """
    idle: list[Answer] = []
    lengths: list[float] = []
    sent = [one for one in trial.answers if one.tier == "priority" and one.first]
    for answer in sorted(sent, key=attrgetter("started")):
        if not any(window.has(answer.started) for window in trial.idle):
            continue
        if idle and answer.started > max(one.ended for one in idle):
            lengths.append(_length(idle))
            idle = []
        idle.append(answer)
    seconds = sum(window.seconds for window in trial.bursts)
    if not idle or not seconds:
        return math.nan
    lengths.append(_length(idle))
    return trial.share * len(trial.starts) * median(lengths) / seconds


def _length(burst: Sequence[Answer]) -> float:
    return max(answer.ended for answer in burst) - min(answer.started for answer in burst)


def tokens_per_s(answers: Sequence[Answer], windows: Sequence[Window]) -> float:
    """Return the tokens per second that came in the windows.

    A suspended answer brings nothing for a while, so its tokens are not spread evenly: each event
    counts when it came, as the tokens that an event of a whole answer has on average.
    """
    seconds = sum(window.seconds for window in windows)
    ended = [answer for answer in answers if answer.tokens and not answer.error]
    events = sum(len(answer.moments) for answer in ended)
    if not seconds or not events:
        return math.nan
    came = sum(
        bisect_left(answer.moments, window.end) - bisect_left(answer.moments, window.start)
        for answer in answers
        for window in windows
    )
    return came * sum(answer.tokens for answer in ended) / events / seconds


def met_by_bursts(answers: Sequence[Answer], starts: Sequence[float]) -> list[Answer]:
    """Return the answers of lower tiers that were running when a burst was sent."""
    return [
        answer
        for answer in answers
        if answer.tier != "priority"
        and answer.first
        and any(answer.first < start < answer.ended for start in starts)
    ]


def is_whole(answer: Answer) -> bool:
    """Whether an answer has exactly the tokens that were asked for, and its end."""
    return not answer.error and answer.tokens == answer.asked


def longest_pause(answer: Answer) -> float:
    """Return the longest time between two events of an answer, in seconds."""
    return max((after - before for before, after in pairwise(answer.moments)), default=0.0)


def goals_of(rows: Sequence[BurstRow], *, simulated: bool) -> list[Goal]:
    """Check what is promised, where those endpoints were measured that it is about."""
    by_name = {row.endpoint: row for row in rows}
    if (ours := by_name.get(PREEMPTION)) is None:
        return []
    goals = [_growth(ours, MOST_GROWTH[simulated]), _loss(ours), _whole(ours)]
    peers = [row for row in rows if row.endpoint not in (PREEMPTION, HEADROOM)]
    if peers:
        goals.append(_lead(ours, peers))
    if HEADROOM in by_name:
        goals.append(_gain(ours, by_name[HEADROOM]))
    return goals


def _growth(ours: BurstRow, most: float) -> Goal:
    growth = ours.ttft_p99 / ours.idle_p99
    told = f"{growth:.2f} x ({ours.idle_p99 * 1e3:.0f} to {ours.ttft_p99 * 1e3:.0f} ms)"
    what = f"burst TTFT p99 at most {most} x that on the idle engine"
    return Goal(ours.endpoint, what, told, growth <= most)


def _lead(ours: BurstRow, peers: Sequence[BurstRow]) -> Goal:
    best = min(peers, key=lambda row: row.ttft_p99)
    lead = best.ttft_p99 / ours.ttft_p99
    told = f"1/{lead:.1f} ({ours.ttft_p99:.3f} of {best.ttft_p99:.3f} s, {best.endpoint})"
    what = f"burst TTFT p99 at most 1/{LEAST_LEAD:.0f} of the best peer's"
    return Goal(ours.endpoint, what, told, lead >= LEAST_LEAD)


def _loss(ours: BurstRow) -> Goal:
    told = (
        f"{ours.lost:.1%} ({ours.default_alone:.1f} to {ours.default_with:.1f} tokens/s; bursts "
        f"take {ours.taken:.1%} of the time)"
    )
    what = f"default loses at most {MOST_LOSS:.0%} beyond what priority takes"
    return Goal(ours.endpoint, what, told, ours.lost <= MOST_LOSS)


def _gain(ours: BurstRow, headroom: BurstRow) -> Goal:
    gain = ours.default_alone / headroom.default_alone - 1
    told = f"{gain:+.1%} ({headroom.default_alone:.1f} to {ours.default_alone:.1f} tokens/s)"
    what = (
        f"default has at least {LEAST_GAIN:.0%} more throughput than with headroom, without bursts"
    )
    return Goal(ours.endpoint, what, told, gain >= LEAST_GAIN)


def _whole(ours: BurstRow) -> Goal:
    what = "every answer that a burst met is whole"
    return Goal(ours.endpoint, what, f"{ours.whole} of {ours.met}", 0 < ours.met == ours.whole)
