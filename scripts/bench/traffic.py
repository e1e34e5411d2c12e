"""Traffic for simulations: published traces, scaled so that their mean keeps a fleet busy.

- Traces of single requests are multiplied: each request becomes as many as the factor says, of
  different clients, within half a minute of it, so that the course of the minutes stays. Below a
  factor of 1, requests are left out at random. No request becomes more than ``COPIES``; beyond
  that each copy stands for several (its weight).
- ServeGen has rates by client. They are multiplied, and arrivals are drawn again: either single
  ones, as a renewal process with the client's coefficient of variation, or, as a fluid, the number
  in each tick, whose variance is that of such a process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scripts.bench.batching import Arrival
from scripts.bench.engine_model import EngineModel
from scripts.bench.trace_files import (
    WINDOW_S,
    Client,
    Floats,
    Requests,
    hashed_tiers,
    tiers_by_burstiness,
)

COPIES = 2
JITTER_S = 30.0
_CLASSES = 2


@dataclass(frozen=True)
class Traffic:
    """What arrives, in the order of time.

    Attributes:
        name: how tables call it.
        replicas: how many full replicas its mean keeps busy.
        seconds: how long it lasts.
        columns: time, tier's rank, prompt, output, context tokens and weight; one row each.
        work: replica-seconds, in a full batch, that each row asks for.
    """

    name: str
    replicas: int
    seconds: float
    columns: Floats
    work: Floats

    def arrivals(self) -> Iterator[Arrival]:
        """Yield what arrives."""
        for start in range(0, len(self.columns), 65536):
            for at, rank, *rest in self.columns[start : start + 65536].tolist():
                yield (at, int(rank), *rest)

    def part(self, start: float, end: float) -> Traffic:
        """Return a part of it, whose time starts at 0."""
        inside = (self.columns[:, 0] >= start) & (self.columns[:, 0] < end)
        columns = self.columns[inside].copy()
        columns[:, 0] -= start
        return Traffic(self.name, self.replicas, end - start, columns, self.work[inside])


def work_of(engine: EngineModel, columns: Floats) -> Floats:
    """Return the replica-seconds of each row of ``Traffic.columns`` in full batches."""
    _, _, prompt, output, context, weight = columns.T
    step_s = engine.decode_s(engine.slots, engine.slots * (context + output / 2))
    work: Floats = weight * (engine.token_s * prompt + output * step_s / engine.slots)
    return work


def multiply(name: str, requests: Requests, engine: EngineModel, replicas: int,
             seed: int = 1) -> Traffic:  # fmt: skip
    """Return a trace of single requests, scaled to a mean of so many full replicas."""
    random = np.random.default_rng(seed)
    ones = np.ones(len(requests.at))
    base = np.stack([requests.at, 0 * ones, requests.prompt, requests.output, requests.context,
                     ones], axis=1)  # fmt: skip
    factor = replicas * requests.seconds / float(work_of(engine, base).sum())
    weight = max(1.0, factor / COPIES)
    each = factor / weight
    copies = np.floor(each + random.random(len(ones))).astype(int)
    index = np.repeat(np.arange(len(ones)), copies)
    number = np.concatenate([np.arange(some) for some in copies]) if len(index) else index
    columns = base[index]
    if factor > 1:
        jitter = random.uniform(-JITTER_S, JITTER_S, len(index)) * (number > 0)
        columns[:, 0] = np.clip(columns[:, 0] + jitter, 0.0, requests.seconds)
    clients = (requests.client[index] * COPIES + number).tolist()
    columns[:, 1], columns[:, 5] = hashed_tiers(clients), weight
    columns = columns[np.argsort(columns[:, 0], kind="stable")]
    return Traffic(name, replicas, requests.seconds, columns, work_of(engine, columns))


def factor_of(clients: Sequence[Client], engine: EngineModel, replicas: int) -> float:
    """Return the factor at which ServeGen's clients keep so many full replicas busy on average."""
    busy = 0.0
    for client in clients:
        lengths = client.lengths
        columns = np.column_stack([np.zeros((len(lengths), 2)), lengths, lengths[:, 0],
                                   np.ones(len(lengths))])  # fmt: skip
        busy += client.rate.mean() * work_of(engine, columns).mean()
    return replicas / busy


