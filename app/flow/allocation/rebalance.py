"""From what ingresses hold now towards what they ought to hold, with little movement. Pure.

A credit on its way from one ingress to another serves nobody, so moves need a reason:

- What is free goes to those who need it most.
- An ingress whose priority requests wait, or that has less than half its headroom left, is lent
  free slots by those that have most of them. Nobody lends the last half of its headroom but
  where priority waits.
- Where priority waits and nobody has a free slot, everyone without waiting priority gives up the
  next slots that come free, as long as other requests than priority run there: the first one is
  what the waiting request gets.
- Otherwise only those give up credits that hold more than their share, while others have a use
  for them: free ones beyond their headroom; and ones in use, as they come free, only for priority
  or for requests that have waited clearly longer than their own.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from app.core.tiers import Tier
from app.flow.allocation.fair_share import Share, Want, split

_TIERS = len(Tier)
# How much longer requests must have waited at one ingress than at another of the same tier before
# slots in use are moved: by so many seconds, or by a share of the wait if that is more.
_OLDER_S = (0.25, 1.0, 1.0)
_OLDER_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class IngressHoldings:
    """What one ingress wants of a pool, and the credits that it holds and uses there."""

    want: Want
    held: int
    in_use: int

    @property
    def free(self) -> int:
        """How many credits nobody uses."""
        return self.held - self.in_use


@dataclass(frozen=True, slots=True)
class Terms:
    """What an ingress gets now.

    Attributes:
        up_to: credits are added up to this many.
        at_most: it gives up credits beyond this many, as far as their slots are free.
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
    standings: Sequence[IngressHoldings], *, slots: int, headroom: int, every: int, room: int
) -> list[Terms]:
    """Return the terms of each ingress in a pool.

    Args:
        standings: one for each ingress, at least one.
        slots: all slots of the pool, headroom included.
        headroom: how many of them are kept for priority.
        every: the queue's ``starvation_every``.
        room: how many credits can be added to somebody's now.
    """
    shares = split(slots, headroom, every, [standing.want for standing in standings])
    parties = [_Party(*pair) for pair in zip(standings, shares, strict=True)]
    claims = [sum(party.lacks for party in parties if party.need is need) for need in _Need]
    priority_waits = claims[_Need.PRIORITY_WAITS] > 0
    urgent = claims[_Need.PRIORITY_WAITS] + claims[_Need.LOW_HEADROOM]
    if urgent > room:
        _lend(parties, urgent - room, priority_waits)
    wanted = sum(claims[: _Need.NONE]) > room
    oldest_s = _oldest_s(parties)
    terms = []
    for party in parties:
        at_most = party.at_most(wanted, priority_waits, oldest_s)
        added = min(party.lacks, max(0, room - sum(claims[: party.need])))
        up_to = party.now.held + added
        if added:
            at_most = max(at_most, up_to)
        terms.append(Terms(up_to, at_most, party.keep, party.share.headroom, party.urgent))
    return terms


class _Need(IntEnum):
    """Why an ingress needs credits, the most pressing need first."""

    PRIORITY_WAITS = 0
    LOW_HEADROOM = 1
    OTHERS_WAIT = 2
    NONE = 3


class _Party:
    """One ingress while the balance is struck: what it needs, lacks, lends and keeps."""

    def __init__(self, now: IngressHoldings, share: Share) -> None:
        self.now = now
        self.share = share
        self.need = self._need()
        self.urgent = self.need <= _Need.LOW_HEADROOM
        wanted = share.credits
        if self.urgent:
            wanted = max(wanted, now.in_use + share.headroom + now.want.waiting[0])
        self.lacks = max(0, wanted - now.held)
        self.lends = 0
        self.keep = share.headroom

    def _need(self) -> _Need:
        waiting = self.now.want.waiting
        if waiting[0]:
            return _Need.PRIORITY_WAITS
        if 2 * self.now.free < self.share.headroom:
            return _Need.LOW_HEADROOM
        return _Need.OTHERS_WAIT if any(waiting) else _Need.NONE

    def at_most(self, wanted: bool, priority_waits: bool, oldest_s: Sequence[float]) -> int:
        """Return how many credits it may keep.

        Args:
            wanted: whether others have a use for more credits than are free.
            priority_waits: whether priority waits at an ingress that lacks credits.
            oldest_s: how long requests have waited at such ingresses at most, by tier.
        """
        held, share = self.now.held - self.lends, self.share.credits
        if self.lends == 0 and self.lacks and not self._waits_less(oldest_s[:1]):
            return held + self.lacks
        if self.now.held <= share:
            return held
        if not wanted:
            return min(held, share + max(1, share // 4))
        if self.need is _Need.PRIORITY_WAITS:
            self.keep = 0
            return share if self._waits_less(oldest_s[:1]) else held
        if priority_waits:
            self.keep = 0
            return min(held, share)
        if self._waits_less(oldest_s):
            return min(held, share)
        return min(held, max(share, self.now.in_use + self.keep))

    def _waits_less(self, oldest_s: Sequence[float]) -> bool:
        """Whether requests have waited clearly longer elsewhere, in one of the first tiers."""
        return any(
            there > here + max(margin, _OLDER_SHARE * here)
            for there, here, margin in zip(oldest_s, self.now.want.oldest_s, _OLDER_S, strict=False)
        )


def _oldest_s(parties: Sequence[_Party]) -> list[float]:
    """Return how long requests have waited where credits lack, by the highest tier that waits."""
    oldest_s = [0.0] * _TIERS
    for party in parties:
        want = party.now.want
        if party.lacks and (rank := want.foremost) < _TIERS:
            oldest_s[rank] = max(oldest_s[rank], want.oldest_s[rank])
    return oldest_s


def _lend(parties: Sequence[_Party], lacking: int, priority_waits: bool) -> None:
    """Decide who lends slots for priority, one by one, from where most are free."""
    lenders: list[tuple[int, int]] = []
    for index, party in enumerate(parties):
        party.keep = 0 if priority_waits else (party.share.headroom + 1) // 2
        pressed = party.need is _Need.PRIORITY_WAITS if priority_waits else party.urgent
        if party.now.free > party.keep and not pressed:
            lenders.append((-party.now.free, index))
    heapq.heapify(lenders)
    while lenders and lacking > 0:
        minus_free, index = lenders[0]
        parties[index].lends += 1
        lacking -= 1
        if -minus_free - 1 > parties[index].keep:
            heapq.heapreplace(lenders, (minus_free + 1, index))
        else:
            heapq.heappop(lenders)
    if priority_waits and lacking > 0:
        for party in parties:
            if party.need is not _Need.PRIORITY_WAITS:
                others = sum(party.now.want.running[1:])
                party.lends += min(lacking, others, party.now.in_use)
