"""What a starting engine is doing, read from the end of its log. Pure."""

from __future__ import annotations

import re
from typing import Final

Phases = tuple[tuple[re.Pattern[str], str], ...]
"""Patterns of log lines, and the phase that each stands for; its groups fill the text."""

COMMON: Final[Phases] = tuple(
    (re.compile(pattern), phase)
    for pattern, phase in (
        # Of huggingface_hub, which all engines download with.
        (r"(?:Fetching|Downloading)\b[^%]{0,200}?(\d+)%", "downloading {} %"),
        (r"(?:Fetching \d+ files|Downloading shards|Downloading HF model)", "downloading"),
    )
)

VLLM: Final[Phases] = (
    *COMMON,
    *(
        (re.compile(pattern), phase)
        for pattern, phase in (
            (r"Loading [\w.]+ checkpoint shards:\s*(\d+)%", "loading weights {} %"),
            (r"Starting to load model", "loading weights"),
            (r"Starting torch\.compile|Dynamo bytecode transform|Compiling a graph", "compiling"),
            (r"Capturing CUDA graphs?[^%]{0,100}?(\d+)%", "capturing graphs {} %"),
            (r"Graph capturing finished|init engine \(", "starting the server"),
        )
    ),
)

SGLANG: Final[Phases] = (
    *COMMON,
    *(
        (re.compile(pattern), phase)
        for pattern, phase in (
            (r"Loading [\w.]+ checkpoint shards:\s*(\d+)%", "loading weights {} %"),
            (r"Load weight begin", "loading weights"),
            (r"Compiling|DeepGEMM.{0,40}[Cc]ompil", "compiling"),
            (r"Capturing (?:batches|num tokens)[^%]{0,200}?(\d+)%", "capturing graphs {} %"),
            (r"Capture .{0,60}graph begin", "capturing graphs"),
            (r"Capture .{0,60}graph end", "starting the server"),
        )
    ),
)

TENSORRT_LLM: Final[Phases] = (
    *COMMON,
    *(
        (re.compile(pattern), phase)
        for pattern, phase in (
            (r"Loading (?:weights|safetensors weights)[^%]{0,100}?(\d+)%", "loading weights {} %"),
            (r"Loading (?:weights|Model)", "loading weights"),
            (r"Autotuner|[Bb]uilding TRT engine|torch\.compile", "compiling"),
            (r"CUDA graph warmup|Capturing CUDA graph", "capturing graphs"),
        )
    ),
)


def phase_of(tail: str, phases: Phases) -> str | None:
    """Return the phase of the last line that names one; ``None`` if none does."""
    for line in reversed(tail.splitlines()):
        for pattern, phase in phases:
            if match := pattern.search(line):
                return phase.format(*match.groups())
    return None
