"""LoRA adapters of an engine: what it is started with, and which of them it has loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

CONFIG_NAME: Final = "adapter_config.json"
"""The file of an adapter's folder that says for which model it is, and its rank."""


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """One LoRA adapter that an engine loads at its start.

    Attributes:
        name: its name in requests.
        path: its folder.
        rank: the rank of its matrices; ``None`` if that could not be read here.
    """

    name: str
    path: str
    rank: int | None = None


def read_lora(name: str, path: str) -> LoraAdapter:
    """Return an adapter with its rank, if its folder is on this machine."""
    return LoraAdapter(name, path, _rank(Path(path) / CONFIG_NAME))


def _rank(config: Path) -> int | None:
    try:
        rank = json.loads(config.read_bytes())["r"]
    except (OSError, ValueError, KeyError, TypeError):
        # A name of a hub, or a broken folder: the preflight says so, and so does the engine.
        return None
    return rank if isinstance(rank, int) and rank > 0 else None


def highest_rank(adapters: Iterable[LoraAdapter]) -> int | None:
    """Return the highest rank that is known; ``None`` if none is."""
    return max((one.rank for one in adapters if one.rank is not None), default=None)


def listed_loras(models: Any, adapters: Iterable[LoraAdapter]) -> frozenset[str]:
    """Return the names of those adapters that an engine names in its models list.

    Args:
        models: the answer of its ``/v1/models``.
        adapters: those that it was started with.
    """
    entries = models.get("data") if isinstance(models, dict) else None
    listed = {one.get("id") for one in entries or () if isinstance(one, dict)}
    return frozenset(one.name for one in adapters if one.name in listed)
