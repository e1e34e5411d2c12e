"""Limits of keys, kept by several ingresses together. Pure: the time is passed in.

A limit is an amount (of requests, of tokens) in any minute. One ``LimitBook`` knows what all
ingresses have used and hands out allowances; each ingress takes from its own (``Allowance``)
without asking anybody. They speak in two messages: every ``RENEWAL_S``, and at once when a request
finds no allowance, the ingress sends an ``Ask``, which says what it has used and still holds, and
gets a ``Given``.

What is used and what is held never exceeds the limit together: an amount counts as held until it
is reported as used, and then for a minute. So the ingresses admit no more than the limit in any
minute, whatever messages are late, lost or repeated:

- The ingress gives up what it does not need by itself, and says in its next ask what it then
  holds. What it says is true: nothing that was given in answer to an earlier ask is taken after a
  later one has been sent.
- An allowance ends ``LEASE_S`` after the ask that it answers. The book counts what an ingress held
  as used when it has heard nothing for longer than that.

A book knows of an ingress what it has heard itself. Where one is lost, with the process that has
it, a key may use up to twice its limit in that minute: a fault of ours is not the client's.

Tokens are taken as expected and put right when the request has ended; where that is more than was
expected the limit is exceeded by the difference, and as much less is given afterwards, over as many
minutes as that takes. So whenever a request is let in, those that have ended have used no more on
average than the limit in each minute since the first, and one limit beside.

What is not used is forgotten: by a book the ingresses that have been silent for longer than what
they used counts, and by an ingress the limits that it has nothing to say of (``is_idle``). An ask
says what of its figures was heard, so that a book that does not know the ingress counts the rest.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

MINUTE_S: Final = 60
RENEWAL_S: Final = 0.25
"""How often an ingress asks for the limits that it used lately."""
LEASE_S: Final = 3.0
"""How long an allowance holds without being renewed."""
_SILENCE_S: Final = 2 * LEASE_S
_GONE_S: Final = _SILENCE_S + 2 * MINUTE_S
_AHEAD_S: Final = 2 * RENEWAL_S
_RATE_MEMORY_S: Final = 2.0
_URGENT_S: Final = RENEWAL_S / 10
_LEAST_RATE: Final = 0.1
_PATIENCE_S: Final = 1.0  # how long an answer is waited for


class Window:
    """What was used in the last minute.

    It is counted by whole seconds and kept until the last moment of its second is a minute ago: it
    may count an amount for a second too long, and never too short. A debt counts beside the minute
    and takes, bit by bit, the place of what leaves it.
    """

    def __init__(self) -> None:
        self._seconds: deque[list[int]] = deque()
        self._total = 0
        # There is none unless something is in the minute whose place it can take.
        self._debt = 0

    def add(self, amount: int, now: float) -> None:
        """Count an amount now; a negative one is taken back."""
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
        """Count an amount that nobody was asked for: a debt where it is more than the limit."""
        self.used(now)
        fits = min(amount, max(0, limit - self._total))
        self.add(fits, now)
        self._debt += amount - fits

    def take_back(self, amount: int) -> None:
        """Count so much less: of the debt, then of the oldest amounts, which would go first."""
        paid = min(self._debt, amount)
        self._debt -= paid
        amount -= paid
        for slot in self._seconds:
            taken = min(slot[1], amount)
            slot[1] -= taken
            self._total -= taken
            amount -= taken

    def used(self, now: float) -> int:
        """Return what was used in the last minute, with what is owed from before."""
        while self._seconds and self._seconds[0][0] < math.floor(now) - MINUTE_S:
            second, gone = self._seconds.popleft()
            owed = min(self._debt, gone)
            self._debt -= owed
            self._total -= gone - owed
            if owed:
                self._seconds.append([second + MINUTE_S + 1, owed])
        return self._total + self._debt

    def frees_at(self, amount: int, now: float) -> float:
        """Return when so much will have gone from it, or all, whichever is first."""
        amount = min(amount, self.used(now))
        if not self._total:
            return now
        # A debt of a whole minute and more has the minute come again, as it is.
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
    """What an ingress says of one limit.

    Attributes:
        ingress: its name, never used again after a restart.
        number: counts the asks of this ingress for this limit.
        sent_at: when it was sent, by the ingress's own clock; only handed back.
        limit: the limit, as the key has it now.
        used: how much it has taken in its whole life.
        returned: how much of that it has not needed after all.
        held: how much it may still use.
        wanted: how much more it would like to be given.
        least: less than this is of no use to it.
        overdrawn: how much of ``used`` was more than had been expected.
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
    """What the book answers.

    Attributes:
        answers: the number of the ask.
        sent_at: the ask's ``sent_at``.
        added: how much more the ingress may use.
        remaining: how much of the limit is neither used nor held by others.
        frees_in_s: in how many seconds more comes free.
        reset_in_s: in how many seconds all of it is free, if nothing more is used.
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
    """One limit, as it is shared out."""

    def __init__(self) -> None:
        self._window = Window()
        self._holdings: dict[str, _Holding] = {}

    def answer(self, ask: Ask, now: float) -> Given:
        """Take in what an ingress says, and give it a share of what is free."""
        self._note_silent(now)
        newest = self._hear(ask, now)
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
        """Whether nobody uses it, so that it can be forgotten."""
        self._note_silent(now)
        everyone_silent = all(holding.silent for holding in self._holdings.values())
        return everyone_silent and self._window.used(now) == 0

    def _hear(self, ask: Ask, now: float) -> bool:
        """Take in what an ask says, and return whether it is the newest of its ingress."""
        # What one that is new here has used came from a book that is lost, or was forgotten; but
        # what no book has heard of counts now.
        unknown = _Holding(
            used=ask.heard_used, returned=ask.returned, overdrawn=ask.heard_overdrawn
        )
        holding = self._holdings.setdefault(ask.ingress, unknown)
        if ask.number <= holding.number:
            return False
        holding.number = ask.number
        # Apart, since what is taken now stays for a minute, whatever is returned of older.
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
                # It may have used it before its lease ended. Should it speak again, its own
                # figures put this right.
                self._window.add(holding.held, now)
                holding.used += holding.held
                holding.held, holding.silent = 0, True
        # What it used counts no more, nor what it held.
        gone = [name for name, one in self._holdings.items() if now - one.heard_at > _GONE_S]
        for name in gone:
            del self._holdings[name]


@dataclass(frozen=True, slots=True)
class LimitState:
    """How a key stands with one of its limits, for the headers of an answer."""

    limit: int
    remaining: int
    frees_in_s: float
    reset_in_s: float


class Allowance:
    """What one ingress may still use of one limit, which may be changed at any time."""

    def __init__(self, ingress: str, limit: int) -> None:
        self.limit = limit
        self._ingress = ingress
        self._used = self._returned = self._held = self._number = 0
        # More than was expected: of ``_used``, and of that at the last ask and the last answer.
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
        """Take an amount of this ingress's own part of the limit, while the book is away."""
        part = self._part
        amount, used = min(amount, self.limit), self._own.used(now)
        if used + min(amount, part) > part:
            return False
        # As in `put_right`: it may fall below zero, and is made up for when the book is back.
        self._held -= amount
        self._count(amount, now)
        return True

    def take(self, amount: int, now: float) -> bool:
        """Take an amount if it is there; if it is not, ``asks_at`` says when to ask for it.

        A request that needs more than the whole limit gets by when all of it is there.
        """
        amount = min(amount, self.limit)
        if now >= self._until or self._held < amount:
            if not self.is_refused(amount, now):
                # One of them at least must get by with the answer; all should.
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
        # What is refused is not counted: nothing is to be held for it.
        self._taken += amount

    def untake(self, amount: int) -> None:
        """Undo a ``take`` that was just made."""
        self._own.take_back(amount)
        self._used -= amount
        self._taken -= amount
        self._held += amount

    def put_right(self, difference: int, age_s: float, now: float) -> None:
        """Correct what was taken ``age_s`` ago, by what was used more, or less.

        What has left the last minute, or may have, is not given back.
        """
        if difference < 0 and age_s > MINUTE_S - LEASE_S:
            return
        more = max(difference, 0)
        if self.alone:
            # Its own part pays for it here; the book counts it for a minute.
            self._own.overdraw(more, now, self._part)
        else:
            self._own.add(more, now)
            self._overdrawn += more
        self._own.take_back(more - difference)
        self._used += more
        self._returned += more - difference
        self._held -= difference

    def asks_at(self) -> float:
        """Return when the next ask is due; infinity if there is nothing to say."""
        if self._given.answers != self._number:
            # A new ask would make the answer to this one worthless.
            return self._asked_at + _PATIENCE_S
        if self._missed or self._held > 2 * self._needed:
            # What was given for one that then found too little is missing elsewhere.
            return self._asked_at + _URGENT_S
        said_all = self._net == self._net_before and self._held <= 0
        return math.inf if said_all else self._asked_at + RENEWAL_S

    def ask(self, now: float) -> Ask:
        """Return what to send now, and give up what is more than needed."""
        if now >= self._until:
            self._held = 0
        self._measure(now)
        self._needed = math.ceil(self._rate * _AHEAD_S)
        # What was used beyond the allowance is reported as used, and so made up for.
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
        """Take what was given, unless it comes too late or again."""
        if given.answers != self._number or given.answers == self._given.answers:
            return
        self._held += given.added
        self._until = given.sent_at + LEASE_S
        self._given, self._given_at = given, now
        self._heard = self._asked

    def is_idle(self, now: float) -> bool:
        """Whether it can be forgotten: nothing of it counts, here or where it has been heard of."""
        nothing_to_say = self.asks_at() == math.inf
        return nothing_to_say and now - self._asked_at > _GONE_S and not self._own.used(now)

    def is_refused(self, amount: int, now: float) -> bool:
        """Whether the book has said just now that so much, the limit at most, is not left."""
        just_said = now < self._given_at + RENEWAL_S
        return just_said and amount > self.standing(now).remaining

    def standing(self, now: float) -> LimitState:
        """Return what the headers of an answer say."""
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
                # Not worth holding anything for, and then nothing is left to say.
                self._rate = 0.0
        self._taken = 0


def rate_limit_headers(
    requests: LimitState | None, tokens: LimitState | None
) -> list[tuple[str, str]]:
    """Return OpenAI's ``x-ratelimit-*`` headers, for those limits that the key has."""
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
    """Return a time as OpenAI's headers write it: ``17ms``, ``1.5s``, ``6m0s``."""
    milliseconds = math.ceil(max(seconds, 0.0) * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{text}s" if minutes else f"{text}s"


def split_limit(limit: int, ingresses: int) -> int:
    """Return an ingress's part of a limit while there is no book to ask."""
    return max(1, limit // max(ingresses, 1))
