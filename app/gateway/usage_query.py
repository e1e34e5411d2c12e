"""Reads the query of a URL, in which lists are given as OpenAI's clients do.

A list is one parameter for each value: ``models=a&models=b`` or ``models[]=a&models[]=b``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from app.core import errors
from app.ledger.record import MAX_TEXT, is_stored_text
from app.ledger.time_buckets import LATEST

_SHOWN: Final = 100
_BOOLEANS: Final = {"true": True, "false": False}


class UsageQuery:
    """The parameters of a query. Each is to be read by one of the methods.

    Every method returns ``None`` for a parameter that is not there, and raises ``InvalidRequest``
    naming it if it is invalid.

    Args:
        items: the names and values, in their order.
    """

    def __init__(self, items: Iterable[tuple[str, str]]) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in items:
            self._values.setdefault(name.removesuffix("[]"), []).append(value)
        self._read: set[str] = set()

    def text(self, name: str) -> str | None:
        """Return a value that is given at most once."""
        values = self._take(name)
        if len(values) > 1:
            raise _invalid(name, "a single value")
        return values[0] if values else None

    def texts(self, name: str) -> tuple[str, ...] | None:
        """Return the values of a list of ids or names."""
        values = self._take(name)
        if not all(map(is_stored_text, values)):
            raise _invalid(name, f"values of 1 to {MAX_TEXT} characters")
        return tuple(dict.fromkeys(values)) or None

    def word(self, name: str, allowed: Sequence[str]) -> str | None:
        """Return one of the allowed words."""
        text = self.text(name)
        if text is not None and text not in allowed:
            raise _invalid(name, f"one of {', '.join(allowed)}")
        return text

    def words(self, name: str, allowed: Sequence[str]) -> tuple[str, ...]:
        """Return the allowed words in a list, each once; commas separate them, too."""
        words = [word.strip() for text in self._take(name) for word in text.split(",")]
        if not set(words) <= set(allowed):
            raise _invalid(name, f"any of {', '.join(allowed)}")
        return tuple(dict.fromkeys(words))

    def boolean(self, name: str) -> bool | None:
        """Return ``true`` or ``false``."""
        text = self.word(name, list(_BOOLEANS))
        return None if text is None else _BOOLEANS[text]

    def number(self, name: str, least: int, most: int) -> int | None:
        """Return a whole number within bounds."""
        text = self.text(name)
        if text is None:
            return None
        # Bounded, because long digits take long to convert.
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
        if not least <= number <= most:
            raise _invalid(name, f"a whole number from {least} to {most}")
        return number

    def time(self, name: str) -> int | None:
        """Return a time in Unix seconds."""
        return self.number(name, 0, LATEST)

    def refuse_others(self) -> None:
        """Refuse parameters that were not read."""
        for name in self._values:
            if name not in self._read:
                shown = name[:_SHOWN]
                raise errors.InvalidRequest(f"Unknown parameter: '{shown}'.", param=shown)

    def _take(self, name: str) -> list[str]:
        self._read.add(name)
        return self._values.get(name, [])


def _invalid(name: str, expected: str) -> errors.InvalidRequest:
    return errors.InvalidRequest(f"Invalid '{name}': expected {expected}.", param=name)
