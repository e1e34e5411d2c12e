"""Messages of another version, as during an update: fields that it did not know have defaults."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any


def set_grown_state(message: Any, state: Iterable[Any]) -> None:
    """Unpickle a frozen dataclass with slots. Its class names this as its ``__setstate__``.

    New fields are added at the end, with a default. An older process sends fewer values than there
    are fields, a newer one more; without this, reading such a field would raise an error.
    """
    values = list(state)
    for place, one in enumerate(fields(message)):
        if place < len(values):
            value = values[place]
        elif one.default_factory is not MISSING:
            value = one.default_factory()
        else:
            value = one.default
        object.__setattr__(message, one.name, value)
