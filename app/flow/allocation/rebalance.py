"""Moves credits from what ingresses hold to what they should hold, with few moves. Pure.

``balance`` returns the terms of every ingress. A credit in transit from one ingress to another
serves no request, so each move needs a reason:

- Free credits go to the ingresses that need them most.
- If priority waits at an ingress, or less than half of its headroom is left, the ingresses with
  most free slots lend it some. An ingress lends the last half of its headroom only while priority
  waits.
- If priority waits and no ingress has a free slot, every ingress without waiting priority gives up
  the next slots that become free, as long as requests below priority run there. The waiting
  request gets the first of them.
- Otherwise an ingress gives up credits only if it holds more than its share and others can use
  them. It gives up free ones beyond its headroom. It gives up credits in use, as they become free,
  only for priority or for requests that have waited clearly longer than its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from app.core.tiers import Tier
from app.flow.allocation.fair_share import Share, Want, split

_TIERS = len(Tier)
# How much longer requests of a tier must have waited at one ingress than at another before slots in
# use are moved: this many seconds, by tier, or this share of the wait, whichever is more.
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
        """How many credits are unused."""
        return self.held - self.in_use


@dataclass(frozen=True, slots=True)
class Terms:
    """What an ingress gets in one pool now.

    Attributes:
        up_to: credits are added up to this many.
        at_most: it gives up credits beyond this many, as far as their slots are free.
        keep: how many free slots it keeps when it gives up credits.
        headroom: how many free slots it keeps for priority.
        urgent: whether it lacks slots for priority.
    """

    up_to: int
    at_most: int
    keep: int
    headroom: int
    urgent: bool


def balance(
    holdings: Sequence[IngressHoldings], *, slots: int, headroom: int, every: int, room: int
) -> list[Terms]:
    """Return the terms of each ingress in a pool.

    Args:
        holdings: one for each ingress, at least one.
        slots: all slots of the pool, headroom included.
        headroom: how many of them are kept for priority.
        every: the queue's ``starvation_every``.
        room: how many credits can be added now, over all ingresses.
    """
    shares = split(slots, headroom, every, [one.want for one in holdings])
    parties = [_Party(*pair) for pair in zip(holdings, shares, strict=True)]
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
    """One ingress during ``balance``: what it needs, lacks, lends and keeps."""

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
            wanted: whether others can use more credits than are free.
            priority_waits: whether priority waits at an ingress that lacks credits.
            oldest_s: the longest waits at ingresses that lack credits, in seconds, by tier.
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
        """Whether requests of one of these tiers have waited clearly longer elsewhere."""
        return any(
            there > here + max(margin, _OLDER_SHARE * here)
            for there, here, margin in zip(oldest_s, self.now.want.oldest_s, _OLDER_S, strict=False)
        )


def _oldest_s(parties: Sequence[_Party]) -> list[float]:
    """Return the longest waits where credits lack, by the highest tier that waits there."""
    oldest_s = [0.0] * _TIERS
    for party in parties:
        want = party.now.want
        if party.lacks and (rank := want.foremost) < _TIERS:
            oldest_s[rank] = max(oldest_s[rank], want.oldest_s[rank])
    return oldest_s


def _lend(parties: Sequence[_Party], lacking: int, priority_waits: bool) -> None:
    """Choose which ingresses lend slots for priority: one by one, where most are free."""
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
