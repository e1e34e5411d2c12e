"""Reads records that another process, perhaps of another version, has written. Pure.

A record's JSON has a version; without one it is version 1. The version is raised only if older code
would misread the record. Older code then does not process it.
"""

from __future__ import annotations

import re
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

import orjson

from app.ledger.record import PRICES, USED, VERSION, UsageRecord

_TEXT: Final = (str,)
_TEXT_OR_NONE: Final = (str, type(None))
_SECONDS: Final = (float, int)
_TYPES: Final[dict[str, tuple[type, ...]]] = {
    **dict.fromkeys(("request_id", "tenant", "key_id", "model", "route", "state"), _TEXT),
    **dict.fromkeys(("engine", "replica", "rate_card", "cost", "arrived", "ingress"), _TEXT),
    **dict.fromkeys(("requested_tier", "served_tier", "reason", "ended"), _TEXT_OR_NONE),
    **dict.fromkeys(PRICES, _TEXT_OR_NONE),
    **dict.fromkeys(("stream", "usage_estimated"), (bool,)),
    **dict.fromkeys(USED, (int,)),
    "preemptions": (int, type(None)),
    "queue_s": _SECONDS,
    **dict.fromkeys(("ttft_s", "duration_s"), (*_SECONDS, type(None))),
}
_AMOUNTS: Final = (*PRICES, "cost")
# Bounded, so that no amount with a billion zeros has to be written out.
_AMOUNT: Final = re.compile(r"[0-9]{1,40}(\.[0-9]{1,60})?")


class NotUnderstood(ValueError):
    """An entry cannot be read: it is of a newer version, or has an invalid format."""


def load(body: bytes) -> Any:
    """Return the parsed JSON of a body.

    Raises:
        NotUnderstood: the body is no JSON.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        raise NotUnderstood("it is no JSON") from None


def read_record(body: bytes) -> UsageRecord:
    """Return a record that ``UsageRecord.to_json`` has written, in this version or an older one.

    Raises:
        NotUnderstood: it is of a newer version, or its fields are not those of a record.
    """
    fields = load(body)
    if not isinstance(fields, dict):
        raise NotUnderstood("it is no record")
    version = fields.pop("version", 1)
    if type(version) is not int or not 1 <= version <= VERSION:
        raise NotUnderstood(f"it is of version {str(version)[:20]}, and this is {VERSION}")
    # Older records lack these fields.
    fields.setdefault("usage_estimated", False)
    fields.setdefault("preemptions", None)
    fields.setdefault("ingress", "")
    for name in ("cache_write_tokens", "images", "audio_seconds"):
        fields.setdefault(name, 0)
    free = None if fields.get("served_tier") is None else "0"
    fields.setdefault("cache_write_price", fields.get("input_price"))
    fields.setdefault("image_price", free)
    fields.setdefault("audio_second_price", free)
    _check_types(fields)
    try:
        record = UsageRecord.from_fields(_converted(fields))
        consistent = record.to_fields() == fields
    except (ValueError, TypeError, ArithmeticError) as error:
        raise NotUnderstood(f"{type(error).__name__}: {str(error)[:200]}") from None
    if not consistent:
        raise NotUnderstood("its fields contradict each other")
    return record


def request_of(body: bytes) -> str | None:
    """Return the request id of an unreadable entry, or ``None`` if it cannot be found."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if isinstance(found, dict):
        found = [found.get("request_id")]
    named = isinstance(found, list) and found and isinstance(found[0], str)
    return found[0] if named else None


def _check_types(fields: dict[str, Any]) -> None:
    if differing := sorted(_TYPES.keys() ^ fields.keys()):
        raise NotUnderstood(f"a field is missing or unknown: {differing[0][:40]}")
    for name, types in _TYPES.items():
        if type(fields[name]) not in types:
            raise NotUnderstood(f"{name} is of another type")


def _converted(fields: dict[str, Any]) -> dict[str, Any]:
    """Convert amounts and times to their types, in place."""
    for name in _AMOUNTS:
        text = fields[name]
        if text is not None:
            if not _AMOUNT.fullmatch(text):
                raise ValueError(f"{name} is no amount")
            fields[name] = Decimal(text)
    for name in ("arrived", "ended"):
        if fields[name] is not None:
            fields[name] = datetime.fromisoformat(fields[name])
    return fields
