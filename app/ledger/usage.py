"""Usage and its cost, as totals and as single records."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final, TextIO

import orjson

from app.core.pricing import EXACT, Prices, TokenUsage
from app.ledger.record import UsageRecord


class Grouping(StrEnum):
    """The fields by which totals can be grouped."""

    DAY = "day"
    HOUR = "hour"
    """The hour of arrival in UTC, such as ``2026-11-29T22``."""
    MINUTE = "minute"
    """The minute of arrival in UTC, such as ``2026-11-29T22:05``."""
    TENANT = "tenant"
    KEY = "key"
    MODEL = "model"
    TIER = "tier"
    STATE = "state"
    ESTIMATED = "estimated"


@dataclass(frozen=True, slots=True)
class Total:
    """The total usage of a group of requests.

    Attributes:
        group: the common values of the group, by grouping. The tier is the served one, and ``None``
            for requests that were shed or refused.
        requests: the number of requests.
        prompt_tokens: the prompt tokens, including cached ones.
        cached_tokens: the cached prompt tokens.
        completion_tokens: the generated tokens.
        cache_write_tokens: the prompt tokens that were written to prefix caches.
        images: the images that were billed.
        audio_seconds: the seconds of recordings that were transcribed.
        cost: the exact cost in USD.
    """

    group: dict[str, str | None]
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cache_write_tokens: int
    images: int
    audio_seconds: int
    cost: Decimal

    def to_fields(self) -> dict[str, Any]:
        """Return the total as a flat mapping; amounts are strings with every digit."""
        counts = {f.name: getattr(self, f.name) for f in fields(self)[1:-1]}
        return {**self.group, **counts, "cost": plain(self.cost)}


@dataclass(frozen=True, slots=True)
class Priced:
    """The usage of a group of requests with equal prices.

    Attributes:
        group: the common values of the group, as in ``Total``.
        requests: the number of requests.
        prices: their prices; ``None`` for requests that reached no engine.
        usage: the sum of their tokens.
    """

    group: dict[str, str | None]
    requests: int
    prices: Prices | None
    usage: TokenUsage

    def total(self) -> Total:
        """Return the total, with its exact cost."""
        usage = self.usage
        cost = Decimal(0) if self.prices is None else self.prices.cost(usage)
        return Total(
            self.group, self.requests, usage.prompt_tokens, usage.cached_tokens,
            usage.completion_tokens, usage.cache_write_tokens, usage.images, usage.audio_seconds,
            cost,
        )  # fmt: skip


def add_up(totals: Iterable[Total]) -> Total:
    """Return the sum of totals, without a group."""
    requests = prompt = cached = completion = written = images = seconds = 0
    cost = Decimal(0)
    for total in totals:
        requests += total.requests
        prompt += total.prompt_tokens
        cached += total.cached_tokens
        completion += total.completion_tokens
        written += total.cache_write_tokens
        images += total.images
        seconds += total.audio_seconds
        cost = EXACT.add(cost, total.cost)
    return Total({}, requests, prompt, cached, completion, written, images, seconds, cost)


def plain(amount: Decimal) -> str:
    """Return an amount with every significant digit, and no exponent."""
    text = format(amount, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def usage_object(totals: Iterable[Total]) -> dict[str, Any]:
    """Return the answer of ``GET /v1/usage``: totals, and their sum.

    Amounts are strings in USD: a JSON number would lose digits in most clients.
    """
    listed = list(totals)
    data = [{"object": "usage.total", **total.to_fields()} for total in listed]
    return {"object": "list", "data": data, "total": add_up(listed).to_fields()}


def cloud_event(record: UsageRecord, source: str) -> dict[str, Any]:
    """Return a record as a CloudEvents 1.0 event in its JSON format.

    ``source`` and the request id together identify the event, so that a consumer can detect
    duplicates and bill once. ``subject`` is the tenant.
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
    # The standard requires a non-empty subject, or none.
    return event | ({"subject": record.origin.tenant} if record.origin.tenant else {})


EVENT_TYPE: Final = "frontline.usage.settled"


def record_fields(record: UsageRecord) -> dict[str, Any]:
    """Return a record's fields with JSON types: times as ISO 8601, amounts as strings."""
    return {name: _value(value) for name, value in record.to_fields().items()}


def _value(value: object) -> object:
    if isinstance(value, Decimal):
        return plain(value)
    return value.isoformat() if hasattr(value, "isoformat") else value


def write_json_lines(rows: Iterable[dict[str, Any]], out: TextIO) -> None:
    """Write each row as one line of JSON."""
    for row in rows:
        out.write(orjson.dumps(row).decode() + "\n")


def write_csv(rows: Iterable[dict[str, Any]], out: TextIO) -> None:
    """Write rows as CSV, with a header line if there are any rows."""
    writer = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(out, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow({name: _harmless(value) for name, value in row.items()})


def _harmless(value: object) -> object:
    # A spreadsheet would parse text that begins with these characters as a formula.
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" and value else value
