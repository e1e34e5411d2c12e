"""The items of a bill: what a model's prompts, cached prompts and answers cost. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from app.core.pricing import EXACT, TokenUsage
from app.ledger.usage import Grouping, Priced


@dataclass(frozen=True, slots=True)
class LineItem:
    """One item of a bill.

    Attributes:
        group: the common values of its requests, by grouping.
        name: the model and the kind of tokens, such as ``MODEL, cached_input_tokens``.
        tokens: how many tokens.
        cost: what they cost, exactly, in USD.
    """

    group: dict[str, str | None]
    name: str
    tokens: int
    cost: Decimal


def line_items(priced: Iterable[Priced], groupings: Sequence[Grouping]) -> list[LineItem]:
    """Return the items of each group, in the order of groups and names, without empty ones.

    They add up to the cost of the usage, to the last digit.

    Args:
        priced: usage by ``groupings`` and by model.
        groupings: the groups.
    """
    sums: dict[tuple[tuple[str | None, ...], str], tuple[int, Decimal]] = {}
    for one in priced:
        group = tuple(one.group[grouping] for grouping in groupings)
        for kind, tokens, usage in _parts(one.usage):
            if tokens and one.prices is not None:
                key = group, f"{one.group[Grouping.MODEL]}, {kind}"
                known, cost = sums.get(key, (0, Decimal(0)))
                sums[key] = known + tokens, EXACT.add(cost, one.prices.cost(usage))
    names = [grouping.value for grouping in groupings]
    return [
        LineItem(dict(zip(names, group, strict=True)), name, tokens, cost)
        for (group, name), (tokens, cost) in sorted(
            sums.items(), key=lambda item: ([value or "" for value in item[0][0]], item[0][1])
        )
    ]


def _parts(usage: TokenUsage) -> list[tuple[str, int, TokenUsage]]:
    """Return what usage consists of: each kind of tokens, how many, and as usage of its own."""
    cached, generated = usage.cached_tokens, usage.completion_tokens
    fresh = usage.prompt_tokens - cached
    return [
        ("input_tokens", fresh, TokenUsage(fresh, 0, 0)),
        ("cached_input_tokens", cached, TokenUsage(cached, cached, 0)),
        ("output_tokens", generated, TokenUsage(0, 0, generated)),
    ]
