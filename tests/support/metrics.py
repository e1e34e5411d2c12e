"""Collects metrics instead of exporting them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


class MemoryMetrics:
    """Keeps the last value of every gauge and the sum of every counter, and counts the calls."""

    def __init__(self, interval_s: float = 10.0) -> None:
        self.values: dict[tuple[str, frozenset], float] = {}
        self.calls: Counter[str] = Counter()
        self.interval_s = interval_s

    def counter(self, name: str, text: str, labels: tuple[str, ...]):
        def add(value: float, tags: Mapping[str, str]) -> None:
            assert value >= 0 and set(tags) == set(labels)
            self.calls[name] += 1
            key = (name, frozenset(tags.items()))
            self.values[key] = self.values.get(key, 0.0) + value

        return add

    def gauge(self, name: str, text: str, labels: tuple[str, ...]):
        def put(value: float, tags: Mapping[str, str]) -> None:
            assert set(tags) == set(labels)
            self.calls[name] += 1
            self.values[name, frozenset(tags.items())] = value

        return put

    def report_interval_s(self) -> float:
        return self.interval_s

    def of(self, name: str, **labels: str) -> float:
        """Return the value of one series."""
        return self.values[name, frozenset(labels.items())]

    def names(self) -> set[str]:
        return {name for name, _ in self.values}

    def series(self, name: str) -> dict[frozenset, float]:
        return {tags: value for (one, tags), value in self.values.items() if one == name}
