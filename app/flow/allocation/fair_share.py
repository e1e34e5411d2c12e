"""Computes how many credits each ingress should have in the long run. Pure.

``split`` is a function of what every ingress runs and waits for; it returns one share for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from app.core.tiers import Tier

_TIERS = tuple(Tier)


@dataclass(frozen=True, slots=True)
class Want:
    """What one ingress uses of a pool, and what it would use if it could.

    Attributes:
        running: its running requests, by tier.
        waiting: its waiting requests, by tier.
        oldest_s: how long the oldest of them has waited, in seconds, by tier.
        starving: how many requests wait in tiers that are starving.
    """

    running: tuple[int, ...] = (0,) * len(_TIERS)
    waiting: tuple[int, ...] = (0,) * len(_TIERS)
    oldest_s: tuple[float, ...] = (0.0,) * len(_TIERS)
    starving: int = 0

    @property
    def by_tier(self) -> list[int]:
        """Running and waiting requests, by tier."""
        return [sum(pair) for pair in zip(self.running, self.waiting, strict=True)]

    @property
    def foremost(self) -> int:
        """The rank of the highest tier that waits; the number of tiers if no request waits."""
        return next((rank for rank, some in enumerate(self.waiting) if some), len(_TIERS))


@dataclass(frozen=True, slots=True)
class Share:
    """How many credits one ingress should have in the long run, ``headroom`` of them free."""

    credits: int
    headroom: int


def split(slots: int, headroom: int, every: int, wants: Sequence[Want]) -> list[Share]:
    """Return the share of each ingress in a pool.

    - The headroom is shared equally, so that every ingress has room for a burst of priority. Each
      gets at least one slot, beyond the pool's slots if there are too few (the floor).
    - If requests are starving, one in ``every`` of the other slots is for them first.
    - The remaining slots go by tier, the highest first. If a tier has more requests than slots are
      left, they are shared in proportion to its requests.
    - Slots without demand are shared among all ingresses, so that new requests find room.

    Args:
        slots: all slots, headroom included.
        headroom: how many of them are kept for priority.
        every: the queue's ``starvation_every``.
        wants: one for each ingress, at least one.
    """
    kept = _share_headroom(headroom, wants)
    shares, left = kept, slots - headroom
    starving = [want.starving for want in wants]
    ages = [max(want.oldest_s[1:]) for want in wants]
    steps = [(math.ceil(left / every), starving, ages)]
    for rank in range(len(_TIERS)):
        ages = [want.oldest_s[rank] for want in wants]
        steps.append((left, [want.by_tier[rank] for want in wants], ages))
    for most, wanted, ages in steps:
        given = _fill(min(most, left), wanted, ages)
        shares = _plus(shares, given)
        left -= sum(given)
    shares = _plus(shares, _apportion(left, [1 + sum(want.by_tier) for want in wants]))
    return [Share(*pair) for pair in zip(shares, kept, strict=True)]


def _share_headroom(headroom: int, wants: Sequence[Want]) -> list[int]:
    if not headroom:
        return [0] * len(wants)
    more = _apportion(headroom - len(wants), [1] * len(wants))
    return [1 + one for one in more]


def _fill(most: int, wanted: list[int], ages: Sequence[float]) -> list[int]:
    return wanted if sum(wanted) <= most else _apportion(most, wanted, ages)


def _plus(shares: list[int], more: list[int]) -> list[int]:
    return [one + another for one, another in zip(shares, more, strict=True)]


def _apportion(total: int, weights: Sequence[int], ages: Sequence[float] = ()) -> list[int]:
    """Divide ``total`` in proportion; the rest goes to the largest remainders, then ages."""
    whole = sum(weights)
    if total <= 0 or not whole:
        return [0] * len(weights)
    shares, rests = zip(*(divmod(total * weight, whole) for weight in weights), strict=True)
    given = list(shares)
    if short := total - sum(given):
        age = ages or [0.0] * len(given)
        order = sorted(range(len(given)), key=lambda i: (-rests[i], -age[i], i))
        for i in order[:short]:
            given[i] += 1
    return given
