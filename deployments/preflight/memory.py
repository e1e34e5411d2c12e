"""Arithmetic of an engine's memory: weights and KV cache against a GPU. Pure.

The result is an estimate: what an engine takes besides (``RUNTIME``) depends on its version, its
kernels and the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from deployments.engines.needs import EngineNeeds
from deployments.preflight.facts import GIB

USUAL_TOKENS: Final = 2048
"""Prompt and answer of a usual request. The Azure traces of 2023 have 1,366 tokens on average in
conversations, and 2,076 in code."""

RUNTIME: Final = 2 * GIB
"""What an engine takes of each GPU besides weights and KV cache: CUDA's context, the activations of
a step of 8,192 tokens, and captured graphs. Assumed, and not measured on each GPU."""

_BYTES: Final = {
    "float32": 4.0, "float": 4.0, "float16": 2.0, "half": 2.0, "bfloat16": 2.0,
    "fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "nvfp4": 0.5, "fp4": 0.5,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What ``config.json`` says of a model.

    Attributes:
        generates: whether it generates text, and so has a KV cache.
        layers: the number of layers with attention.
        kv_heads: the number of heads of keys and values; 0 if all share one compressed vector.
        kv_width: numbers in a token's keys and values, per layer and head.
        context: the longest request in tokens; ``None`` if it does not say.
        dtype: the type of the weights; empty if it does not say.
        quantized: whether the weights are quantized.
    """

    generates: bool
    layers: int
    kv_heads: int
    kv_width: int
    context: int | None
    dtype: str
    quantized: bool


def read_shape(config: Mapping[str, Any]) -> ModelShape | None:
    """Return the shape of a model from its ``config.json``; ``None`` if that does not say it."""
    inner = config.get("text_config")
    text: Mapping[str, Any] = inner if isinstance(inner, dict) else config
    try:
        layers, hidden = int(text["num_hidden_layers"]), int(text["hidden_size"])
        heads = int(text["num_attention_heads"])
        kv_heads, width = _kv(text, heads, hidden)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and kinds:
        layers = sum("linear" not in str(kind) and "attention" in str(kind) for kind in kinds)
    names = " ".join(map(str, config.get("architectures") or ()))
    context = text.get("max_position_embeddings")
    return ModelShape(
        generates="ForCausalLM" in names or "ForConditionalGeneration" in names,
        layers=layers,
        kv_heads=kv_heads,
        kv_width=width,
        context=context if isinstance(context, int) else None,
        dtype=str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or ""),
        quantized=bool(config.get("quantization_config")),
    )


def _kv(text: Mapping[str, Any], heads: int, hidden: int) -> tuple[int, int]:
    """Return the heads of keys and values, and the numbers for each of them."""
    if rank := text.get("kv_lora_rank"):
        return 0, int(rank) + int(text.get("qk_rope_head_dim") or 0)
    head = int(text.get("head_dim") or hidden // heads)
    return int(text.get("num_key_value_heads") or heads), 2 * head


def kv_bytes_per_token(shape: ModelShape, needs: EngineNeeds) -> float:
    """Return the bytes that a token takes in the KV cache of each GPU."""
    dtype = needs.kv_dtype or needs.dtype or shape.dtype
    layers = math.ceil(shape.layers / needs.pipeline_parallel)
    # Every GPU has at least one head. A compressed vector cannot be split.
    heads = math.ceil(shape.kv_heads / needs.tensor_parallel) if shape.kv_heads else 1
    return layers * heads * shape.kv_width * _BYTES.get(dtype, 2.0)


def weight_bytes(on_disk: int, shape: ModelShape | None, needs: EngineNeeds) -> float:
    """Return the bytes that the weights take on each GPU."""
    scale = 1.0
    if shape is not None and needs.dtype and shape.dtype and not shape.quantized:
        scale = _BYTES.get(needs.dtype, 2.0) / _BYTES.get(shape.dtype, 2.0)
    return on_disk * scale / needs.gpus


def kv_room(gpu: int, weights: float, needs: EngineNeeds) -> float:
    """Return the bytes that are left for the KV cache of a GPU; negative if weights do not fit."""
    rule = needs.memory
    if rule.of_rest:
        return rule.share * (gpu - RUNTIME - weights)
    return rule.share * gpu - weights - (RUNTIME if rule.runtime_inside else 0)


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits into an engine.

    Attributes:
        tokens: how many tokens the KV cache holds; negative if the weights alone do not fit.
        context: the longest request in tokens.
    """

    tokens: float
    context: int

    @property
    def longest(self) -> int:
        """How many requests of the greatest length fit at once."""
        return max(0, math.floor(self.tokens / self.context))

    @property
    def usual(self) -> int:
        """How many requests of a usual length fit at once."""
        return max(0, math.floor(self.tokens / self.usual_tokens))

    @property
    def usual_tokens(self) -> int:
        """The usual length, in tokens."""
        return min(USUAL_TOKENS, self.context)


def fit(room: float, shape: ModelShape, needs: EngineNeeds) -> Fit | None:
    """Return what fits into a KV cache; ``None`` if the greatest length is not known."""
    context = needs.context or shape.context
    per_token = kv_bytes_per_token(shape, needs)
    return Fit(room / per_token, context) if context and per_token else None
