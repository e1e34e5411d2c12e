"""Counts what holders use of a bounded resource: requests, bytes of bodies, usage queries. Pure.

A holder is a kind (a key, a tenant, the whole ingress) and a name. The bound of each kind is passed
in, so it may change at any time.
"""

from __future__ import annotations

from collections.abc import Hashable
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

    def add(self, holder: tuple[Kind, str], amount: int) -> None:
        """Add to what a holder uses. Only ``Holding`` calls it, and takes away what it added."""
        left = self._amounts.get(holder, 0) + amount
        if left:
            self._amounts[holder] = left
        else:
            self._amounts.pop(holder, None)


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
        holdings = self._holdings
        for (kind, name), bound in zip(self._holders, bounds, strict=True):
            if holdings.of(kind, name) + amount > bound:
                return kind
        for holder in self._holders:
            holdings.add(holder, amount)
        self.amount += amount
        return None

    def give_back(self) -> None:
        """Give the whole amount back. Idempotent."""
        amount, self.amount = self.amount, 0
        for holder in self._holders:
            self._holdings.add(holder, -amount)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.give_back()
