"""The limits of all keys, at one ingress (``RateLimiter``) and in the actor that shares them out
(``LimitBooks``). Pure: the time is passed in.

The caller calls ``take`` for each request. If it is refused, the caller sends ``asks`` to the books
at once, passes the answer to ``receive`` and calls ``take`` again; a request that is refused then
gets 429. The caller also sends asks at the times that ``next_ask`` returns. A single ingress can
have the books in its own process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from app.tenants.allowance import Allowance, LimitState, rate_limit_headers
from app.tenants.keys import ApiKey
from app.tenants.rate_limit import Ask, Given, LimitBook
from app.tenants.window import MINUTE_S

_FORGET_EVERY_S: Final = float(MINUTE_S)


class Measure(StrEnum):
    """The quantity that a limit bounds."""

    REQUESTS = "requests"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class OverLimit:
    """Why a request is refused: the exceeded limit, and in how many seconds more is available."""

    measure: Measure
    limit: int
    retry_after_s: float


class RateLimiter:
    """The allowances of one ingress, for every limit of every key."""

    def __init__(self, ingress: str) -> None:
        self._ingress = ingress
        self._allowances: dict[str, Allowance] = {}
        self._made = 0
        self._forget_at = 0.0
        self._alone = False
        self._ingresses = 1

    def set_alone(self, alone: bool, ingresses: int = 1) -> None:
        """Set whether the books are away. Then the ingress's own part of each limit applies.

        Args:
            alone: whether the books are away.
            ingresses: how many ingresses there are, as far as this one knows. A limit is split
                among this many, or among as many as use it according to the books, if that is more.
        """
        self._alone, self._ingresses = alone, ingresses

    def take(self, key: ApiKey, tokens: int, now: float) -> OverLimit | None:
        """Charge a request with this many expected tokens, or return the limit that it exceeds."""
        if not key.limits.any_rate:
            return None
        enough: list[tuple[Allowance, int]] = []
        over: OverLimit | None = None
        waits = not self._alone
        for measure, allowance, amount in self._needed(key, tokens):
            # All limits are tried, so that everything missing is requested in one ask.
            if allowance.take_alone(amount, now) if self._alone else allowance.take(amount, now):
                enough.append((allowance, amount))
                continue
            waits = waits and not allowance.is_refused(amount, now)
            if over is None:
                over = OverLimit(measure, allowance.limit, allowance.standing(now).frees_in_s)
        if over is not None:
            for allowance, amount in enough:
                allowance.untake(amount)
                if waits:
                    # Otherwise the next ask gives up what is here, and the request finds one limit
                    # missing and then the other, again and again.
                    allowance.want(amount)
        return over

    def is_refused(self, key: ApiKey, tokens: int, now: float) -> bool:
        """Return whether the books have just reported that a limit of the key is exhausted."""
        needed = self._needed(key, tokens)
        return any(allowance.is_refused(amount, now) for _, allowance, amount in needed)

    def put_right(self, key: ApiKey, expected: int, used: int, age_s: float, now: float) -> None:
        """Correct the tokens of a request that was charged ``age_s`` ago and has ended."""
        allowance = self._of(key, Measure.TOKENS)
        if allowance is not None:
            allowance.put_right(used - min(expected, allowance.limit), age_s, now)

    def headers(self, key: ApiKey, now: float) -> list[tuple[str, str]]:
        """Return the headers that show a client the state of its limits."""
        if not key.limits.any_rate:
            return []
        requests, tokens = (self._standing(key, measure, now) for measure in Measure)
        return rate_limit_headers(requests, tokens)

    def next_ask(self) -> float:
        """Return when the next ask is due; infinity if no limit is used."""
        return min((each.asks_at() for each in self._allowances.values()), default=float("inf"))

    def asks(self, now: float) -> dict[str, Ask]:
        """Return the asks to send to the books now, by the name of the limit."""
        self._forget(now)
        due = {name: each for name, each in self._allowances.items() if each.asks_at() <= now}
        return {name: allowance.ask(now) for name, allowance in due.items()}

    def receive(self, answers: Mapping[str, Given], now: float) -> None:
        """Apply the answers of the books."""
        for name, given in answers.items():
            if name in self._allowances:
                self._allowances[name].receive(given, now)

    def _forget(self, now: float) -> None:
        """Drop limits that have not been used for long, such as those of revoked keys."""
        if now >= self._forget_at:
            self._forget_at = now + _FORGET_EVERY_S
            self._allowances = {n: a for n, a in self._allowances.items() if not a.is_idle(now)}

    def __len__(self) -> int:
        """Return how many limits it keeps."""
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
            # A new name each time: the books treat an allowance that replaces a dropped one as that
            # of a new ingress.
            self._made += 1
            allowance = Allowance(f"{self._ingress}/{self._made}", limit)
            self._allowances[name] = allowance
        allowance.limit, allowance.alone = limit, self._alone
        allowance.ingresses = self._ingresses
        return allowance


class LimitBooks:
    """All limits in use, by name."""

    def __init__(self) -> None:
        self._books: dict[str, LimitBook] = {}
        self._forget_at = 0.0

    def answer(self, asks: Mapping[str, Ask], now: float) -> dict[str, Given]:
        """Return the allowance for each ask of an ingress, by the name of the limit."""
        if now >= self._forget_at:
            self._forget_at = now + _FORGET_EVERY_S
            self._books = {n: book for n, book in self._books.items() if not book.is_idle(now)}
        books = {name: self._books.setdefault(name, LimitBook()) for name in asks}
        return {name: books[name].answer(ask, now) for name, ask in asks.items()}

    @property
    def names(self) -> list[str]:
        """The limits that are remembered."""
        return list(self._books)
