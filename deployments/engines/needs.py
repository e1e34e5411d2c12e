"""What an engine needs of the machine that it runs on, as its adapter states it. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

_NUMBERS: Final = re.compile(r"\d+(?:\.\d+)*")


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: ``0.33.1+cu130`` is (0, 33, 1)."""
    found = _NUMBERS.match(version)
    return tuple(map(int, found.group().split("."))) if found else ()


@dataclass(frozen=True, slots=True)
class TriedVersions:
    """The versions of an engine that its adapter was tried with, or written from.

    Attributes:
        least: the first of them.
        below: the first version after them.
    """

    least: str
    below: str

    def __contains__(self, version: str) -> bool:
        return numbers(self.least) <= numbers(version) < numbers(self.below)

    def __str__(self) -> str:
        return f"{self.least} or newer, before {self.below}"


@dataclass(frozen=True, slots=True)
class MemoryRule:
    """How much of a GPU an engine takes.

    Attributes:
        share: of the memory, 0 to 1.
        option: the engine argument that sets it.
        of_rest: whether it is a share of what the weights leave, and all of it for the KV cache;
            otherwise it is a share of the whole GPU, for weights and KV cache together.
        runtime_inside: whether what the engine needs besides comes out of that share.
    """

    share: float
    option: str
    of_rest: bool = False
    runtime_inside: bool = True


@dataclass(frozen=True, slots=True)
class EngineNeeds:
    """What one launch of an engine needs.

    Attributes:
        module: the Python module that it is.
        distributions: the names of packages that bring it; the first that is installed counts.
        tried: the versions that were tried.
        setup: the name of its environment in ``scripts/setup``.
        memory: how much of a GPU it takes.
        glibc: the oldest C library that its package runs on; empty if that is unknown.
        context: the longest request in tokens that the operator has set; ``None``: the model's.
        context_option: the engine argument that sets it.
        tensor_parallel: over how many GPUs each layer is spread.
        pipeline_parallel: over how many groups of GPUs the layers are spread.
        dtype: the type of the weights that the operator has set; empty: the model's.
        kv_dtype: the same of the KV cache; empty: the weights'.
        cpu_cache_bytes: the size of the KV cache where it runs on the CPU; ``None`` if unknown.
    """

    module: str
    distributions: tuple[str, ...]
    tried: TriedVersions
    setup: str
    memory: MemoryRule
    glibc: tuple[int, ...] = ()
    context: int | None = None
    context_option: str = ""
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    dtype: str = ""
    kv_dtype: str = ""
    cpu_cache_bytes: int | None = None

    @property
    def gpus(self) -> int:
        """On how many GPUs it runs, over all nodes."""
        return self.tensor_parallel * self.pipeline_parallel


def whole(value: Any, default: int) -> int:
    """Return an engine argument that is a whole number; the default if it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def share(value: Any, default: float) -> float:
    """Return an engine argument that is a share; the default if it is none."""
    return float(value) if isinstance(value, int | float) and 0 < value <= 1 else default


def word(value: Any) -> str:
    """Return an engine argument that is a word; empty if it is left to the model."""
    return value if isinstance(value, str) and value != "auto" else ""
