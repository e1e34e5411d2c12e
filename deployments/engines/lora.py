"""LoRA adapters of an engine: those that it is started with, those that it loads later, its room.

vLLM and SGLang load and unload adapters while they run, by requests of nearly the same shape.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

CONFIG_NAME: Final = "adapter_config.json"
"""The file of an adapter's folder that says for which model it is, and its rank."""


_LONGEST_REASON: Final = 1000


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """One LoRA adapter of an engine.

    Attributes:
        name: its name in requests.
        path: its folder.
        rank: the rank of its matrices; ``None`` if that could not be read here.
    """

    name: str
    path: str
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class LoraRoom:
    """What an engine reserves for LoRA adapters that it loads while it runs.

    Attributes:
        count: how many, in addition to those that it is started with; 0 for none.
        rank: the highest rank of such an adapter.
    """

    count: int = 0
    rank: int = 0

    def highest_rank(self, adapters: Iterable[LoraAdapter]) -> int | None:
        """Return the highest rank to reserve memory for; ``None`` if none is known."""
        known = highest_rank(adapters)
        return max(known or 0, self.rank) if self.count else known


NO_ROOM: Final = LoraRoom()


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
    return frozenset(one.name for one in adapters) & model_names(models)


def model_names(models: Any) -> frozenset[str]:
    """Return the names in an engine's models list: its model's, and those of its adapters."""
    entries = models.get("data") if isinstance(models, dict) else None
    names = (one.get("id") for one in entries or () if isinstance(one, dict))
    return frozenset(name for name in names if isinstance(name, str))


def why_refused(status: int, answer: Any) -> str:
    """Return why an engine has not loaded or unloaded an adapter; empty if it has.

    Args:
        status: the status of its answer. vLLM answers 200 with a sentence, SGLang with
            ``{"success": true}``.
        answer: the parsed body; ``None`` if it is not JSON.
    """
    if status == 200:
        return ""
    match answer:
        case {"error": {"message": str(reason)}} | {"error_message": str(reason)} if reason:
            return reason[:_LONGEST_REASON]
    return f"status {status}"
