"""Credits: what one ingress may place where. Pure: the time is passed in.

A credit is an ingress's right to one slot of one replica. The Model actor's ``CreditAllocator``
(``app.flow.allocation.allocator``) hands credits out; an ingress keeps them in ``Credits``. They
speak in two messages: every ``RENEWAL_S``, or ``QUIET_S`` while it would only repeat itself, the
ingress sends a ``Demand``, which says what it holds and wants, and gets a ``Grant``, which adds
credits and says how many it may keep. The ingress gives up credits by itself, as soon as their
slots are free, and says so in its next demand.

``app.flow.allocation.allocator`` says what these rules make sure of. The ingress's part in it:

- A grant is applied at most once, and never after a later one.
- What changes is told within ``RENEWAL_S``: of the demands that would be sent every ``RENEWAL_S``
  only those are left out that would say the same as the one before, which the Model has answered.
- A grant of another Model than the one known so far is applied only as the answer to the latest
  demand: what that Model has learned from it is then what the ingress holds, or more.
- Credits that are closed when such a grant comes are forgotten with it. The former Model may have
  given them away, and the new one cannot know it. Credits that are still open are kept: the former
  Model had ended by then, and would have given them away only once they are closed.
- An ingress that has neither had an answer nor seen a renewal fail for ``SILENCE_S`` places
  nothing, because its credits may have been given away. Failed renewals count as word that the
  Model is down, while which nobody gives credits away; see ``Credits.renewal_failed``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from app.contracts.credits import Demand, Grant
from app.core.tiers import PriorityMode, Tier
from app.flow.slots import Offer, ReplicaSlots, SlotTable

RENEWAL_S = 0.25
"""How often an ingress renews its credits while what it holds and wants changes."""
URGENT_S = 0.025
"""How soon it does so again while priority waits without a credit, or little headroom is left. The
pause doubles while asking brings nothing, up to ``RENEWAL_S``. The first time it asks at once, and
so it does when it has given up credits."""
SILENCE_S = 3.0
"""After this long without word from an ingress its credits are given to others."""
QUIET_S = SILENCE_S / 3
"""How often an ingress renews its credits while it has nothing new to say: so often that it keeps
them if one of its demands is lost."""


class Credits:
    """The credits of one model in one ingress, and the requests running on them."""

    def __init__(self, ingress: str) -> None:
        self.slot_table = SlotTable()
        self.ingresses = 1
        self._ingress = ingress
        self._number = 0
        self._sent_at = -math.inf
        self._life, self._applied = "", 0
        self._at_most: Mapping[str, int] = {}
        self._keep = 0
        self._fresh_until = -math.inf
        self._gave_up = False
        self._urgency = 0
        self._urgent_pause = URGENT_S
        self._running: Counter[Tier] = Counter()
        # Time as it was passed in last; when the next demand is due if nothing is urgent; and
        # whether it will say something else than the last one.
        self._now = -math.inf
        self._due = -math.inf
        self._changed = True
        self._waited = False

    def set_replicas(self, offers: Iterable[Offer], mode: PriorityMode) -> None:
        """Take over which replicas there are; credits on others are given up."""
        self._note_change()
        self.slot_table.set_replicas(offers, mode)

    def occupy(self, place: ReplicaSlots, tier: Tier) -> None:
        """Put a request on a place that ``slot_table.find`` has returned."""
        self._note_change()
        self._running[tier] += 1
        self.slot_table.change(place, running=1, others=int(tier is not Tier.PRIORITY))

    def release(self, replica_id: str, tier: Tier) -> None:
        """Take back the slot of a request that has ended, and give it up if there are too many."""
        self._note_change()
        self._running[tier] -= 1
        place = self.slot_table[replica_id]
        self.slot_table.change(place, running=-1, others=-int(tier is not Tier.PRIORITY))
        pool = place.kind.pool
        if self._surplus(pool) > 0 and self.slot_table.give_up_at(place, self._keep):
            self._gave_up = True

    def advance(self, now: float) -> bool:
        """Let time pass, and return whether that may have opened slots.

        Suspensions end, and credits that may have been given away are closed.
        """
        self._now = now
        self.slot_table.closed = now >= self._fresh_until
        return self.slot_table.resume(now)

    def next_change(self) -> float:
        """Return when ``advance`` may next open a slot by itself; infinity if never."""
        return self.slot_table.next_resume()

    def renewal_at(self, *, waits: bool, priority_waits: bool) -> float:
        """Return when the next demand is due, by who waits: anybody, and priority."""
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
        )

    def receive(self, grant: Grant, now: float) -> None:
        """Apply a grant; one that has come too late is ignored."""
        anew = grant.anew
        if grant.life == self._life:
            if grant.number <= self._applied:
                return
        elif grant.answers != self._number:
            return
        else:
            # The new Model cannot tell whether the former one has given these credits away.
            anew |= now >= self._fresh_until
        self._life, self._applied = grant.life, grant.number
        self._fresh_until = max(self._fresh_until, grant.sent_at + SILENCE_S)
        self._at_most, self._keep = grant.at_most, grant.keep
        self.ingresses = grant.ingresses
        if grant.headroom is not None:
            self.slot_table.headroom = grant.headroom
        if anew:
            self.slot_table.forget_credits()
        for replica_id, added in grant.added.items():
            self.slot_table.add_credits(replica_id, added)
            self._urgent_pause = URGENT_S
        for pool in self._at_most:
            self._give_up(pool)
        if anew or grant.added:
            self._note_change()
        # A Model that only listens says nothing of headroom; it is asked again until it does.
        elif grant.answers == self._number and grant.headroom is not None:
            self._be_quiet()
        self.advance(now)

    def renewal_failed(self, demand: Demand, now: float) -> None:
        """Go on with the credits held, as the Model could not be reached.

        A Model that is down gives nothing away, and a new one first listens for ``SILENCE_S``. But
        a renewal that was sent only after this ingress had been without word for ``SILENCE_S``
        does not count: the Model may have given its credits away before it went down.

        Only an ingress that is cut off from a Model that lives goes on with credits that may have
        been given to others. There can be as many too many requests as it holds credits, and the
        engine's own order absorbs them.
        """
        if demand.sent_at < self._fresh_until:
            self._fresh_until = max(self._fresh_until, demand.sent_at + SILENCE_S)
            self.advance(now)

    def _be_quiet(self) -> None:
        """Leave out demands, unless the next one would not say the same as the last one."""
        if not (self._changed or self._waited):
            self._due = self._sent_at + QUIET_S

    def _note_change(self) -> None:
        """Have the next demand sent when it would be due had none been left out."""
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
        if surplus > 0 and self.slot_table.give_up(pool, surplus, self._keep):
            self._gave_up = True
