"""Engines that scripts/gpu_check can check without a GPU: the CPU builds, and the stand-in."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

REPO: Final = Path(__file__).parents[1]
_SHORT: Final = ("--bursts", "3", "--idle-bursts", "2", "--alone-s", "10", "--prompt-words", "12")
"""Bursts on two cores, where each takes seconds."""


@dataclass(frozen=True, slots=True)
class Preset:
    """An engine that is there without a GPU.

    Attributes:
        pool: its pool.
        setup: the environment of ``scripts/setup`` that it needs; empty if none.
        bursts: further options of contention.py.
        subject: the name by which the suite knows what it can do; empty: its engine's.
    """

    pool: Mapping[str, Any]
    setup: str = ""
    bursts: tuple[str, ...] = _SHORT
    subject: str = ""


PRESETS: Final = ("vllm-cpu", "sglang-cpu", "stand-in")


def preset(name: str) -> Preset:
    """Return the preset of a name in ``PRESETS``."""
    if name == "vllm-cpu":
        return Preset(_pool("local.yaml", "vllm"), name)
    if name == "sglang-cpu":
        return Preset(_pool("three-engines.yaml", "sglang"), name)
    return Preset(_stand_in(), bursts=("--bursts", "4", "--alone-s", "5"), subject="stand-in")


def _pool(config: str, engine: str) -> dict[str, Any]:
    """Return the pool of the small chat model in a configuration file."""
    apps = yaml.safe_load((REPO / "configs" / config).read_text())["applications"]
    [app] = (one for one in apps if one["name"] == "smollm2")
    [pool] = (one for one in app["args"]["pools"] if one["engine"] == engine)
    return dict(pool)


def _stand_in() -> dict[str, Any]:
    """Return a pool of the adapter of TensorRT-LLM, in front of the simulated engine."""
    folders = (REPO / "tests" / "stand_ins", REPO, REPO / "deployments" / "engines" / "inside")
    settings = {"tokens_per_second": 250, "default_completion_tokens": 8}
    return {
        "engine": "tensorrt_llm",
        "model": "simulated",
        "python": sys.executable,
        "slots": 4,
        "engine_args": {"max_seq_len": 4096},
        "environment": {
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            "STAND_IN_SETTINGS": json.dumps(settings),
        },
    }
