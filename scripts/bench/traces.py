"""The requests that autoscaling is tried on: always the same ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from scripts.bench.fleet import Request

SLOTS = 8
SERVICE_S = 30.0
SERVICE_SIGMA = 0.8
MIX = (0.15, 0.65, 0.20)
"""Parts of the load that are priority, default and flex."""
BURST = 10.0
HOUR = 3600.0


@dataclass(frozen=True)
class Trace:
    """One course of the load.

    Attributes:
        shape: steady, diurnal, burst or priority burst.
        replicas: how many replicas the highest mean load keeps busy, every slot of them.
        start_s: how long an engine takes to start.
        seed: of everything random.
    """

    shape: str
    replicas: int
    start_s: float
    seed: int = 1

    @property
    def name(self) -> str:
        """How tables and plots call it."""
        start = f"{self.start_s:.0f} s" if self.start_s < 120 else f"{self.start_s / 60:.0f} min"
        return f"{self.shape}, {self.replicas} replicas, start {start}"

    @property
    def large(self) -> bool:
        """Whether days are shorter and answers longer, to keep the number of requests down."""
        return self.replicas > 100

    @property
    def service_s(self) -> float:
        """Mean time that a request keeps its slot, of a log-normal distribution."""
        return 4 * SERVICE_S if self.large else SERVICE_S

    @property
    def day_s(self) -> float:
        """How long a day lasts."""
        return (6 if self.large else 24) * HOUR

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return {"steady": 4 * HOUR, "diurnal": self.day_s}.get(self.shape, 3 * HOUR)

    @property
    def control_s(self) -> float:
        """How often policies are asked: often enough for the shape, seldom enough to simulate."""
        return 5.0 if self.shape in ("steady", "diurnal") else 1.0

    def level(self, rank: int, now: float) -> float:
        """Return the load of a tier, as a share of its highest."""
        if self.shape == "steady":
            return 1.0
        if self.shape == "diurnal":
            # The night is a sixth of the day's peak.
            return 0.583 - 0.417 * math.cos(2 * math.pi * now / self.day_s)
        # An hour each: twenty minutes of calm, ten of burst, and calm again.
        bursts = 1200.0 <= now % HOUR < 1800.0
        if self.shape == "priority burst" and rank > 0:
            return 0.5
        return 1.0 if bursts else 1.0 / BURST

    def requests(self) -> Iterator[Request]:
        """Yield every request, in the order of arrival."""
        random = Random(self.seed)
        mu = math.log(self.service_s) - SERVICE_SIGMA**2 / 2
        rates = [share * self.replicas * SLOTS / self.service_s for share in MIX]
        total, now = sum(rates), 0.0
        while (now := now + random.expovariate(total)) < self.seconds:
            [rank] = random.choices((0, 1, 2), rates)
            service_s = random.lognormvariate(mu, SERVICE_SIGMA)
            # Thinning: arrivals at the highest rate, of which as many count as the level says.
            if random.random() < self.level(rank, now):
                yield now, rank, service_s


SHAPES = ("steady", "diurnal", "burst", "priority burst")


def traces() -> list[Trace]:
    """Return all of them."""
    small = [Trace(s, r, start) for s in SHAPES for r in (1, 20) for start in (10.0, 600.0)]
    return small + [Trace(shape, 500, 120.0) for shape in SHAPES]
