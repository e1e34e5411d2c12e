"""Counts what holders use of a bounded resource: requests, bytes of bodies, usage queries. Pure.

A holder is a kind (a key, a tenant, the whole ingress) and a name. The bound of each kind is passed
in, so it may change at any time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Kind = TypeVar("Kind", bound=Hashable)


class Holdings(Generic[Kind]):
    """How much each holder uses. Holders that use nothing are not stored."""

    def __init__(self) -> None:
        self._amounts: dict[tuple[Kind, str], int] = {}

    def of(self, kind: Kind, name: str = "") -> int:
        """Return how much a holder uses."""
        return self._amounts.get((kind, name), 0)

    def __len__(self) -> int:
        """Return how many holders use something."""
        return len(self._amounts)

    def add(self, holders: Iterable[tuple[Kind, str]], amount: int) -> None:
        """Add to what holders use. Only ``Holding`` calls it, and takes away what it added."""
        amounts = self._amounts
        for holder in holders:
            left = amounts.get(holder, 0) + amount
            if left:
                amounts[holder] = left
            else:
                amounts.pop(holder, None)

    def first_over(
        self, holders: Iterable[tuple[Kind, str]], amount: int, bounds: Iterable[int]
    ) -> Kind | None:
        """Return the first kind whose bound would be exceeded by so much more, if any."""
        amounts = self._amounts
        for holder, bound in zip(holders, bounds, strict=True):
            if amounts.get(holder, 0) + amount > bound:
                return holder[0]
        return None


class Holding(Generic[Kind]):
    """An amount that counts for several holders at once, such as a key and its tenant.

    It starts at 0. As a context manager it is given back at the end of the block.

    Attributes:
        amount: the current amount.
    """

    __slots__ = ("_holders", "_holdings", "amount")

    def __init__(self, holdings: Holdings[Kind], *holders: tuple[Kind, str]) -> None:
        self.amount = 0
        self._holdings = holdings
        self._holders = holders

    def grow(self, amount: int, *bounds: int) -> Kind | None:
        """Add to the amount; or add nothing and return the kind whose bound would be exceeded.

        Args:
            amount: how much to add.
            bounds: how much each holder may use, in the order of the holders.
        """
        over = self._holdings.first_over(self._holders, amount, bounds)
        if over is None:
            self._holdings.add(self._holders, amount)
            self.amount += amount
        return over

    def give_back(self) -> None:
        """Give the whole amount back. Idempotent."""
        amount, self.amount = self.amount, 0
        if amount:
            self._holdings.add(self._holders, -amount)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.give_back()
