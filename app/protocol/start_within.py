"""Reads within what time a request must start, from its fields or its header. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from app.core import errors
from app.core.tiers import Tier
from app.protocol.duration import parse_duration, parse_duration_text

START_WITHIN: Final = "x-start-within"
"""The request header that stands for the field ``start_within``."""
_FIELD: Final = "start_within"
_TIER: Final = "start_within_tier"


def start_within_of_fields(fields: Mapping[str, Any]) -> float | None:
    """Return the time in ``start_within``, in seconds; ``None`` if the field is absent or null.

    Raises:
        InvalidRequest: it is no duration.
    """
    value = fields.get(_FIELD)
    if value is None:
        return None
    try:
        return parse_duration(value)
    except ValueError:
        raise _no_duration(_FIELD) from None


def start_within_of_header(value: bytes) -> float:
    """Return the time in the header ``START_WITHIN``, in seconds.

    Raises:
        InvalidRequest: it is no duration.
    """
    try:
        return parse_duration_text(value.decode("latin-1"))
    except ValueError:
        raise _no_duration(START_WITHIN) from None


def start_within_tier(fields: Mapping[str, Any]) -> Tier:
    """Return the tier to which a request is raised that has not started in time.

    Raises:
        InvalidRequest: it is neither ``default`` nor ``priority``.
    """
    value = fields.get(_TIER)
    if value is None or value == Tier.DEFAULT.value:
        return Tier.DEFAULT
    if value == Tier.PRIORITY.value:
        return Tier.PRIORITY
    raise errors.InvalidRequest(
        f"Invalid value for '{_TIER}': expected 'default' or 'priority'.",
        param=_TIER,
        code="invalid_value",
    )


def _no_duration(name: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(
        f"Invalid value for '{name}': expected a duration of more than 0 and at most 24 hours, "
        "such as '30s', '1m30s', '500ms', '00h-00m-30s' or a number of seconds.",
        param=name,
        code="invalid_value",
    )
