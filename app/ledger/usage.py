"""Usage: what was used and what it costs, in totals and one by one."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final, TextIO

import orjson

from app.core.pricing import EXACT
from app.ledger.record import UsageRecord


class Grouping(StrEnum):
    """What totals may be split by."""

    DAY = "day"
    TENANT = "tenant"
    KEY = "key"
    MODEL = "model"
    TIER = "tier"
    STATE = "state"
    ESTIMATED = "estimated"


@dataclass(frozen=True, slots=True)
class Total:
    """What some requests used together.

    Attributes:
        group: what they have in common, by what the totals are split by. A tier is the one that
            was served, and ``None`` for requests that were turned away.
        requests: how many there were.
        prompt_tokens: cached ones included.
        cached_tokens: of the prompts.
        completion_tokens: generated.
        cost: in USD, exactly.
    """

    group: dict[str, str | None]
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost: Decimal

    def to_fields(self) -> dict[str, Any]:
        """Return it flat, with amounts as strings that have every digit."""
        counts = {f.name: getattr(self, f.name) for f in fields(self)[1:-1]}
        return {**self.group, **counts, "cost": plain(self.cost)}


def add_up(totals: Iterable[Total]) -> Total:
    """Return the total of totals, without a group."""
    requests = prompt = cached = completion = 0
    cost = Decimal(0)
    for total in totals:
        requests += total.requests
        prompt += total.prompt_tokens
        cached += total.cached_tokens
        completion += total.completion_tokens
        cost = EXACT.add(cost, total.cost)
    return Total({}, requests, prompt, cached, completion, cost)


def plain(amount: Decimal) -> str:
    """Return an amount with every digit that counts, and no exponent."""
    text = format(amount, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def usage_object(totals: Iterable[Total]) -> dict[str, Any]:
    """Return what ``GET /v1/usage`` answers: totals, and their total.

    Amounts are strings in USD: a JSON number would lose digits in most clients.
    """
    listed = list(totals)
    data = [{"object": "usage.total", **total.to_fields()} for total in listed]
    return {"object": "list", "data": data, "total": add_up(listed).to_fields()}


def cloud_event(record: UsageRecord, source: str) -> dict[str, Any]:
    """Return a record as a CloudEvents 1.0 event in its JSON format.

    ``source`` and the request id together are the event's identity: whoever takes the same event
    twice can tell, and bills once. ``subject`` is the tenant.
    """
    event = {
        "specversion": "1.0",
        "id": record.origin.request_id,
        "source": source,
        "type": EVENT_TYPE,
        "time": (record.ended or record.origin.arrived).isoformat(),
        "datacontenttype": "application/json",
        "data": record_fields(record),
    }
    # The standard wants a subject that is not empty, or none.
    return event | ({"subject": record.origin.tenant} if record.origin.tenant else {})


EVENT_TYPE: Final = "frontline.usage.settled"


def record_fields(record: UsageRecord) -> dict[str, Any]:
    """Return a record's fields as JSON has them: times as ISO 8601, amounts as strings."""
    return {name: _value(value) for name, value in record.to_fields().items()}


def _value(value: object) -> object:
    if isinstance(value, Decimal):
        return plain(value)
    return value.isoformat() if hasattr(value, "isoformat") else value


def write_json_lines(rows: Iterable[dict[str, Any]], out: TextIO) -> None:
    """Write a line of JSON for each row."""
    for row in rows:
        out.write(orjson.dumps(row).decode() + "\n")


def write_csv(rows: Iterable[dict[str, Any]], out: TextIO) -> None:
    """Write rows as CSV, with a line of names first if there are any rows."""
    writer = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(out, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow({name: _harmless(value) for name, value in row.items()})


def _harmless(value: object) -> object:
    # A spreadsheet takes text that begins so for a formula.
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" and value else value
