"""Holds requests to the budgets of their keys and tenants, on an ingress's event loop.

``app.tenants.spending`` describes how spend is added up over the ingresses. ``BudgetGate`` reads
the database for it, exchanges reports with the ``Limits`` deployment, and refuses requests.

A request is admitted while the known spend is below each hard budget. Before the spend was read
from the database once, a key with a hard budget is refused with 503: nothing is known of it. Only
of a period that has begun since the start of the ingress the reports are enough, if the database is
away. While the ``Limits`` deployment is away, an ingress goes by its own spend and by what it knew
of others.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import partial
from typing import Final, Protocol

from app import alarms, supervision
from app.core import errors
from app.store.database import StoreAway
from app.tenants.budget import Budget, Owner, SpendId
from app.tenants.budget_alert import BudgetAlert
from app.tenants.keys import ApiKey
from app.tenants.spending import (
    RENEWAL_S,
    RETRY_S,
    OwnSpend,
    Parts,
    SpendReport,
    Watch,
    level,
)

PATIENCE_S: Final = 1.0
"""How long an answer of the ``Limits`` deployment may take."""
FIRST_READ_S: Final = 10.0
"""How long a request waits for the first read of the database, of which an ingress has one for each
budget after its start."""
_READERS: Final = 3
_TRY_AGAIN_S: Final = 5.0
FORGET_EVERY_S: Final = 60.0
"""How often budgets are dropped whose period is over, or that are not used any more."""
_IDLE_WAIT_S: Final = 60.0

_log = logging.getLogger("ray.serve")


class SpendSource(Protocol):
    """Where the spend of other ingresses comes from: ``app.tenants.deployment``."""

    async def spend(self, report: SpendReport) -> Mapping[SpendId, Parts]:
        """Note what an ingress has spent; return what all have, by ingress."""
        ...


ReadSpend = Callable[[SpendId], Parts]
"""Reads spend from the database; may block, and raises ``StoreAway``."""


@dataclass(frozen=True, slots=True)
class BudgetState:
    """A budget at one moment.

    Attributes:
        budget: the budget.
        spent: what is spent in the present period, in USD; ``None`` if that is not known.
        resets: the day on which the next period begins; ``None`` for the total.
    """

    budget: Budget
    spent: Decimal | None
    resets: date | None

    @property
    def left(self) -> Decimal | None:
        """What is left, in USD; ``None`` if that is not known."""
        return None if self.spent is None else max(Decimal(0), self.budget.usd - self.spent)


@dataclass(frozen=True, slots=True)
class _Needed:
    """What requests of a key need on a day, so that it is not worked out for each of them."""

    budgets: tuple[Budget, ...]
    day: date
    watches: list[Watch]


def today_utc() -> date:
    """Return the day on the bill."""
    return datetime.now(UTC).date()


class BudgetGate:
    """The budgets that one ingress holds requests to. Belongs to its event loop.

    Args:
        ingress: the name of the ingress, as in its records.
        source: where the spend of other ingresses comes from.
        read: reads spend from the database.
        tell: is called with each alert, and must not wait.
        today: returns the day on the bill.

    Attributes:
        away: whether the last report was not answered.
        alerts: how many alerts there were, by percentage and whether the budget is hard.
    """

    def __init__(
        self,
        ingress: str,
        source: SpendSource,
        read: ReadSpend,
        tell: Callable[[BudgetAlert], None] = lambda alert: None,
        *,
        today: Callable[[], date] = today_utc,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.away = False
        self.alerts: Counter[tuple[int, bool]] = Counter()
        self._ingress = ingress
        self._source = source
        self._read = read
        self._tell = tell
        self._today = today
        self._patience_s = patience_s
        self._began = today()
        self._own = OwnSpend()
        self._watches: dict[SpendId, Watch] = {}
        # The same, for requests: those of an owner, and those that a key's requests need.
        self._of_key: dict[str, list[Watch]] = {}
        self._of_tenant: dict[str, list[Watch]] = {}
        self._needed: dict[str, _Needed] = {}
        self._forget_at = 0.0
        # Set to have a loop look again; replaced when something was learnt.
        self._to_report, self._to_read = asyncio.Event(), asyncio.Event()
        self._learnt = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start to exchange reports and to read the database."""
        self._tasks = [
            supervision.keep_running("budget reports", self._keep_reporting),
            # Of its own, so that no first read waits for one that is repeated.
            supervision.keep_running("budget reading", partial(self._keep_reading, first=False)),
        ]
        self._tasks += [
            supervision.keep_running("budget reading", partial(self._keep_reading, first=True))
            for _ in range(_READERS)
        ]

    async def stop(self) -> None:
        """Stop both."""
        await supervision.stop(*self._tasks)

    def read_from(self, read: ReadSpend) -> None:
        """Read spend from another database from now on. What is known is kept."""
        self._read = read

    def add(self, key_id: str, tenant: str, day: date, cost: Decimal) -> None:
        """Add what a request of this ingress has cost that arrived on a day."""
        if not cost:
            return
        self._own.add(key_id, tenant, day, cost)
        for watches in (self._of_key.get(key_id), self._of_tenant.get(tenant)):
            for watch in watches or ():
                if watch.grew(time.monotonic()):
                    self._to_report.set()

    async def require(self, key: ApiKey | None) -> None:
        """Refuse a request of a key if one of its hard budgets, or its tenant's, is spent.

        Raises:
            InsufficientQuota: one is spent.
            Unavailable: what was spent could not be read yet.
        """
        if key is None or not key.budgets:
            return
        came = time.monotonic()
        hard = [watch for watch in self._use(key, came) if watch.budget.hard]
        while True:
            self._refuse_spent(hard)
            missing = [watch for watch in hard if not self._is_current(watch)]
            if not missing:
                return
            waited_s = time.monotonic() - came
            if unknown := [watch for watch in missing if not self._is_known(watch)]:
                if waited_s > FIRST_READ_S or any(watch.read_failed for watch in unknown):
                    raise errors.spend_unknown(_TRY_AGAIN_S)
            elif waited_s > self._patience_s:
                # The report that nobody answers is about to be noted.
                return
            await self._learn(missing, came + FIRST_READ_S)

    async def states(self, key: ApiKey | None) -> list[BudgetState]:
        """Return the budgets of a key and its tenant, after learning what is spent."""
        if key is None or not key.budgets:
            return []
        came = time.monotonic()
        watches = self._use(key, came)
        ends = came + self._patience_s
        while missing := [watch for watch in watches if not self._is_current(watch)]:
            if time.monotonic() > ends:
                break
            await self._learn(missing, ends)
        return [
            BudgetState(
                watch.budget, self._spent(watch) if self._is_known(watch) else None, watch.id.end
            )
            for watch in watches
        ]

    @property
    def unread(self) -> int:
        """For how many budgets in use the last read of the database failed."""
        now = time.monotonic()
        return sum(each.read_failed and each.is_active(now) for each in self._watches.values())

    def __len__(self) -> int:
        """Return how many budgets it watches."""
        return len(self._watches)

    def _use(self, key: ApiKey, now: float) -> list[Watch]:
        """Return what a key's request needs, in the order of its budgets."""
        today = self._today()
        needed = self._needed.get(key.key_id)
        if needed is None or needed.budgets is not key.budgets or needed.day != today:
            watches = [self._watch(budget, today, now) for budget in key.budgets]
            needed = self._needed[key.key_id] = _Needed(key.budgets, today, watches)
        for watch, budget in zip(needed.watches, key.budgets, strict=True):
            if watch.use(budget, now):
                self._to_report.set()
        return needed.watches

    def _watch(self, budget: Budget, today: date, now: float) -> Watch:
        spend_id = budget.at(today)
        watch = self._watches.get(spend_id)
        if watch is None:
            watch = self._watches[spend_id] = Watch(budget, spend_id, now)
            self._of(spend_id.owner).setdefault(spend_id.name, []).append(watch)
            self._to_report.set()
            self._to_read.set()
        return watch

    def _of(self, owner: Owner) -> dict[str, list[Watch]]:
        return self._of_key if owner is Owner.KEY else self._of_tenant

    def _is_current(self, watch: Watch) -> bool:
        return self._is_known(watch) and (self.away or watch.is_fresh(time.monotonic()))

    def _is_known(self, watch: Watch) -> bool:
        """Return whether the sum means anything: it was read, or others report all of it."""
        start = watch.id.start
        is_new = start is not None and start > self._began
        return watch.known or (is_new and watch.read_failed)

    def _spent(self, watch: Watch) -> Decimal:
        return watch.spent(self._ingress, self._own.of(watch.id))

    def _refuse_spent(self, watches: Iterable[Watch]) -> None:
        # Also before all is known: what is known is never too much.
        if any(self._spent(watch) >= watch.budget.usd for watch in watches):
            raise errors.InsufficientQuota

    async def _learn(self, missing: Iterable[Watch], ends: float) -> None:
        """Wait until something was learnt, after having asked for what is missing."""
        now, learnt = time.monotonic(), self._learnt
        for watch in missing:
            if not watch.is_fresh(now):
                watch.hurry(now)
        self._to_report.set()
        self._to_read.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, ends - now)):
                await learnt.wait()

    def _note_learnt(self) -> None:
        self._learnt.set()
        self._learnt = asyncio.Event()

    async def _keep_reporting(self) -> None:
        while True:
            due = min((each.report_due() for each in self._watches.values()), default=math.inf)
            wait_s = due - time.monotonic()
            if wait_s > 0:
                await _woken(self._to_report, min(wait_s, _IDLE_WAIT_S))
                continue
            await self._report()

    async def _report(self) -> None:
        now = time.monotonic()
        self._forget(now)
        due = [each for each in self._watches.values() if each.report_due() <= now]
        report = SpendReport(self._ingress, {each.id: self._own.of(each.id) for each in due})
        try:
            async with asyncio.timeout(self._patience_s):
                answer = await self._source.spend(report)
        except Exception as error:
            alarms.PROCESS.raised("budgets not shared", "each ingress goes by what it knows", error)
            self.away = True
            await asyncio.sleep(RENEWAL_S)
        else:
            if self.away:
                _log.warning("spend is shared again")
            self.away = False
            for watch in due:
                watch.answered(answer.get(watch.id, {}), self._ingress, now)
        for watch in due:
            watch.reported(time.monotonic())
            self._alert(watch)
        self._note_learnt()

    async def _keep_reading(self, *, first: bool) -> None:
        while True:
            now = time.monotonic()
            waiting = [each for each in self._watches.values() if each.known is not first]
            watch = min(waiting, key=lambda each: each.read_due(now), default=None)
            wait_s = _IDLE_WAIT_S if watch is None else watch.read_due(now) - now
            if watch is None or wait_s > 0:
                await _woken(self._to_read, min(wait_s, RETRY_S))
                continue
            await self._read_spend(watch)

    async def _read_spend(self, watch: Watch) -> None:
        began = time.monotonic()
        watch.reads()
        try:
            parts = await asyncio.to_thread(self._read, watch.id)
        except StoreAway as error:
            alarms.PROCESS.raised(
                "budgets unread", f"what {watch.id.owner} {watch.id.name} has spent", error
            )
            watch.was_not_read(time.monotonic())
        except BaseException:
            # An error of our own, which the supervision of this task reports.
            watch.was_not_read(time.monotonic())
            raise
        else:
            watch.was_read(parts, self._ingress, began, time.monotonic())
        self._note_learnt()

    def _alert(self, watch: Watch) -> None:
        """Log, count and tell if the spend has reached another percentage of the budget."""
        if not self._is_known(watch):
            return
        budget, spent = watch.budget, self._spent(watch)
        reached = level(spent, budget.usd)
        if reached > watch.alerted:
            self.alerts[reached, budget.hard] += 1
            _log.warning(
                "budget of %s %s: %d %% reached, %s of %s USD spent (%s)%s", budget.owner,
                budget.name, reached, f"{spent:f}", f"{budget.usd:f}", budget.period,
                "; its requests are refused" if reached == 100 and budget.hard else "",
            )  # fmt: skip
            self._tell(BudgetAlert(budget, watch.id, reached, spent, datetime.now(UTC)))
        watch.alerted = reached

    def _forget(self, now: float) -> None:
        if now >= self._forget_at:
            self._forget_at = now + FORGET_EVERY_S
            today = self._today()
            for watch in [each for each in self._watches.values() if each.is_over(today, now)]:
                del self._watches[watch.id]
                of_owner = self._of(watch.id.owner)
                of_owner[watch.id.name].remove(watch)
                if not of_owner[watch.id.name]:
                    del of_owner[watch.id.name]
            self._needed.clear()


async def _woken(event: asyncio.Event, within_s: float) -> None:
    """Wait until an event is set, or for so long; then clear it."""
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await event.wait()
    event.clear()
