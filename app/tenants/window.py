"""The amount used in the last minute, for limits per minute. Pure: the time is passed in."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

MINUTE_S: Final = 60


class Window:
    """The amount used in the last minute.

    Amounts are counted by whole seconds and kept until the end of their second is a minute ago. So
    an amount may count for up to a second too long, and never too short. A debt counts in addition
    to the minute, and gradually replaces the amounts that leave it.
    """

    def __init__(self) -> None:
        self._seconds: deque[list[int]] = deque()
        self._total = 0
        # There is a debt only while the minute contains amounts that it can replace.
        self._debt = 0

    def add(self, amount: int, now: float) -> None:
        """Count an amount now; a negative amount is subtracted."""
        if amount < 0:
            self.take_back(-amount)
            return
        second = math.floor(now)
        if self._seconds and self._seconds[-1][0] >= second:
            self._seconds[-1][1] += amount
        else:
            self._seconds.append([second, amount])
        self._total += amount

    def overdraw(self, amount: int, now: float, limit: int) -> None:
        """Count an amount that was not approved before. What exceeds the limit becomes a debt."""
        self.used(now)
        fits = min(amount, max(0, limit - self._total))
        self.add(fits, now)
        self._debt += amount - fits

    def take_back(self, amount: int) -> None:
        """Subtract an amount: first from the debt, then from the oldest amounts."""
        paid = min(self._debt, amount)
        self._debt -= paid
        amount -= paid
        for slot in self._seconds:
            taken = min(slot[1], amount)
            slot[1] -= taken
            self._total -= taken
            amount -= taken

    def used(self, now: float) -> int:
        """Return the amount used in the last minute, plus the debt."""
        while self._seconds and self._seconds[0][0] < math.floor(now) - MINUTE_S:
            second, gone = self._seconds.popleft()
            owed = min(self._debt, gone)
            self._debt -= owed
            self._total -= gone - owed
            if owed:
                self._seconds.append([second + MINUTE_S + 1, owed])
        return self._total + self._debt

    def frees_at(self, amount: int, now: float) -> float:
        """Return when this amount, or everything if that is less, will have left the minute."""
        amount = min(amount, self.used(now))
        if not self._total:
            return now
        # A debt of a whole minute or more repeats the minute unchanged.
        again = min(max(amount - 1, 0), self._debt) // self._total
        amount, debt = amount - again * self._total, self._debt - again * self._total
        seconds = deque((second, used) for second, used in self._seconds)
        while True:
            second, used = seconds.popleft()
            amount -= used
            if amount <= 0 or (not seconds and not debt):
                return second + (again + 1) * (MINUTE_S + 1.0)
            owed = min(debt, used)
            debt -= owed
            if owed:
                seconds.append((second + MINUTE_S + 1, owed))
