"""Rate limits of keys, enforced by several ingresses together. Pure: the time is passed in.

A limit is an amount (of requests or tokens) in any minute. One ``LimitBook`` tracks the usage of
all ingresses and hands out allowances. Each ingress takes from its own ``Allowance`` without a
message. The protocol has two messages. An ingress sends an ``Ask`` every ``RENEWAL_S``, and at once
when a request finds no allowance. It reports the amount used and the amount still held. The book
answers with a ``Given``.

The used and the held amount together never exceed the limit: an amount counts as held until it is
reported as used, and then for a minute. So the ingresses admit no more than the limit in any
minute, even if messages are late, lost or repeated:

- An ingress gives up by itself the amount that it does not need, and reports in its next ask what
  it then holds. The report is accurate: after a later ask has been sent, nothing that was given in
  answer to an earlier one is accepted.
- An allowance expires ``LEASE_S`` after the ask that it answers. If the book receives nothing from
  an ingress for longer than that, it counts the held amount as used.

A book knows only what it has received itself. If a book is lost with its process, a key may use up
to twice its limit in that minute: an error on our side must not hurt the client.

Tokens are charged as expected and corrected when the request has ended. If it used more, the limit
is exceeded by the difference, and as much less is given afterwards, over as many minutes as that
takes. So whenever a request is admitted, the ended requests have used on average no more than the
limit in each minute since the first, plus one limit.

Unused entries are dropped. A book drops ingresses that have been silent for longer than their usage
counts. An ingress drops limits of which it has nothing to report (``is_idle``). An ask contains the
figures of the last answered ask, so that a book that does not know the ingress counts the rest.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

MINUTE_S: Final = 60
RENEWAL_S: Final = 0.25
"""How often an ingress sends an ask for each recently used limit."""
LEASE_S: Final = 3.0
"""How long an allowance is valid without renewal."""
_SILENCE_S: Final = 2 * LEASE_S
_GONE_S: Final = _SILENCE_S + 2 * MINUTE_S
_AHEAD_S: Final = 2 * RENEWAL_S
_RATE_MEMORY_S: Final = 2.0
_URGENT_S: Final = RENEWAL_S / 10
_LEAST_RATE: Final = 0.1
_PATIENCE_S: Final = 1.0  # how long to wait for an answer


class Window:
    """The amount used in the last minute.

    Amounts are counted by whole seconds and kept until the end of their second is a minute ago. So
    an amount may count for up to a second too long, and never too short. A debt counts in addition
    to the minute, and gradually replaces the amounts that leave it.
    """

    def __init__(self) -> None:
        self._seconds: deque[list[int]] = deque()
        self._total = 0
        # There is a debt only while the minute contains amounts that it can replace.
        self._debt = 0

    def add(self, amount: int, now: float) -> None:
        """Count an amount now; a negative amount is subtracted."""
        if amount < 0:
            self.take_back(-amount)
            return
        second = math.floor(now)
        if self._seconds and self._seconds[-1][0] >= second:
            self._seconds[-1][1] += amount
        else:
            self._seconds.append([second, amount])
        self._total += amount

    def overdraw(self, amount: int, now: float, limit: int) -> None:
        """Count an amount that was not approved before. What exceeds the limit becomes a debt."""
        self.used(now)
        fits = min(amount, max(0, limit - self._total))
        self.add(fits, now)
        self._debt += amount - fits

    def take_back(self, amount: int) -> None:
        """Subtract an amount: first from the debt, then from the oldest amounts."""
        paid = min(self._debt, amount)
        self._debt -= paid
        amount -= paid
        for slot in self._seconds:
            taken = min(slot[1], amount)
            slot[1] -= taken
            self._total -= taken
            amount -= taken

    def used(self, now: float) -> int:
        """Return the amount used in the last minute, plus the debt."""
        while self._seconds and self._seconds[0][0] < math.floor(now) - MINUTE_S:
            second, gone = self._seconds.popleft()
            owed = min(self._debt, gone)
            self._debt -= owed
            self._total -= gone - owed
            if owed:
                self._seconds.append([second + MINUTE_S + 1, owed])
        return self._total + self._debt

    def frees_at(self, amount: int, now: float) -> float:
        """Return when this amount, or everything if that is less, will have left the minute."""
        amount = min(amount, self.used(now))
        if not self._total:
            return now
        # A debt of a whole minute or more repeats the minute unchanged.
        again = min(max(amount - 1, 0), self._debt) // self._total
        amount, debt = amount - again * self._total, self._debt - again * self._total
        seconds = deque((second, used) for second, used in self._seconds)
        while True:
            second, used = seconds.popleft()
            amount -= used
            if amount <= 0 or (not seconds and not debt):
                return second + (again + 1) * (MINUTE_S + 1.0)
            owed = min(debt, used)
            debt -= owed
            if owed:
                seconds.append((second + MINUTE_S + 1, owed))


@dataclass(frozen=True, slots=True)
class Ask:
    """The report and request of an ingress for one limit.

    Attributes:
        ingress: the name of the ingress; a restarted ingress gets another one.
        number: counts the asks of this ingress for this limit.
        sent_at: when it was sent, by the ingress's own clock; only returned in the answer.
        limit: the key's current limit.
        used: the total amount taken since the allowance was created.
        returned: the part of ``used`` that was not needed after all.
        held: the amount that it may still use.
        wanted: the additional amount that it requests.
        least: the smallest useful additional amount.
        overdrawn: the part of ``used`` beyond what had been expected.
        heard_used: ``used`` in the newest ask that was answered.
        heard_overdrawn: ``overdrawn`` in that ask.
    """

    ingress: str
    number: int
    sent_at: float
    limit: int
    used: int
    returned: int
    held: int
    wanted: int
    least: int
    overdrawn: int
    heard_used: int
    heard_overdrawn: int


@dataclass(frozen=True, slots=True)
class Given:
    """The book's answer to an ask.

    Attributes:
        answers: the number of the ask.
        sent_at: the ask's ``sent_at``.
        added: the additional amount that the ingress may use.
        remaining: the part of the limit that is neither used nor held by others.
        frees_in_s: in how many seconds more becomes free.
        reset_in_s: in how many seconds the whole limit is free, if nothing more is used.
        ingresses: how many ingresses use the limit.
    """

    answers: int
    sent_at: float
    added: int
    remaining: int
    frees_in_s: float
    reset_in_s: float
    ingresses: int = 1


@dataclass(slots=True)
class _Holding:
    number: int = 0
    used: int = 0
    returned: int = 0
    held: int = 0
    overdrawn: int = 0
    heard_at: float = -math.inf
    silent: bool = False


class LimitBook:
    """One limit, shared out among the ingresses."""

    def __init__(self) -> None:
        self._window = Window()
        self._holdings: dict[str, _Holding] = {}

    def answer(self, ask: Ask, now: float) -> Given:
        """Record the report of an ingress, and give it an allowance from the free amount."""
        self._note_silent(now)
        newest = self._record(ask, now)
        held = sum(holding.held for holding in self._holdings.values())
        free = ask.limit - self._window.used(now) - held
        speaking = sum(not holding.silent for holding in self._holdings.values())
        added = max(0, min(ask.wanted, free))
        if added < ask.least or not newest:
            added = 0
        self._holdings[ask.ingress].held += added
        others = held - ask.held
        return Given(
            ask.number,
            ask.sent_at,
            added,
            max(0, ask.limit - self._window.used(now) - others),
            max(0.0, self._window.frees_at(max(1, 1 - free), now) - now),
            max(0.0, self._window.frees_at(ask.limit, now) - now),
            speaking,
        )

    def is_idle(self, now: float) -> bool:
        """Return whether no ingress uses the limit, so that it can be dropped."""
        self._note_silent(now)
        everyone_silent = all(holding.silent for holding in self._holdings.values())
        return everyone_silent and self._window.used(now) == 0

    def _record(self, ask: Ask, now: float) -> bool:
        """Record the figures of an ask; return whether it is the newest of its ingress."""
        # The usage of an ingress that is new here was counted by a lost book, or was dropped. Only
        # usage that was never reported counts now.
        unknown = _Holding(
            used=ask.heard_used, returned=ask.returned, overdrawn=ask.heard_overdrawn
        )
        holding = self._holdings.setdefault(ask.ingress, unknown)
        if ask.number <= holding.number:
            return False
        holding.number = ask.number
        # Added and subtracted separately: the amount taken now stays for a minute, even if older
        # amounts are returned.
        overdrawn = ask.overdrawn - holding.overdrawn
        self._window.add(ask.used - holding.used - overdrawn, now)
        self._window.overdraw(overdrawn, now, ask.limit)
        self._window.take_back(ask.returned - holding.returned)
        holding.used, holding.returned, holding.held = ask.used, ask.returned, ask.held
        holding.overdrawn = ask.overdrawn
        holding.heard_at, holding.silent = now, False
        return True

    def _note_silent(self, now: float) -> None:
        for holding in self._holdings.values():
            if not holding.silent and now - holding.heard_at > _SILENCE_S:
                # The ingress may have used it before its lease expired. If it reports again, its
                # own figures correct this.
                self._window.add(holding.held, now)
                holding.used += holding.held
                holding.held, holding.silent = 0, True
        # Neither their used nor their held amounts count any more.
        gone = [name for name, one in self._holdings.items() if now - one.heard_at > _GONE_S]
        for name in gone:
            del self._holdings[name]


@dataclass(frozen=True, slots=True)
class LimitState:
    """The state of one limit of a key, for the headers of an answer."""

    limit: int
    remaining: int
    frees_in_s: float
    reset_in_s: float


class Allowance:
    """The amount that one ingress may still use of one limit. The limit may change at any time."""

    def __init__(self, ingress: str, limit: int) -> None:
        self.limit = limit
        self._ingress = ingress
        self._used = self._returned = self._held = self._number = 0
        # The amount beyond the expected one in ``_used``; and both figures at the last ask and at
        # the last answered ask.
        self._overdrawn = 0
        self._asked = self._heard = (0, 0)
        self._until = self._asked_at = self._given_at = -math.inf
        self._missed = self._missed_together = 0
        self._taken = self._needed = 0
        self._rate = 0.0
        self._net_before = 0
        self._given = Given(0, -math.inf, 0, 0, 0.0, 0.0)
        self._own = Window()
        self.alone = False
        self.ingresses = 1

    def take_alone(self, amount: int, now: float) -> bool:
        """Take an amount from this ingress's own part of the limit, while the book is away."""
        part = self._part
        amount, used = min(amount, self.limit), self._own.used(now)
        if used + min(amount, part) > part:
            return False
        # As in `put_right`: it may fall below zero, which is corrected when the book is back.
        self._held -= amount
        self._count(amount, now)
        return True

    def take(self, amount: int, now: float) -> bool:
        """Take an amount if it is available. Otherwise ``asks_at`` returns when to ask for it.

        A request that needs more than the whole limit is admitted when the whole limit is free.
        """
        amount = min(amount, self.limit)
        if now >= self._until or self._held < amount:
            if not self.is_refused(amount, now):
                # The answer must suffice for at least one of the requests, and should for all.
                self._missed = min(self._missed or amount, amount)
                self._missed_together += amount
            return False
        self._held -= amount
        self._count(amount, now)
        return True

    @property
    def _part(self) -> int:
        return split_limit(self.limit, max(self.ingresses, self._given.ingresses))

    def _count(self, amount: int, now: float) -> None:
        self._used += amount
        self._own.add(amount, now)
        # Refused amounts do not count, because nothing should be held for them.
        self._taken += amount

    def untake(self, amount: int) -> None:
        """Undo a ``take`` that was just made."""
        self._own.take_back(amount)
        self._used -= amount
        self._taken -= amount
        self._held += amount

    def put_right(self, difference: int, age_s: float, now: float) -> None:
        """Correct an amount that was taken ``age_s`` ago by the difference to the real usage.

        An amount that has left the last minute, or may have, is not given back.
        """
        if difference < 0 and age_s > MINUTE_S - LEASE_S:
            return
        more = max(difference, 0)
        if self.alone:
            # It is charged to the ingress's own part here; the book counts it for a minute.
            self._own.overdraw(more, now, self._part)
        else:
            self._own.add(more, now)
            self._overdrawn += more
        self._own.take_back(more - difference)
        self._used += more
        self._returned += more - difference
        self._held -= difference

    def asks_at(self) -> float:
        """Return when the next ask is due; infinity if there is nothing to report."""
        if self._given.answers != self._number:
            # A new ask would invalidate the answer to this one.
            return self._asked_at + _PATIENCE_S
        if self._missed or self._held > 2 * self._needed:
            # An amount that was given for a request and is not used is missing elsewhere.
            return self._asked_at + _URGENT_S
        said_all = self._net == self._net_before and self._held <= 0
        return math.inf if said_all else self._asked_at + RENEWAL_S

    def ask(self, now: float) -> Ask:
        """Return the ask to send now, and give up the amount that is not needed."""
        if now >= self._until:
            self._held = 0
        self._measure(now)
        self._needed = math.ceil(self._rate * _AHEAD_S)
        # Usage beyond the allowance is reported as used, and is corrected by that.
        self._held = max(0, min(self._held, self._needed))
        self._number += 1
        self._asked_at, self._net_before = now, self._net
        self._asked = self._used, self._overdrawn
        wanted = max(self._needed, self._missed_together) - self._held
        least = self._missed - self._held
        self._missed = self._missed_together = 0
        return Ask(
            self._ingress, self._number, now, self.limit, self._used, self._returned,
            self._held, max(wanted, 0), max(least, 0), self._overdrawn, *self._heard,
        )  # fmt: skip

    def receive(self, given: Given, now: float) -> None:
        """Apply an answer, unless it is late or repeated."""
        if given.answers != self._number or given.answers == self._given.answers:
            return
        self._held += given.added
        self._until = given.sent_at + LEASE_S
        self._given, self._given_at = given, now
        self._heard = self._asked

    def is_idle(self, now: float) -> bool:
        """Return whether it can be dropped: nothing of it counts here or in the book."""
        nothing_to_say = self.asks_at() == math.inf
        return nothing_to_say and now - self._asked_at > _GONE_S and not self._own.used(now)

    def is_refused(self, amount: int, now: float) -> bool:
        """Return whether the book has just reported that less than ``amount`` is left.

        ``amount`` is at most the limit.
        """
        just_said = now < self._given_at + RENEWAL_S
        return just_said and amount > self.standing(now).remaining

    def standing(self, now: float) -> LimitState:
        """Return the state of the limit, for the headers of an answer."""
        given, elapsed = self._given, now - self._given_at
        if self.alone:
            part = self._part
            used = self._own.used(now)
            return LimitState(
                self.limit,
                max(0, part - used),
                max(0.0, self._own.frees_at(max(1, 1 + used - part), now) - now),
                max(0.0, self._own.frees_at(max(used, 1), now) - now),
            )
        if elapsed == math.inf:
            return LimitState(self.limit, self.limit, 0.0, 0.0)
        since = self._net - self._net_before
        return LimitState(
            self.limit,
            max(0, min(self.limit, given.remaining - since)),
            max(0.0, given.frees_in_s - elapsed),
            max(0.0, given.reset_in_s - elapsed),
        )

    @property
    def _net(self) -> int:
        return self._used - self._returned

    def _measure(self, now: float) -> None:
        elapsed = now - self._asked_at
        if 0 < elapsed < math.inf:
            rate = self._taken / elapsed
            self._rate += (1 - math.exp(-elapsed / _RATE_MEMORY_S)) * (rate - self._rate)
            if self._rate < _LEAST_RATE:
                # Too low to hold anything for. Then nothing is left to report.
                self._rate = 0.0
        self._taken = 0


def rate_limit_headers(
    requests: LimitState | None, tokens: LimitState | None
) -> list[tuple[str, str]]:
    """Return OpenAI's ``x-ratelimit-*`` headers for the limits that the key has."""
    headers = []
    for name, standing in (("requests", requests), ("tokens", tokens)):
        if standing is not None:
            headers += [
                (f"x-ratelimit-limit-{name}", str(standing.limit)),
                (f"x-ratelimit-remaining-{name}", str(standing.remaining)),
                (f"x-ratelimit-reset-{name}", duration(standing.reset_in_s)),
            ]
    return headers


def duration(seconds: float) -> str:
    """Return a time in the format of OpenAI's headers: ``17ms``, ``1.5s``, ``6m0s``."""
    milliseconds = math.ceil(max(seconds, 0.0) * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{text}s" if minutes else f"{text}s"


def split_limit(limit: int, ingresses: int) -> int:
    """Return one ingress's part of a limit, used while the book is away."""
    return max(1, limit // max(ingresses, 1))
