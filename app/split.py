"""How many credits each ingress ought to have. Pure; the Model's ``CreditBook`` acts on it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from app.tiers import Tier

_TIERS = tuple(Tier)
# Of two ingresses that compete at the same tier one gives up slots in use only if the other's
# requests wait this much longer: a slot on its way between them serves nobody.
_OLDER_S = 1.0
_OLDER_SHARE = 0.1
_SOONER_S = 0.25


@dataclass(frozen=True, slots=True)
class Want:
    """What one ingress uses of a pool, and would use if it could.

    Attributes:
        running: its running requests, by tier.
        waiting: its waiting requests, by tier.
        oldest_s: how long the oldest of them has waited, by tier.
        starving: how many wait in tiers that starve.
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
        """The rank of the highest tier that waits, or the number of tiers if nobody does."""
        return next((rank for rank, some in enumerate(self.waiting) if some), len(_TIERS))


@dataclass(frozen=True, slots=True)
class Standing:
    """What one ingress wants, and the credits it holds and uses now."""

    want: Want
    held: int
    in_use: int

    @property
    def free(self) -> int:
        """Credits that nobody uses."""
        return self.held - self.in_use


@dataclass(frozen=True, slots=True)
class Share:
    """How many credits one ingress ought to have in the long run; ``headroom`` of them free."""

    credits: int
    headroom: int


@dataclass(frozen=True, slots=True)
class Terms:
    """What an ingress gets now.

    Attributes:
        up_to: credits are added up to this many, where slots are free.
        at_most: it gives up credits beyond this many.
        keep: how many free slots it keeps then.
        headroom: how many free slots it keeps for priority.
        urgent: whether it lacks slots for priority.
    """

    up_to: int
    at_most: int
    keep: int
    headroom: int
    urgent: bool


def balance(
    standings: Sequence[Standing], *, slots: int, headroom: int, every: int, room: int
) -> list[Terms]:
    """Return the terms of each ingress in a pool.

    Credits go towards the shares that ``split`` returns, with as little movement as may be:

    - An ingress whose priority requests wait, or that has less than half its headroom left, is
      lent free slots by those that have most of them. Nobody lends the second half of its
      headroom but where priority waits.
    - Who holds more than its share gives up slots in use only for priority, or for requests
      that have waited clearly longer than its own; else free ones beyond its headroom, and only
      while others have a use for them.

    Args:
        standings: one for each ingress, at least one.
        slots: all slots of the pool, headroom included.
        headroom: how many of them are kept for priority.
        every: the line's ``starvation_every``.
        room: how many slots nobody holds.
    """
    shares = split(slots, headroom, every, [standing.want for standing in standings])
    rows = [_Row(*pair) for pair in zip(standings, shares, strict=True)]
    claims = [sum(row.lacking for row in rows if row.need is need) for need in _Need]
    urgent = claims[_Need.PRIORITY_WAITS] + claims[_Need.LOW_HEADROOM]
    priority_waits = claims[_Need.PRIORITY_WAITS] > 0
    if urgent > room:
        _lend(rows, urgent - room, priority_waits)
    oldest_s = [0.0] * (len(_TIERS) + 1)
    for row in rows:
        if row.lacking:
            rank = row.now.want.foremost
            oldest_s[rank] = max(oldest_s[rank], row.oldest_s)
    wanted = sum(claims[: _Need.NONE]) > room
    return [
        Terms(
            # What is free goes to those who need it most.
            up_to=row.now.held + min(row.lacking, max(0, room - sum(claims[: row.need]))),
            at_most=row.at_most(wanted, priority_waits, oldest_s),
            keep=row.keep,
            headroom=row.share.headroom,
            urgent=row.urgent,
        )
        for row in rows
    ]


class _Need(IntEnum):
    """Why an ingress needs credits, the most pressing need first."""

    PRIORITY_WAITS = 0
    LOW_HEADROOM = 1
    OTHERS_WAIT = 2
    NONE = 3


class _Row:
    """One ingress while the balance is struck."""

    def __init__(self, now: Standing, share: Share) -> None:
        self.now = now
        self.share = share
        self.need = self._need()
        wanted = share.credits
        if self.urgent:
            wanted = max(wanted, now.in_use + share.headroom + now.want.waiting[0])
        self.lacking = max(0, wanted - now.held)
        self.lends = 0
        self.keep = share.headroom

    @property
    def urgent(self) -> bool:
        return self.need <= _Need.LOW_HEADROOM

    @property
    def oldest_s(self) -> float:
        ages, rank = self.now.want.oldest_s, self.now.want.foremost
        return ages[rank] if rank < len(ages) else 0.0

    def _need(self) -> _Need:
        waiting = self.now.want.waiting
        if waiting[0]:
            return _Need.PRIORITY_WAITS
        if 2 * self.now.free < self.share.headroom:
            return _Need.LOW_HEADROOM
        return _Need.OTHERS_WAIT if any(waiting) else _Need.NONE

    def at_most(self, wanted: bool, priority_waits: bool, oldest_s: Sequence[float]) -> int:
        share, now = self.share.credits, self.now
        most = now.held - self.lends
        if self.need is _Need.PRIORITY_WAITS and now.held > share:
            self.keep = 0
            if oldest_s[0] > now.want.oldest_s[0] + _SOONER_S:
                return share
        if self.need is _Need.PRIORITY_WAITS or (self.lacking and not self.lends):
            return now.held + self.lacking
        if now.held <= share:
            return most
        if not wanted:
            return min(most, share + max(1, share // 4))
        if priority_waits:
            self.keep = 0
            return min(most, share)
        pairs = zip(oldest_s, now.want.oldest_s, strict=False)
        if any(there > here + max(_OLDER_S, _OLDER_SHARE * here) for there, here in pairs):
            return min(most, share)
        return min(most, max(share, now.in_use + self.keep))


def _lend(rows: Sequence[_Row], lacking: int, priority_waits: bool) -> None:
    """Let those with most free slots lend them one by one.

    Where priority waits and nothing is free, all the others give up the next slots that come
    free: one of them will be the first.
    """
    lenders = []
    for index, row in enumerate(rows):
        row.keep = 0 if priority_waits else (row.share.headroom + 1) // 2
        if row.now.free > row.keep and (priority_waits or not row.urgent):
            lenders.append((-row.now.free, index))
    heapq.heapify(lenders)
    while lenders and lacking > 0:
        free, index = lenders[0]
        rows[index].lends += 1
        lacking -= 1
        if -free - 1 > rows[index].keep:
            heapq.heapreplace(lenders, (free + 1, index))
        else:
            heapq.heappop(lenders)
    if priority_waits and lacking > 0:
        for row in rows:
            if row.need is not _Need.PRIORITY_WAITS:
                row.lends += min(lacking, sum(row.now.want.running[1:]), row.now.in_use)


def split(slots: int, headroom: int, every: int, wants: Sequence[Want]) -> list[Share]:
    """Return the share of each ingress in a pool.

    The headroom is shared equally, so that everyone has room for a burst of priority: at least
    one slot each, beyond the slots if there are too few (the floor). The other slots go by tier,
    the highest first; where a tier's requests are more than what is left, in proportion to them.
    What nobody asks for goes to all, so that newcomers find room. Before all that, if anyone
    starves, one slot in ``every`` is for those who do.

    Args:
        slots: all slots, headroom included.
        headroom: how many of them are kept for priority.
        every: the line's ``starvation_every``.
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
    """Share out in proportion; what does not divide goes to the largest remainders, then ages."""
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
