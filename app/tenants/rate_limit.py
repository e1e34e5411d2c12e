"""Rate limits of keys, enforced by several ingresses together. Pure: the time is passed in.

A limit is an amount (of requests or tokens) in any minute. One ``LimitBook`` tracks the usage of
all ingresses and hands out allowances. Each ingress takes from its own ``Allowance``
(``app.tenants.allowance``) without a message. The protocol has two messages. An ingress sends an
``Ask`` every ``RENEWAL_S``, and at once when a request finds no allowance. It reports the amount
used and the amount still held. The book answers with a ``Given``.

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
from dataclasses import dataclass
from typing import Final

from app.tenants.window import MINUTE_S, Window

RENEWAL_S: Final = 0.25
"""How often an ingress sends an ask for each recently used limit."""
LEASE_S: Final = 3.0
"""How long an allowance is valid without renewal."""
_SILENCE_S: Final = 2 * LEASE_S
GONE_S: Final = _SILENCE_S + 2 * MINUTE_S
"""When a book forgets an ingress from which it receives nothing."""


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
        gone = [name for name, one in self._holdings.items() if now - one.heard_at > GONE_S]
        for name in gone:
            del self._holdings[name]
