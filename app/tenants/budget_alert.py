"""What is told of a budget of which a percentage was reached, and its signature. Pure.

Messages and signatures follow the Standard Webhooks specification.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Final

import orjson

from app.tenants.budget import Budget, Owner, SpendId

TYPE: Final = "budget.threshold_reached"
"""The ``type`` of the messages."""
_PREFIX: Final = "whsec_"
_ID: Final = "budget_"
_SHORTEST: Final = 24
_LONGEST: Final = 64


class InvalidSecret(ValueError):
    """A text holds no secrets; the message holds nothing of it."""


@dataclass(frozen=True, slots=True)
class BudgetAlert:
    """A percentage of a budget was reached.

    Attributes:
        budget: the budget.
        of: the period in which it was reached.
        percent: the percentage, one of ``app.tenants.spending.ALERTS``.
        spent: what was spent by then, in USD, as far as this ingress knew.
        at: when this ingress noticed it, in UTC.
    """

    budget: Budget
    of: SpendId
    percent: int
    spent: Decimal
    at: datetime

    @property
    def id(self) -> str:
        """The same for this percentage of this budget in this period, at every ingress.

        A budget of another amount is another budget.
        """
        start = None if self.of.start is None else self.of.start.isoformat()
        amount = _plain(self.budget.usd)
        facts = [self.of.owner, self.of.name, self.of.period, start, amount, self.percent]
        return _ID + hashlib.sha256(orjson.dumps(facts)).hexdigest()[:32]

    def body(self) -> bytes:
        """Return the message as JSON. Amounts are strings in USD; days are in UTC."""
        budget, of = self.budget, self.of
        data: dict[str, Any] = {
            "id": self.id,
            "owner": of.owner.value,
            "key_id": of.name if of.owner is Owner.KEY else None,
            "tenant": of.name if of.owner is Owner.TENANT else None,
            "period": of.period.value,
            "period_start": _iso(of.start),
            "period_end": _iso(of.end),
            "mode": budget.mode,
            "percent": self.percent,
            "limit": _plain(budget.usd),
            "spent": _plain(self.spent),
            "currency": "usd",
            "requests_refused": budget.hard and self.spent >= budget.usd,
        }
        at = self.at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return orjson.dumps({"type": TYPE, "timestamp": at, "data": data})


def parse_secrets(text: str) -> tuple[bytes, ...]:
    """Return the keys of the secrets in a text, which are separated by white space.

    Raises:
        InvalidSecret: there is none, or one is not ``whsec_`` and the base64 of 24 to 64 bytes.
    """
    return tuple(_key_of(word) for word in text.split()) or _refuse()


def sign(keys: Iterable[bytes], message_id: str, at: int, body: bytes) -> str:
    """Return the signatures of a message that is sent at a time, in Unix seconds."""
    signed = f"{message_id}.{at}.".encode() + body
    digests = (hmac.new(key, signed, hashlib.sha256).digest() for key in keys)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def _key_of(word: str) -> bytes:
    try:
        key = base64.b64decode(word.removeprefix(_PREFIX), validate=True)
    except (ValueError, binascii.Error):
        _refuse()
    return key if word.startswith(_PREFIX) and _SHORTEST <= len(key) <= _LONGEST else _refuse()


def _refuse() -> Any:
    raise InvalidSecret(
        f"expected {_PREFIX} and the base64 of {_SHORTEST} to {_LONGEST} random bytes, or several "
        "of these separated by white space"
    )


def _plain(amount: Decimal) -> str:
    """Return an amount with every digit that counts, so that equal amounts are equal texts."""
    text = format(amount, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _iso(day: date | None) -> str | None:
    return None if day is None else day.isoformat()