def draw_requests(clients: Sequence[Client], engine: EngineModel, replicas: int,
                  window: int, windows: int, seed: int = 1,
                  cohort: int = 1) -> Traffic:  # fmt: skip
    """Return ServeGen's traffic as single requests, or cohorts, for some windows of 600 s.

    Args:
        clients: who sends.
        engine: what the scale is measured on.
        replicas: how many of it the mean of all windows keeps busy when full.
        window: the first one.
        windows: how many.
        seed: of the draws.
        cohort: how many requests a row stands for. They arrive together, but less irregularly, so
            that the number in a longer time varies as that of single ones does.
    """
    random = np.random.default_rng((seed, window))
    factor, shares = factor_of(clients, engine, replicas), tiers_by_burstiness(clients)
    rows = []
    for number, client in enumerate(clients):
        for offset in range(windows):
            rate = client.rate[window + offset] * factor / cohort
            at = _renewals(random, rate, client.cv[window + offset] / np.sqrt(cohort))
            rank = random.choice(len(shares[number]), len(at), p=shares[number])
            lengths = client.lengths[random.integers(len(client.lengths), size=len(at))]
            rows.append(np.column_stack([at + offset * WINDOW_S, rank, lengths, lengths[:, 0],
                                         np.full(len(at), float(cohort))]))  # fmt: skip
    columns = np.concatenate(rows)
    columns = columns[np.argsort(columns[:, 0], kind="stable")]
    return Traffic("ServeGen", replicas, windows * WINDOW_S, columns, work_of(engine, columns))


def _renewals(random: np.random.Generator, rate: float, cv: float) -> Floats:
    """Return the arrivals of a window: times between them are of a Gamma distribution."""
    if rate <= 0:
        return np.empty(0)
    shape = 1.0 / max(cv, 0.05) ** 2
    mean = rate * WINDOW_S
    number = int(mean + 6 * max(1.0, cv) * np.sqrt(mean) + 20)
    gaps: Floats = random.gamma(shape, 1.0 / (rate * shape), number)
    at: Floats = np.cumsum(gaps) - gaps[0] * random.random()
    return np.extract(at < WINDOW_S, at)


def draw_fluid(clients: Sequence[Client], engine: EngineModel, replicas: int, tick_s: float,
               first: int = 0, last: int | None = None, seed: int = 1) -> Traffic:  # fmt: skip
    """Return ServeGen's traffic as a fluid: for each tick and tier, a few cohorts.

    A tier's requests in a tick are two cohorts: the shorter half of its work and the longer one.

    Args:
        clients: who sends.
        engine: what the scale is measured on.
        replicas: how many of it the mean keeps busy when full.
        tick_s: how long a tick is; a divisor of 600 s.
        first, last: windows of 600 s, the last one excluded.
        seed: of the draws.
    """
    random = np.random.default_rng((seed, first))
    factor, shares = factor_of(clients, engine, replicas), tiers_by_burstiness(clients)
    ticks = int(WINDOW_S / tick_s)
    last = len(clients[0].rate) if last is None else last
    windows = last - first
    tiers = shares.shape[1]
    # By tier, class and tick: number, prompt tokens, output tokens.
    sums = np.zeros((tiers, _CLASSES, windows * ticks, 3))
    for number, client in enumerate(clients):
        mean = np.repeat(client.rate[first:last] * factor, ticks) * tick_s
        spread = np.repeat(np.maximum(client.cv[first:last], 0.05) ** 2, ticks)
        # The number of renewals in a time of mean m has a variance of cv² m, for a long time.
        counts = np.where(mean > 0, random.gamma(np.maximum(mean / spread, 1e-9), spread), 0.0)
        halves = _halves(client.lengths)
        for rank in range(tiers):
            for kind, (share, lengths) in enumerate(halves):
                some = counts * shares[number, rank] * share
                sums[rank, kind, :, 0] += some
                sums[rank, kind, :, 1:] += some[:, None] * lengths
    return _as_traffic(engine, replicas, sums, tick_s)


def _halves(lengths: Floats) -> list[tuple[float, Floats]]:
    """Return the shorter and the longer half of pairs of lengths: share, mean lengths."""
    order = np.argsort(lengths[:, 1], kind="stable")
    parts: list[NDArray[np.int64]] = np.array_split(order, _CLASSES)
    return [(len(p) / len(order), lengths[p].mean(axis=0)) for p in parts if len(p)]


def _as_traffic(engine: EngineModel, replicas: int, sums: Floats, tick_s: float) -> Traffic:
    tiers, classes, ticks, _ = sums.shape
    rows = []
    for rank in range(tiers):
        for kind in range(classes):
            number, prompt, output = sums[rank, kind].T
            present = number > 1e-6
            # Spread over the tick, so that it is not one burst.
            offset = tick_s * (rank * classes + kind) / (tiers * classes)
            at = np.arange(ticks)[present] * tick_s + offset
            number, prompt, output = number[present], prompt[present], output[present]
            rows.append(np.column_stack([at, np.full(len(at), rank), prompt / number,
                                         output / number, prompt / number, number]))  # fmt: skip
    columns = np.concatenate(rows)
    columns = columns[np.argsort(columns[:, 0], kind="stable")]
    return Traffic("ServeGen", replicas, ticks * tick_s, columns, work_of(engine, columns))
