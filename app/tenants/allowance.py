"""What one ingress may use of one limit, and the headers that tell clients of it. Pure.

``app.tenants.rate_limit`` describes the protocol between ``Allowance`` and ``LimitBook``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from app.tenants.rate_limit import GONE_S, LEASE_S, RENEWAL_S, Ask, Given
from app.tenants.window import MINUTE_S, Window

_AHEAD_S: Final = 2 * RENEWAL_S
_RATE_MEMORY_S: Final = 2.0
_URGENT_S: Final = RENEWAL_S / 10
_LEAST_RATE: Final = 0.1
_PATIENCE_S: Final = 1.0  # how long to wait for an answer


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
                self.want(amount)
            return False
        self._held -= amount
        self._count(amount, now)
        return True

    def want(self, amount: int) -> None:
        """Have the next ask keep or request an amount for a request that waits."""
        # The answer must suffice for at least one of the requests, and should for all.
        self._missed = min(self._missed or amount, amount)
        self._missed_together += amount

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
        self._held = max(0, min(self._held, max(self._needed, self._missed_together)))
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
        return nothing_to_say and now - self._asked_at > GONE_S and not self._own.used(now)

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
