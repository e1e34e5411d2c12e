"""What keys and tenants have spent, added up over all ingresses. Pure: the time is passed in.

The spend of a key or tenant in a period is a sum of parts, one for each ingress process that ever
recorded requests. A part only grows, so of two values for it the greater one is right. The values
come from two places:

- the database, which has a part once the ingress has moved its records there;
- the ingress itself, which adds up what its requests have cost since its start. It sends the sum
  to the ``Limits`` deployment, and receives the parts of the others (``SpendBook``).

So values may be late, lost, repeated or in any order, and no request is counted twice or forgotten:
the records of a dead ingress are moved by another one (``app.ledger.adoption``) and then read from
the database. A sum that is known somewhere is never more than what was spent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from typing import Final

from app.core.pricing import EXACT
from app.tenants.budget import Budget, Owner, Period, SpendId

RENEWAL_S: Final = 0.25
"""How often an ingress reports the spend of a budget that is in use, and learns that of others."""
FRESH_S: Final = 0.5
"""How old the answer may be by which a request is admitted. Two renewals: normally none waits."""
IDLE_S: Final = 15.0
"""How often it does so for a budget that is not in use, so that a restarted book gets all parts."""
ACTIVE_S: Final = 5.0
"""How long after its last request a budget counts as in use."""
REREAD_S: Final = 60.0
"""How often the database is read again, for records of dead ingresses."""
RETRY_S: Final = 2.0
"""How soon it is read again after that has failed."""
UNUSED_S: Final = 3600.0
"""How long after its last request an ingress forgets a budget."""
GONE_S: Final = 600.0
"""When a book forgets a part that is not reported any more. The database has it by then."""
ALERTS: Final = (50, 80, 100)
"""The percentages of a budget at which there is an alert."""
_LOAD: Final = 50
"""A read is repeated after this many times its own duration at the soonest: at most 2 % of the
time is spent reading one budget."""
_ZERO: Final = Decimal(0)


@dataclass(frozen=True, slots=True)
class SpendReport:
    """What the requests of one ingress have cost since its start.

    Attributes:
        ingress: the name of the ingress; a restarted ingress gets another one.
        spent: the cost in USD.
    """

    ingress: str
    spent: Mapping[SpendId, Decimal]


Parts = Mapping[str, Decimal]
"""Cost in USD by ingress."""


class SpendBook:
    """The parts that ingresses have reported. Its loss costs nothing: they are reported again."""

    def __init__(self) -> None:
        self._parts: dict[SpendId, dict[str, tuple[Decimal, float]]] = {}
        self._forget_at = 0.0

    def answer(self, report: SpendReport, now: float) -> dict[SpendId, dict[str, Decimal]]:
        """Note a report, and return all parts of each sum in it."""
        if now >= self._forget_at:
            self._forget_at = now + GONE_S / 10
            self._forget(now)
        answer = {}
        for spend_id, amount in report.spent.items():
            parts = self._parts.setdefault(spend_id, {})
            known = parts.get(report.ingress, (_ZERO, now))[0]
            parts[report.ingress] = (max(known, amount), now)
            answer[spend_id] = {name: part for name, (part, _) in parts.items()}
        return answer

    def _forget(self, now: float) -> None:
        for spend_id, parts in list(self._parts.items()):
            kept = {name: part for name, part in parts.items() if now - part[1] < GONE_S}
            if kept:
                self._parts[spend_id] = kept
            else:
                del self._parts[spend_id]

    def __len__(self) -> int:
        """Return how many sums it knows."""
        return len(self._parts)


class OwnSpend:
    """What the requests of this ingress have cost since its start, in the present periods.

    It covers every key and tenant, also those without a budget: they may be given one later.
    """

    def __init__(self) -> None:
        self._keys: dict[str, _Sums] = {}
        self._tenants: dict[str, _Sums] = {}

    def add(self, key_id: str, tenant: str, day: date, cost: Decimal) -> None:
        """Add what a request has cost that arrived on a day."""
        for sums, name in ((self._keys, key_id), (self._tenants, tenant)):
            known = sums.get(name)
            if known is None:
                sums[name] = _Sums(day, cost, cost, cost)
            else:
                known.add(day, cost)

    def of(self, spend_id: SpendId) -> Decimal:
        """Return the sum of one owner and period."""
        sums = self._keys if spend_id.owner is Owner.KEY else self._tenants
        known = sums.get(spend_id.name)
        return _ZERO if known is None else known.of(spend_id.period, spend_id.start)


@dataclass(slots=True)
class _Sums:
    """What an owner has spent on the latest day, in its month, and in total.

    A request of a period that was over when it ended is not added to it: nothing is admitted by
    that period any more.
    """

    day: date
    of_day: Decimal
    of_month: Decimal
    of_total: Decimal

    def add(self, day: date, cost: Decimal) -> None:
        add = EXACT.add
        self.of_total = add(self.of_total, cost)
        if day == self.day:
            self.of_day, self.of_month = add(self.of_day, cost), add(self.of_month, cost)
            return
        same_month = (day.year, day.month) == (self.day.year, self.day.month)
        if same_month:
            self.of_month = add(self.of_month, cost)
        if day > self.day:
            self.day, self.of_day = day, cost
            if not same_month:
                self.of_month = cost

    def of(self, period: Period, start: date | None) -> Decimal:
        if period is Period.TOTAL:
            return self.of_total
        if period.start(self.day) != start:
            return _ZERO
        return self.of_day if period is Period.DAY else self.of_month


@dataclass(slots=True)
class Watch:
    """What one ingress knows of the spend for one budget, and when it has to learn more.

    Attributes:
        budget: the budget, as last seen.
        id: what is added up.
        used_at: when a request last needed it.
        read_at: when the database was last read; negative infinity for never.
        read_failed: whether the last read failed.
        answered_at: when the newest answered report was sent.
        alerted: the highest percentage for which there was an alert.
    """

    budget: Budget
    id: SpendId
    used_at: float
    read_at: float = -math.inf
    read_failed: bool = False
    answered_at: float = -math.inf
    alerted: int = 0
    _parts: dict[str, Decimal] = field(default_factory=dict)
    _others: Decimal = _ZERO
    _read_due: float = -math.inf
    _report_due: float = -math.inf

    def use(self, budget: Budget, now: float) -> bool:
        """Note that a request needs it; the amount may have changed.

        Returns:
            Whether the next report is due earlier than before.
        """
        self.budget, self.used_at = budget, now
        return self.grew(now)

    def grew(self, now: float) -> bool:
        """Note that a request of this ingress has ended; return as ``use`` does."""
        before, self._report_due = self._report_due, min(self._report_due, now + RENEWAL_S)
        return self._report_due < before

    @property
    def known(self) -> bool:
        """Whether the database was read, without which the sum means nothing."""
        return self.read_at > -math.inf

    def is_fresh(self, now: float) -> bool:
        """Return whether the parts of other ingresses were received a moment ago."""
        return now - self.answered_at <= FRESH_S

    def is_active(self, now: float) -> bool:
        """Return whether requests use it."""
        return now - self.used_at < ACTIVE_S

    def spent(self, ingress: str, own: Decimal) -> Decimal:
        """Return the sum, as far as it is known: never more than what was spent.

        Args:
            ingress: the name of this ingress.
            own: what its own requests have cost.
        """
        return EXACT.add(self._others, max(own, self._parts.get(ingress, _ZERO)))

    def merge(self, parts: Parts, ingress: str) -> None:
        """Take over parts, from the database or the book."""
        for name, part in parts.items():
            if part > self._parts.get(name, _ZERO):
                self._parts[name] = part
        self._others = total(part for name, part in self._parts.items() if name != ingress)

    def answered(self, parts: Parts, ingress: str, sent_at: float) -> None:
        """Take over the answer to the report that was sent at ``sent_at``."""
        self.merge(parts, ingress)
        self.answered_at = max(self.answered_at, sent_at)

    def reads(self) -> None:
        """Note that the database is being read; nobody else is to do so."""
        self._read_due = math.inf

    def was_read(self, parts: Parts, ingress: str, began: float, now: float) -> None:
        """Take over what was read from the database, between two times."""
        self.merge(parts, ingress)
        self.read_at, self.read_failed = now, False
        self._read_due = now + max(REREAD_S, _LOAD * (now - began))

    def was_not_read(self, now: float) -> None:
        """Note that the database could not be read."""
        self.read_failed, self._read_due = True, now + RETRY_S

    def read_due(self, now: float) -> float:
        """Return when the database is to be read; infinity if it was, and no request needs it."""
        return self._read_due if not self.known or self.is_active(now) else math.inf

    def report_due(self) -> float:
        """Return when the next report is due."""
        return self._report_due

    def hurry(self, now: float) -> None:
        """Have the next report sent at once: a request waits for the answer."""
        self._report_due = now

    def reported(self, now: float) -> None:
        """Note that a report was sent."""
        self._report_due = now + (RENEWAL_S if self.is_active(now) else IDLE_S)

    def is_over(self, today: date, now: float) -> bool:
        """Return whether its period has ended, or no request has needed it for long."""
        ended = self.id.end is not None and self.id.end <= today
        return ended or now - self.used_at > UNUSED_S


def level(spent: Decimal, usd: Decimal) -> int:
    """Return the highest of ``ALERTS`` that a spend has reached, or 0."""
    if usd == 0:
        return ALERTS[-1]
    return max((each for each in ALERTS if 100 * spent >= each * usd), default=0)


def total(parts: Iterable[Decimal]) -> Decimal:
    """Return an exact sum."""
    whole = _ZERO
    for part in parts:
        whole = EXACT.add(whole, part)
    return whole
