"""Credits: how many requests one ingress may place on each replica. Pure: the time is passed in.

A credit is an ingress's right to one slot of one replica. The Model actor's ``CreditAllocator``
(``app.flow.allocation.allocator``) grants credits; an ingress keeps them in ``Credits``. Two
messages carry them:

- The ingress sends a ``Demand`` with what it holds and wants, every ``RENEWAL_S``, or every
  ``QUIET_S`` while nothing changes.
- The Model answers with a ``Grant``, which adds credits and sets how many the ingress may keep.

The ingress gives up credits by itself, as soon as their slots are free, and reports that in its
next demand. ``app.flow.allocation.allocator`` states the invariant. The ingress keeps these rules:

- A grant is applied at most once, and never after a later one.
- Changes are reported within ``RENEWAL_S``. Of the demands due every ``RENEWAL_S``, only those are
  left out that would repeat the one before, which the Model has answered.
- A grant from a new Model is applied only if it answers the latest demand. The new Model has then
  learned from that demand what the ingress holds, or more.
- Credits that are closed when such a grant arrives are forgotten. The former Model may have granted
  them to others, which the new Model cannot know. Credits that are still open are kept: the former
  Model would have granted them to others only after they had closed, and it ended before.
- An ingress places nothing once it has received no answer and seen no failed renewal for
  ``SILENCE_S``, because its credits may have been granted to others. A failed renewal is evidence
  that the Model is down, and a Model that is down grants nothing; see ``Credits.renewal_failed``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from app.contracts.credits import Demand, Gathers, Grant
from app.core.tiers import PriorityMode, Tier
from app.flow.replica_slots import ReplicaSlots
from app.flow.slots import Offer, SlotTable

RENEWAL_S = 0.25
"""How often an ingress renews its credits while what it holds or wants changes, in seconds."""
URGENT_S = 0.025
"""Shortest interval of renewals while priority waits without a credit, or headroom is low, in
seconds. It doubles while renewals add no credits, up to ``RENEWAL_S``. The first such renewal is
sent at once, and so is one after credits were given up."""
SILENCE_S = 3.0
"""After this long without a demand from an ingress, its credits go to others, in seconds."""
QUIET_S = SILENCE_S / 3
"""How often an ingress renews its credits while nothing changes, in seconds. Often enough to keep
them if one of its demands is lost."""


class Credits:
    """The credits of one model in one ingress, and the requests running on them.

    Attributes:
        preemptions: how many slots requests took beyond the credits of a replica that preempts, by
            their tier: its engine suspends as many running requests of lower tiers.
    """

    def __init__(self, ingress: str) -> None:
        self.slot_table = SlotTable()
        self.preemptions: Counter[Tier] = Counter()
        self.ingresses = 1
        self._ingress = ingress
        self._number = 0
        self._sent_at = -math.inf
        self._life, self._applied = "", 0
        self._at_most: Mapping[str, int] = {}
        self._keep = 0
        self._for_tier: Mapping[str, Tier] = {}
        self._leave: Mapping[str, tuple[int, int]] = {}
        self._fresh_until = -math.inf
        self._gave_up = False
        self._urgency = 0
        self._urgent_pause = URGENT_S
        self._running: Counter[Tier] = Counter()
        # The time passed in last; when the next demand is due if nothing is urgent; and whether it
        # will differ from the last one.
        self._now = -math.inf
        self._due = -math.inf
        self._changed = True
        self._waited = False

    def set_replicas(self, offers: Iterable[Offer], mode: PriorityMode) -> None:
        """Apply which replicas there are; credits on others are given up."""
        self._note_change()
        self.slot_table.set_replicas(offers, mode)

    def occupy(self, replica: ReplicaSlots, tier: Tier, slots: int = 1) -> None:
        """Place a request on a replica that ``slot_table.find`` has returned."""
        self._note_change()
        self._running[tier] += slots
        if replica.kind.preempts and (over := replica.running + slots - replica.credit) > 0:
            self.preemptions[tier] += min(slots, over)
        self.slot_table.occupy(replica, tier, slots)

    @property
    def running(self) -> dict[Tier, int]:
        """How many slots running requests take, by tier."""
        return {tier: self._running[tier] for tier in Tier}

    def release(self, replica_id: str, tier: Tier, slots: int = 1) -> None:
        """Free the slots of a request that has ended; give up credits if too many are held."""
        self._note_change()
        self._running[tier] -= slots
        replica = self.slot_table[replica_id]
        pool = replica.kind.pool
        self.slot_table.occupy(replica, tier, -slots)
        if replica_id != self.slot_table.gathered:
            for _ in range(min(slots, self._surplus(pool))):
                if self.slot_table.give_up_at(replica, self._keep, self._tier_for(pool)):
                    self._gave_up = True
        self._give_up_at(replica_id)

    def advance(self, now: float) -> bool:
        """Apply the passing of time, and return whether that may have opened slots.

        Suspensions end. Credits that may have been granted to others are closed.
        """
        self._now = now
        self.slot_table.closed = not self.in_force(now)
        return self.slot_table.resume(now)

    def in_force(self, now: float) -> bool:
        """Return whether the credits may be used. If not, others may have been granted them."""
        return now < self._fresh_until

    def next_change(self) -> float:
        """Return when ``advance`` may next open a slot; infinity if never."""
        return self.slot_table.next_resume()

    def renewal_at(self, *, waits: bool, priority_waits: bool) -> float:
        """Return when the next demand is due.

        Args:
            waits: whether any request waits.
            priority_waits: whether a priority request waits.
        """
        urgency = self._urgency_now(priority_waits)
        if self._gave_up or urgency > self._urgency:
            return self._sent_at
        if urgency:
            return self._sent_at + self._urgent_pause
        return self._sent_at + RENEWAL_S if waits else self._due

    def demand(
        self,
        now: float,
        *,
        waiting: Mapping[Tier, int],
        oldest_s: Mapping[Tier, float],
        starving: int,
        gathers: Gathers | None = None,
    ) -> Demand:
        """Return the demand to send now."""
        self._number += 1
        self._now = self._sent_at = now
        self._due = now + RENEWAL_S
        self._gave_up = self._changed = False
        self._waited = any(waiting.values())
        urgency = self._urgency_now(waiting[Tier.PRIORITY] > 0)
        again = urgency and urgency == self._urgency
        self._urgent_pause = min(2 * self._urgent_pause, RENEWAL_S) if again else URGENT_S
        self._urgency = urgency
        return Demand(
            ingress=self._ingress,
            number=self._number,
            sent_at=now,
            life=self._life,
            applied=self._applied,
            held=self.slot_table.held(),
            running={tier: self._running[tier] for tier in Tier},
            waiting=waiting,
            oldest_s=oldest_s,
            starving=starving,
            taken=self.slot_table.taken(),
            gathers=gathers,
        )

    def receive(self, grant: Grant, now: float) -> None:
        """Apply a grant. One that arrives too late is ignored."""
        anew = grant.anew
        if grant.life == self._life:
            if grant.number <= self._applied:
                return
        elif grant.answers != self._number:
            return
        else:
            # The new Model cannot tell whether the former one has given these credits away.
            anew |= not self.in_force(now)
        self._life, self._applied = grant.life, grant.number
        self._fresh_until = max(self._fresh_until, grant.sent_at + SILENCE_S)
        self._at_most, self._keep = grant.at_most, grant.keep
        self._for_tier, self._leave = grant.for_tier, grant.leave
        self.ingresses = grant.ingresses
        if grant.headroom is not None:
            self.slot_table.headroom = grant.headroom
        if anew:
            self.slot_table.forget_credits()
        # A Model that still listens knows no limits, and sends no headroom.
        if grant.headroom is not None:
            self.slot_table.set_limits(grant.limits)
        for replica_id, added in grant.added.items():
            self.slot_table.add_credits(replica_id, added)
            self._urgent_pause = URGENT_S
        for pool in self._at_most:
            self._give_up(pool)
        for replica_id in self._leave:
            self._give_up_at(replica_id)
        if anew or grant.added:
            self._note_change()
        # A Model that still listens sends no headroom; demands go on until it does.
        elif grant.answers == self._number and grant.headroom is not None:
            self._be_quiet()
        self.advance(now)

    def renewal_failed(self, demand: Demand, now: float) -> None:
        """Keep using the credits held, because the Model could not be reached.

        A Model that is down grants nothing, and a new one first listens for ``SILENCE_S``. A
        renewal does not count if it was sent after ``SILENCE_S`` without an answer: the Model may
        have granted the credits to others before it went down.

        Only an ingress that is cut off from a live Model keeps using credits that others may hold
        too. Excess requests are then at most as many as the credits it holds, and the engine's own
        priority order absorbs them.
        """
        if self.in_force(demand.sent_at):
            self._fresh_until = max(self._fresh_until, demand.sent_at + SILENCE_S)
            self.advance(now)

    def _be_quiet(self) -> None:
        """Send the next demand after ``QUIET_S`` if it would repeat the last one."""
        if not (self._changed or self._waited):
            self._due = self._sent_at + QUIET_S

    def _note_change(self) -> None:
        """Make the next demand due when it would be if none had been left out."""
        if not self._changed:
            self._changed = True
            pauses = (self._now - self._sent_at) // RENEWAL_S + 1
            self._due = min(self._due, self._sent_at + pauses * RENEWAL_S)

    def _urgency_now(self, priority_waits: bool) -> int:
        return 2 if priority_waits else int(self.slot_table.headroom_is_low)

    def _surplus(self, pool: str) -> int:
        held = self.slot_table.credits_in(pool)
        return held - self._at_most.get(pool, held)

    def _give_up(self, pool: str) -> None:
        surplus = self._surplus(pool)
        tier = self._tier_for(pool)
        if surplus > 0 and self.slot_table.give_up(pool, surplus, self._keep, tier):
            self._gave_up = True

    def _give_up_at(self, replica_id: str) -> None:
        """Give up free credits on a replica where another ingress gathers slots."""
        left = self._leave.get(replica_id)
        replica = self.slot_table.get(replica_id) if left is not None else None
        if replica is None or left is None:
            return
        tier = self._tier_for(replica.kind.pool)
        # Headroom is kept elsewhere meanwhile.
        credits, free = left
        while (
            replica.credit > credits
            and replica.spare(tier) > free
            and self.slot_table.give_up_at(replica, 0, tier)
        ):
            self._gave_up = True

    def _tier_for(self, pool: str) -> Tier:
        return self._for_tier.get(pool, Tier.FLEX)
