"""The items of a bill: what each kind of a model's usage costs. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

from app.core.pricing import EXACT, TokenUsage
from app.ledger.usage import Grouping, Priced

_UNITS: Final = {"images": "images", "audio_seconds": "duration_seconds"}


@dataclass(frozen=True, slots=True)
class LineItem:
    """One item of a bill.

    Attributes:
        group: the common values of its requests, by grouping.
        name: the model and the kind of usage, such as ``MODEL, cached_input_tokens``.
        quantity: how many of them.
        unit: what they are, as OpenAI's API names it: ``tokens``, ``images`` or
            ``duration_seconds``.
        cost: what they cost, exactly, in USD.
    """

    group: dict[str, str | None]
    name: str
    quantity: int
    unit: str
    cost: Decimal


def line_items(priced: Iterable[Priced], groupings: Sequence[Grouping]) -> list[LineItem]:
    """Return the items of each group, in the order of groups and names, without empty ones.

    They add up to the cost of the usage, to the last digit.

    Args:
        priced: usage by ``groupings`` and by model.
        groupings: the groups.
    """
    sums: dict[tuple[tuple[str | None, ...], str, str], tuple[int, Decimal]] = {}
    for one in priced:
        group = tuple(one.group[grouping] for grouping in groupings)
        for kind, quantity, usage in _parts(one.usage):
            if quantity and one.prices is not None:
                name = f"{one.group[Grouping.MODEL]}, {kind}"
                key = group, name, _UNITS.get(kind, "tokens")
                known, cost = sums.get(key, (0, Decimal(0)))
                sums[key] = known + quantity, EXACT.add(cost, one.prices.cost(usage))
    names = [grouping.value for grouping in groupings]
    return [
        LineItem(dict(zip(names, group, strict=True)), name, quantity, unit, cost)
        for (group, name, unit), (quantity, cost) in sorted(
            sums.items(), key=lambda item: ([value or "" for value in item[0][0]], item[0][1])
        )
    ]


def _parts(usage: TokenUsage) -> list[tuple[str, int, TokenUsage]]:
    """Return what usage consists of: each kind, how many, and as usage of its own."""
    cached, generated = usage.cached_tokens, usage.completion_tokens
    written, images, seconds = usage.cache_write_tokens, usage.images, usage.audio_seconds
    fresh = usage.prompt_tokens - cached - written
    return [
        ("input_tokens", fresh, TokenUsage(fresh, 0, 0)),
        ("cached_input_tokens", cached, TokenUsage(cached, cached, 0)),
        ("cache_write_input_tokens", written, TokenUsage(written, 0, 0, written)),
        ("output_tokens", generated, TokenUsage(0, 0, generated)),
        ("images", images, TokenUsage(0, 0, 0, images=images)),
        ("audio_seconds", seconds, TokenUsage(0, 0, 0, audio_seconds=seconds)),
    ]
