"""Allocates credits: which ingress may hold which slots. Pure: the time is passed in.

Each demand of an ingress is one event; ``renew`` returns the grant that answers it. The invariant
holds under any order, loss or delay of messages, crashes and restarts: **the credits that all
ingresses together can use on a replica never exceed its slots plus the floor.** The floor is the
smallest number per replica that lets every ingress have one slot for priority. It is 0 as long as
the headroom has a slot for each ingress.

``app.flow.allocation.fair_share`` and ``app.flow.allocation.rebalance`` compute how many credits
each ingress should have. ``CreditAllocator`` moves credits towards that, and never gives one slot
to two ingresses:

- An ingress may hold what it reported last, plus what was granted since and not yet reported back.
  A credit is added on a replica only if the sum of that over all ingresses is below the replica's
  slots (plus the floor).
- Nothing is taken from an ingress. A grant sets how many credits to keep. The ingress gives up a
  credit only with a free slot. The credit is free once the ingress reports that it no longer holds
  it.
- At most one grant to an ingress is in flight. It is repeated until it is acknowledged.
- An ingress is forgotten after ``SILENCE_S`` without a demand, and its credits are free. By then it
  has closed them itself (``app.flow.credits``). When it returns, it holds only the slots of its
  running requests, which count as held until they end. That is so with every Model: this one tells
  it to forget its credits, and with a Model started since it forgets them by itself.
- A Model that has just started adds nothing until it has listened for ``SILENCE_S`` and every
  ingress that it received a demand from has acknowledged one of its grants. Credits that the
  ingresses report count as held.

The running requests on a replica obey the same bound, with one exception: requests that an ingress
had running when it fell silent. They may exceed the bound while they run, because the Model cannot
know whether they still run. (A crashed ingress's requests end with its connections.) Neither bound
holds for an ingress that takes the Model to be down while it is not; see
``Credits.renewal_failed``.

On replicas whose engine preempts, credits are for default and flex. Slots taken by flex beyond the
credits do not count as held, because default takes them back. Priority obeys the limits of
``app.flow.allocation.preemption`` instead.

Where an ingress gathers slots for a large request, the others leave them to it
(``app.flow.allocation.gathering``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from app.config.queue import QueueSettings
from app.contracts.credits import Demand, Grant
from app.contracts.stats import Suspended
from app.core.tiers import Tier
from app.flow.allocation.fair_share import Want
from app.flow.allocation.gathering import Gathering
from app.flow.allocation.preemption import PreemptingReplicas
from app.flow.allocation.rebalance import IngressHoldings, Terms, balance
from app.flow.credits import RENEWAL_S, SILENCE_S

LOOK_AFTER_S = 1.1 * RENEWAL_S
"""How long after a renewal to call ``wakeups`` once more, in seconds."""
# An ingress without a demand for this long has nothing to report, with a margin for the transport:
# otherwise it would have renewed.
_QUIET_AFTER_S = 1.05 * RENEWAL_S
_TIERS = tuple(Tier)


@dataclass(frozen=True, slots=True)
class Capacity:
    """The slots of an engine replica.

    Attributes:
        replica_id: its name.
        pool: the pool that it belongs to.
        slots: how many sequences it runs at once.
        honours: whether priority is delivered on it.
        preempts: whether its engine suspends a running request for one of a better tier.
    """

    replica_id: str
    pool: str
    slots: int
    honours: bool
    preempts: bool = False


@dataclass(slots=True)
class _Pool:
    """The replicas of one pool."""

    replicas: dict[str, Capacity] = field(default_factory=dict)
    slots: int = 0
    # The slots on which priority is delivered, and those of them where headroom is kept.
    honouring_slots: int = 0
    kept_slots: int = 0
    headroom: int = 0
    # Credits that may be granted on each replica beyond its slots.
    floor: int = 0
    # The shares of an ingress's requests, and of its priority requests, that belong to this pool.
    part: float = 1.0
    priority_part: float = 1.0
    # How many credits can be added, by replica.
    room: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Account:
    """One ingress: what it may hold by replica, and the grant in flight to it."""

    demand: Demand
    renewed_at: float
    known: bool = False
    pending: Grant | None = None
    held: dict[str, int] = field(default_factory=dict)
    # What it wants, may hold and uses, by pool.
    holdings: dict[str, IngressHoldings] = field(default_factory=dict)
    # Slots on replicas that preempt that default would take back from flex, by pool.
    yields: Counter[str] = field(default_factory=Counter)
    # Whether it lacked slots for priority at its last grant.
    urgent: bool = False
    woken: bool = False


class CreditAllocator:
    """Which ingress may hold which credits of one model. Owned by the Model actor."""

    def __init__(self, life: str, settings: QueueSettings, now: float) -> None:
        self._life = life
        self._settings = settings
        self._numbers = 0
        self._listening_until = now + SILENCE_S
        self._listening = True
        self._accounts: dict[str, _Account] = {}
        self._held: Counter[str] = Counter()
        self._pools: dict[str, _Pool] = {}
        self._pool_of: dict[str, str] = {}
        # Cached terms of every ingress, by pool; dropped when their inputs change.
        self._cached_terms: dict[str, dict[str, Terms]] = {}
        self._cached_tiers: dict[str, Tier] = {}
        self._preempting = PreemptingReplicas(settings)

    def configure(self, settings: QueueSettings) -> None:
        """Apply changed settings."""
        self._settings = settings
        self._preempting.configure(settings)
        for pool in self._pools.values():
            self._size(pool)

    def set_replicas(self, capacities: Iterable[Capacity]) -> None:
        """Apply which replicas there are."""
        self._pools, self._pool_of = {}, {}
        capacities = list(capacities)
        preempting = {one.replica_id: one.slots for one in capacities if one.preempts}
        self._preempting.set_replicas(preempting)
        for capacity in capacities:
            pool = self._pools.setdefault(capacity.pool, _Pool())
            pool.replicas[capacity.replica_id] = capacity
            self._pool_of[capacity.replica_id] = capacity.pool
        for pool in self._pools.values():
            self._size(pool)
        slots = sum(pool.slots for pool in self._pools.values())
        honouring = sum(pool.honouring_slots for pool in self._pools.values())
        for pool in self._pools.values():
            pool.part = pool.slots / slots
            pool.priority_part = pool.honouring_slots / honouring if honouring else pool.part
        for account in self._accounts.values():
            self._sum_up(account)

    def demands(self, now: float) -> list[Demand]:
        """Return the latest demand of every ingress that is not silent."""
        self._forget_silent(now)
        return [account.demand for account in self._accounts.values()]

    def suspended(self, now: float) -> dict[Tier, Suspended]:
        """Return which requests engines have suspended, by tier."""
        self._forget_silent(now)
        return self._preempting.suspended(now)

    def renew(self, demand: Demand, now: float) -> Grant:
        """Record what an ingress holds and wants, and return its grant."""
        self._forget_silent(now)
        account = self._accounts.get(demand.ingress)
        if account is not None and demand.number > account.demand.number:
            self._update(account, demand, now)
        self._end_listening(now)
        if account is None:
            account = self._open(demand, now)
        if account.pending is None:
            self._grant(account)
        assert account.pending is not None
        limits = {} if self._listening else self._limits(demand.ingress, now)
        return replace(
            account.pending, answers=demand.number, sent_at=demand.sent_at, limits=limits
        )

    def wakeups(self, now: float) -> list[str]:
        """Return the ingresses that should renew now, before their next renewal is due.

        Such an ingress has slots to give up for others' priority, or lacks slots that are free
        now. Or it was quiet, and a renewal would have brought it changes by now. Waking them only
        reduces latency; correctness does not depend on it. An ingress is not returned again before
        it has renewed.
        """
        if self._listening:
            return []
        urgent = any(account.urgent for account in self._accounts.values())
        gathering = self._gathering()
        names = [
            name
            for name, account in self._accounts.items()
            if not account.woken
            and (
                self._should_leave(account, gathering)
                or self._should_renew(account, now, urgent=urgent)
            )
        ]
        for name in names:
            self._accounts[name].woken = True
        return sorted(names)

    def _should_renew(self, account: _Account, now: float, *, urgent: bool) -> bool:
        quiet = now - account.renewed_at >= _QUIET_AFTER_S
        sent = account.pending
        if quiet and sent is not None and sent.ingresses != len(self._accounts):
            return True
        return (urgent or quiet) and any(
            self._should_move(account, name, pool, urgent=urgent, quiet=quiet)
            for name, pool in self._pools.items()
        )

    def _should_move(
        self, account: _Account, name: str, pool: _Pool, *, urgent: bool, quiet: bool
    ) -> bool:
        """Whether an ingress has credits to give up in a pool, or would be given some."""
        held, terms = account.holdings[name].held, self._terms(name, pool)[account.demand.ingress]
        if pool.room and held < terms.up_to and (terms.urgent or quiet):
            return True
        # An ingress that already knows this limit gives credits up as soon as it can.
        known = account.pending.at_most.get(name) if account.pending else None
        return held > terms.at_most and (urgent or terms.at_most != known)

    def _should_leave(self, account: _Account, gathering: Gathering) -> bool:
        """Whether an ingress does not know yet that another one gathers slots where it has some."""
        known = account.pending.leave if account.pending is not None else {}
        return any(
            account.held.get(replica_id, 0) > sum(left) and replica_id not in known
            for replica_id, left in self._left_by(account, gathering).items()
        )

    def _gathering(self) -> Gathering:
        demands = [account.demand for account in self._accounts.values()]
        return Gathering(demands, self._pool_of)

    def _left_by(self, account: _Account, gathering: Gathering) -> dict[str, tuple[int, int]]:
        """Return how many credits an ingress keeps where another one gathers, and how many free."""
        ingress = account.demand.ingress

        def headroom(replica_id: str) -> int:
            name = self._pool_of[replica_id]
            pool = self._pools[name]
            # Headroom is kept elsewhere meanwhile, if there is anywhere else.
            return self._terms(name, pool)[ingress].headroom if len(pool.replicas) == 1 else 0

        return gathering.left_by(ingress, headroom)

    def _limits(self, ingress: str, now: float) -> dict[str, int]:
        """Return how many slots the priority requests of an ingress may take, by replica."""
        first = self._gathering().before_priority()
        return self._preempting.limits(ingress, now, first)

    def _open(self, demand: Demand, now: float) -> _Account:
        account = self._accounts[demand.ingress] = _Account(demand, now)
        self._preempting.report(demand, now)
        self._resize()
        # Once this Model has stopped listening, credits that a new ingress holds, if any, have been
        # granted to others. Its first grant revokes them, and only running requests count.
        self._take_stock(account, forget=not self._listening)
        if not self._listening:
            self._grant(account, anew=True)
        return account

    def _update(self, account: _Account, demand: Demand, now: float) -> None:
        account.demand, account.renewed_at, account.woken = demand, now, False
        pending = account.pending
        if pending is not None and demand.life == self._life and demand.applied >= pending.number:
            account.pending, account.known = None, True
        self._preempting.report(demand, now)
        self._take_stock(account)

    def _forget_silent(self, now: float) -> None:
        accounts = self._accounts
        silent = [name for name, a in accounts.items() if now - a.renewed_at >= SILENCE_S]
        for name in silent:
            self._preempting.forget(name, now)
            self._hold(accounts.pop(name), {})
        if silent:
            self._cached_terms.clear()
            self._resize()

    def _end_listening(self, now: float) -> None:
        if self._listening and now >= self._listening_until:
            self._listening = not all(account.known for account in self._accounts.values())

    def _next_grant(self, *, anew: bool) -> Grant:
        # Numbers are never reused in one life, not even for an ingress that returns.
        self._numbers += 1
        return Grant(self._life, self._numbers, 0, 0.0, anew, ingresses=len(self._accounts))

    def _grant(self, account: _Account, *, anew: bool = False) -> None:
        """Make the next grant to an ingress."""
        grant = self._next_grant(anew=anew)
        if not self._listening:
            added: dict[str, int] = {}
            at_most: dict[str, int] = {}
            for_tier: dict[str, Tier] = {}
            headroom = keep = 0
            account.urgent = False
            gathering = self._gathering()
            leave = self._left_by(account, gathering)
            gathers_on = gathering.replicas_of(account.demand.ingress)
            wanted = gathering.lacking(account.demand, account.held)
            for name, pool in self._pools.items():
                terms = self._terms(name, pool)[account.demand.ingress]
                lacking = terms.up_to - account.holdings[name].held
                gathered = {r: min(n, pool.room[r]) for r, n in wanted.items() if r in pool.room}
                added |= gathered
                added |= self._pick(account, pool, lacking, leave.keys() | gathered.keys())
                at_most[name] = terms.at_most
                if not pool.replicas.keys().isdisjoint(gathers_on):
                    # What it has gathered stays, whatever its share.
                    at_most[name] = max(at_most[name], account.holdings[name].held)
                    at_most[name] += sum(gathered.values())
                for_tier[name] = self._cached_tiers[name]
                headroom += terms.headroom
                keep += terms.keep
                account.urgent |= terms.urgent
            grant = replace(
                grant,
                added=added,
                at_most=at_most,
                headroom=headroom,
                keep=keep,
                for_tier=for_tier,
                leave=leave,
            )
        account.pending = grant
        if grant.added:
            self._take_stock(account)

    def _take_stock(self, account: _Account, *, forget: bool = False) -> None:
        """Count what an ingress may hold: what it reported, plus the grant in flight to it."""
        pending = account.pending
        forget |= pending is not None and pending.anew
        held = {
            replica_id: running if forget else max(credit, running)
            for replica_id, (credit, running) in account.demand.firm.items()
        }
        if pending is not None:
            for replica_id, added in pending.added.items():
                held[replica_id] = held.get(replica_id, 0) + added
        self._hold(account, held)
        self._sum_up(account)

    def _hold(self, account: _Account, held: dict[str, int]) -> None:
        old, account.held = account.held, held
        for replica_id in old.keys() | held.keys():
            change = held.get(replica_id, 0) - old.get(replica_id, 0)
            if change:
                self._held[replica_id] += change
                self._note_room(replica_id)

    def _sum_up(self, account: _Account) -> None:
        held: Counter[str] = Counter()
        firm: Counter[str] = Counter()
        running: Counter[str] = Counter()
        firm_at = account.demand.firm
        for replica_id, count in account.held.items():
            if (name := self._pool_of.get(replica_id)) is not None:
                held[name] += count
                firm[name] += firm_at.get(replica_id, (0, 0))[1]
                running[name] += account.demand.held.get(replica_id, (0, 0))[1]
        holdings = {
            name: IngressHoldings(
                _part(account.demand, pool), held[name], min(running[name], held[name])
            )
            for name, pool in self._pools.items()
        }
        yields = Counter({name: one.in_use - firm[name] for name, one in holdings.items()})
        if (holdings, yields) != (account.holdings, account.yields):
            account.holdings, account.yields = holdings, yields
            self._cached_terms.clear()

    def _resize(self) -> None:
        """Adjust the floor to the number of ingresses."""
        for pool in self._pools.values():
            if pool.floor != self._floor(pool):
                self._size(pool)

    def _floor(self, pool: _Pool) -> int:
        lacking = len(self._accounts) - pool.headroom
        return max(0, math.ceil(lacking / len(pool.replicas))) if pool.headroom else 0

    def _size(self, pool: _Pool) -> None:
        pool.slots = sum(replica.slots for replica in pool.replicas.values())
        honouring = [replica for replica in pool.replicas.values() if replica.honours]
        everywhere = self._settings.headroom_everywhere
        pool.honouring_slots = sum(replica.slots for replica in honouring)
        pool.kept_slots = sum(r.slots for r in honouring if everywhere or not r.preempts)
        pool.headroom = self._settings.headroom_of(pool.kept_slots)
        pool.floor = self._floor(pool)
        self._cached_terms.clear()
        pool.room = {}
        for replica_id in pool.replicas:
            self._note_room(replica_id)

    def _note_room(self, replica_id: str) -> None:
        name = self._pool_of.get(replica_id)
        if name is None:
            return
        self._cached_terms.clear()
        pool = self._pools[name]
        room = pool.replicas[replica_id].slots + pool.floor - self._held[replica_id]
        if room > 0:
            pool.room[replica_id] = room
        else:
            pool.room.pop(replica_id, None)

    def _terms(self, name: str, pool: _Pool) -> dict[str, Terms]:
        """Return the terms of every ingress in a pool."""
        if (terms_by_ingress := self._cached_terms.get(name)) is not None:
            return terms_by_ingress
        tier = self._cached_tiers[name] = self._lacking(name)
        terms = balance(
            [self._holdings(account, name, tier) for account in self._accounts.values()],
            slots=pool.slots,
            headroom=pool.headroom,
            every=self._settings.starvation_every,
            room=sum(pool.room.values()),
        )
        terms_by_ingress = self._cached_terms[name] = dict(zip(self._accounts, terms, strict=True))
        return terms_by_ingress

    def _lacking(self, name: str) -> Tier:
        """Return the best tier below priority that lacks credits in a pool; the lowest if none."""
        for account in self._accounts.values():
            holdings = account.holdings[name]
            if holdings.want.by_tier[0] + holdings.want.by_tier[1] > holdings.held:
                return Tier.DEFAULT
        return Tier.FLEX

    def _holdings(self, account: _Account, name: str, tier: Tier) -> IngressHoldings:
        """Return what an ingress holds; slots that would be given to ``tier`` are not in use."""
        holdings, yields = account.holdings[name], account.yields[name]
        if tier is Tier.FLEX or not yields:
            return holdings
        return replace(holdings, in_use=holdings.in_use - yields)

    def _pick(
        self, account: _Account, pool: _Pool, wanted: int, without: AbstractSet[str]
    ) -> dict[str, int]:
        """Choose where to add credits: where the ingress has fewest, then where most are free."""
        added: Counter[str] = Counter()
        held = account.held
        able = pool.room.keys() - without
        order = sorted(able, key=lambda r: (held.get(r, 0), -pool.room[r], r))
        while wanted > 0 and order:
            for replica_id in order[:wanted]:
                added[replica_id] += 1
                wanted -= 1
            order = [r for r in order if added[r] < pool.room[r]]
        return dict(added)


def _part(demand: Demand, pool: _Pool) -> Want:
    """Return what an ingress wants of a pool; ``pool.part`` scales its demand."""
    parts = (pool.priority_part, pool.part, pool.part)

    def scaled(counts: Mapping[Tier, int]) -> tuple[int, ...]:
        return tuple(math.ceil(counts[t] * p) for t, p in zip(_TIERS, parts, strict=True))

    ages = tuple(demand.oldest_s[tier] for tier in _TIERS)
    starving = math.ceil(demand.starving * pool.part)
    return Want(scaled(demand.running), scaled(demand.waiting), ages, starving)
