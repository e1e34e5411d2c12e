"""The limits of all keys: at one ingress (``RateLimiter``), and where they are shared out
(``LimitBooks``). Pure: the time is passed in.

Whoever wires them calls ``take`` for a request. If it is refused, ``asks`` are sent to the books
at once and ``take`` is called once more with their answer; what is then refused gets 429. Beside
that asks are sent whenever ``next_ask`` says. One ingress alone can have the books beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from app.tenants.keys import ApiKey
from app.tenants.rate_limit import (
    MINUTE_S,
    Allowance,
    Ask,
    Given,
    LimitBook,
    LimitState,
    rate_limit_headers,
)

_FORGET_EVERY_S: Final = float(MINUTE_S)


class Measure(StrEnum):
    """What a limit is on."""

    REQUESTS = "requests"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class OverLimit:
    """Why a request is refused: the limit, and in how many seconds there is more of it."""

    measure: Measure
    limit: int
    retry_after_s: float


class RateLimiter:
    """What one ingress may still use of every limit of every key."""

    def __init__(self, ingress: str) -> None:
        self._ingress = ingress
        self._allowances: dict[str, Allowance] = {}
        self._made = 0
        self._forget_at = 0.0
        self._alone = False
        self._ingresses = 1

    def set_alone(self, alone: bool, ingresses: int = 1) -> None:
        """Note whether the books are away, so that the ingress's own part of each limit holds.

        Args:
            alone: whether they are.
            ingresses: how many ingresses there are, as far as is known here. A limit is split
                among these, or among those that have used it where the books said that those are
                more.
        """
        self._alone, self._ingresses = alone, ingresses

    def take(self, key: ApiKey, tokens: int, now: float) -> OverLimit | None:
        """Take a request of so many expected tokens, or say which limit it is over."""
        if not key.limits.any_rate:
            return None
        taken: list[tuple[Allowance, int]] = []
        over: OverLimit | None = None
        for measure, allowance, amount in self._needed(key, tokens):
            # Each is tried, so that all that is missing is asked for at once.
            if allowance.take_alone(amount, now) if self._alone else allowance.take(amount, now):
                taken.append((allowance, amount))
            elif over is None:
                over = OverLimit(measure, allowance.limit, allowance.standing(now).frees_in_s)
        if over is not None:
            for allowance, amount in taken:
                allowance.untake(amount)
        return over

    def is_refused(self, key: ApiKey, tokens: int, now: float) -> bool:
        """Whether the books have said just now that one of its limits has not so much left."""
        needed = self._needed(key, tokens)
        return any(allowance.is_refused(amount, now) for _, allowance, amount in needed)

    def put_right(self, key: ApiKey, expected: int, used: int, age_s: float, now: float) -> None:
        """Correct the tokens of a request that was taken ``age_s`` ago and has ended."""
        allowance = self._of(key, Measure.TOKENS)
        if allowance is not None:
            allowance.put_right(used - min(expected, allowance.limit), age_s, now)

    def headers(self, key: ApiKey, now: float) -> list[tuple[str, str]]:
        """Return the headers that tell a client how it stands."""
        if not key.limits.any_rate:
            return []
        requests, tokens = (self._standing(key, measure, now) for measure in Measure)
        return rate_limit_headers(requests, tokens)

    def next_ask(self) -> float:
        """Return when ``asks`` next has something to send; infinity if nothing is used."""
        return min((each.asks_at() for each in self._allowances.values()), default=float("inf"))

    def asks(self, now: float) -> dict[str, Ask]:
        """Return what to send to the books now, by the name of the limit."""
        self._forget(now)
        due = {name: each for name, each in self._allowances.items() if each.asks_at() <= now}
        return {name: allowance.ask(now) for name, allowance in due.items()}

    def receive(self, answers: Mapping[str, Given], now: float) -> None:
        """Take what the books have answered."""
        for name, given in answers.items():
            if name in self._allowances:
                self._allowances[name].receive(given, now)

    def _forget(self, now: float) -> None:
        """Forget limits that have not been used for long, such as those of keys that are gone."""
        if now >= self._forget_at:
            self._forget_at = now + _FORGET_EVERY_S
            self._allowances = {n: a for n, a in self._allowances.items() if not a.is_idle(now)}

    def __len__(self) -> int:
        """Return how many limits it remembers."""
        return len(self._allowances)

    def _needed(self, key: ApiKey, tokens: int) -> Iterator[tuple[Measure, Allowance, int]]:
        for measure, amount in ((Measure.REQUESTS, 1), (Measure.TOKENS, tokens)):
            allowance = self._of(key, measure)
            if allowance is not None:
                yield measure, allowance, min(amount, allowance.limit)

    def _standing(self, key: ApiKey, measure: Measure, now: float) -> LimitState | None:
        allowance = self._of(key, measure)
        return None if allowance is None else allowance.standing(now)

    def _of(self, key: ApiKey, measure: Measure) -> Allowance | None:
        limit = key.limits.rpm if measure is Measure.REQUESTS else key.limits.tpm
        if limit is None:
            return None
        name = f"{key.key_id}/{measure}"
        allowance = self._allowances.get(name)
        if allowance is None:
            # The books take one that comes after another was forgotten for a new ingress.
            self._made += 1
            allowance = Allowance(f"{self._ingress}/{self._made}", limit)
            self._allowances[name] = allowance
        allowance.limit, allowance.alone = limit, self._alone
        allowance.ingresses = self._ingresses
        return allowance


class LimitBooks:
    """Every limit that is used, by its name."""

    def __init__(self) -> None:
        self._books: dict[str, LimitBook] = {}
        self._forget_at = 0.0

    def answer(self, asks: Mapping[str, Ask], now: float) -> dict[str, Given]:
        """Answer what an ingress asks."""
        if now >= self._forget_at:
            self._forget_at = now + _FORGET_EVERY_S
            self._books = {n: book for n, book in self._books.items() if not book.is_idle(now)}
        books = {name: self._books.setdefault(name, LimitBook()) for name in asks}
        return {name: books[name].answer(ask, now) for name, ask in asks.items()}
