"""How long a step of an engine takes, by its batch, prompt tokens and KV cache.

One step of continuous batching takes

    base_s + token_s * (prompt tokens in it + sequences) + kv_s * (tokens in the KV cache)

``base_s`` is reading the weights once, ``token_s`` the arithmetic of a token, and ``kv_s`` reading
the cache of a token. The three are fitted by least squares to published throughputs at a known
batch (``PUBLISHED``): LLaMA 70B, FP8, on four H100 GPUs, TensorRT-LLM 0.5.0, whose documentation is
at release/0.5.0/docs/source/performance.md of NVIDIA/TensorRT-LLM. Errors are relative.

The same model fits what ``calibrate.py`` measured on vLLM on two CPU cores (``VLLM_CPU``), with
other factors. ``VLLM_CPU_HELD_BACK`` took no part in that fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Published:
    """A batch of equal requests that is run to its end.

    Attributes:
        batch: requests in it.
        prompt, output: tokens of each.
        seconds: how long it took.
    """

    batch: int
    prompt: int
    output: int
    seconds: float


def _throughput(batch: int, prompt: int, output: int, tokens_per_s: float) -> Published:
    return Published(batch, prompt, output, batch * output / tokens_per_s)


PUBLISHED = (
    _throughput(64, 128, 128, 3317),
    _throughput(64, 128, 2048, 2616),
    _throughput(64, 2048, 128, 843),
    _throughput(64, 2048, 2048, 1583),
    # First token of a single prompt; from v0.6.1's page, which calls it v0.5 data.
    Published(1, 128, 1, 0.026),
    Published(1, 2048, 1, 0.109),
)


VLLM_CPU = (
    Published(1, 52, 1, 0.131),
    Published(1, 292, 1, 0.509),
    Published(1, 1060, 1, 1.811),
    Published(1, 52, 128, 8.072),
    Published(4, 52, 128, 8.204),
    Published(8, 52, 128, 10.829),
    Published(8, 292, 128, 14.576),
    Published(8, 1060, 64, 21.929),
)
VLLM_CPU_HELD_BACK = (
    Published(2, 100, 64, 5.194),
    Published(4, 548, 64, 8.038),
    Published(8, 164, 256, 24.569),
    Published(6, 737, 32, 9.909),
)


@dataclass(frozen=True)
class EngineModel:
    """One replica.

    Attributes:
        base_s, token_s, kv_s: the three parts of a step, in seconds; see the module.
        slots: requests that run at once.
        chunk: prompt tokens that one step computes at most.
    """

    base_s: float
    token_s: float
    kv_s: float
    slots: int = 64
    chunk: int = 2048

    def decode_s(self, batch: float, cached: float) -> float:
        """Return how long a step without prompt tokens takes, in seconds."""
        return self.base_s + self.token_s * batch + self.kv_s * cached

    def prefill_s(self, prompt: float) -> float:
        """Return the time to the first token of a prompt that is alone, in seconds."""
        return self.base_s * max(1.0, prompt / self.chunk) + self.token_s * prompt

    def batch_s(self, batch: float, prompt: float, output: float) -> float:
        """Return how long a batch of equal requests takes from its start to its end, in seconds."""
        return float(_row(batch, prompt, output) @ [self.base_s, self.token_s, self.kv_s])

    def request_s(self, prompt: float, output: float, context: float) -> float:
        """Return the replica-seconds of one request among like ones in a full batch."""
        step_s = self.decode_s(self.slots, self.slots * (context + output / 2))
        return self.token_s * prompt + output * step_s / self.slots


def _row(batch: float, prompt: float, output: float) -> NDArray[np.float64]:
    steps = max(output - 1.0, 0.0) + 1.0
    tokens = batch * (prompt + output)
    return np.array([steps, tokens, steps * batch * (prompt + output / 2)])


def fit(published: Sequence[Published], slots: int = 64) -> EngineModel:
    """Return the model with the least relative error on published figures."""
    rows = np.array([_row(one.batch, one.prompt, one.output) / one.seconds for one in published])
    base_s, token_s, kv_s = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
    return EngineModel(float(base_s), float(token_s), float(kv_s), slots)


def errors(model: EngineModel, published: Sequence[Published]) -> list[float]:
    """Return the relative error of each published figure."""
    return [model.batch_s(p.batch, p.prompt, p.output) / p.seconds - 1 for p in published]
