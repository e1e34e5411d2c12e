"""Durations as clients write them. Pure."""

from __future__ import annotations

import math
import re
from typing import Final

LONGEST_S: Final = 86_400.0
"""Longest duration that is read: a day, in seconds. No queue waits longer by default."""
SHORTEST_S: Final = 0.001
"""A shorter duration counts as this one, in seconds."""
LONGEST_TEXT: Final = 32
"""Longest text that is read as a duration, in characters."""

_NUMBER: Final = r"([0-9]+(?:\.[0-9]+)?)"
_UNITS_S: Final = (3600.0, 60.0, 1.0, 0.001)
# Such as `1h30m`, `1.5s` or `500ms`: each unit at most once, the largest first.
_UNITS: Final = re.compile(rf"(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s)?(?:{_NUMBER}ms)?")
# FlexInference's, such as `00h-00m-30s`.
_CLOCK: Final = re.compile(r"([0-9]+)h-([0-9]+)m-([0-9]+)s")
_PLAIN: Final = re.compile(_NUMBER)


def parse_duration(value: object) -> float:
    """Return the seconds that a JSON value means: a number, or a text with units.

    Texts are ``30s``, ``1m30s``, ``1.5h``, ``500ms``, or FlexInference's ``00h-00m-30s``.

    It is at least ``SHORTEST_S``.

    Raises:
        ValueError: it is anything else, or not above 0 and at most ``LONGEST_S``.
    """
    if isinstance(value, str):
        return _bounded(_seconds_of(value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a duration")
    return _bounded(value)


def parse_duration_text(text: str) -> float:
    """Do the same for the text of a header, where a number is written as text, too.

    Raises:
        ValueError: as ``parse_duration``.
    """
    text = text.strip()
    if len(text) <= LONGEST_TEXT and _PLAIN.fullmatch(text):
        return _bounded(float(text))
    return parse_duration(text)


def _seconds_of(text: str) -> float:
    if not 0 < len(text) <= LONGEST_TEXT:
        raise ValueError("not a duration")
    found = _CLOCK.fullmatch(text) or _UNITS.fullmatch(text)
    if found is None:
        raise ValueError("not a duration")
    return math.fsum(
        float(number) * unit
        for number, unit in zip(found.groups(), _UNITS_S, strict=False)
        if number is not None
    )


def _bounded(seconds: float) -> float:
    # Compared before it is converted: an integer may be too large for a float.
    if not 0 < seconds <= LONGEST_S:
        raise ValueError("not a duration in bounds")
    return max(float(seconds), SHORTEST_S)
