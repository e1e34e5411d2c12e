"""The arithmetic of memory: against published shapes, and by properties."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engines.needs import EngineNeeds, MemoryRule, TriedVersions
from deployments.preflight.facts import GIB
from deployments.preflight.memory import (
    RUNTIME,
    fit,
    kv_bytes_per_token,
    kv_room,
    read_shape,
    weight_bytes,
)

pytestmark = pytest.mark.unit


def needs(share=0.9, **given):
    rule = MemoryRule(share, "gpu_memory_utilization", given.pop("of_rest", False))
    return EngineNeeds("vllm", ("vllm",), TriedVersions("0.32", "0.34"), "vllm", rule, **given)


QWEN_8B = {
    "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 36, "hidden_size": 4096,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "torch_dtype": "bfloat16", "max_position_embeddings": 40960,
}  # fmt: skip
DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 61, "hidden_size": 7168,
    "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "torch_dtype": "bfloat16", "max_position_embeddings": 163840,
    "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip
BERT = {
    "architectures": ["BertModel"], "num_hidden_layers": 6, "hidden_size": 384,
    "num_attention_heads": 12, "max_position_embeddings": 512,
}  # fmt: skip


def shape_of(config):
    shape = read_shape(config)
    assert shape is not None
    return shape


def what_fits(room, shape, asked):
    fits = fit(room, shape, asked)
    assert fits is not None
    return fits


@pytest.mark.parametrize(
    ("config", "given", "size"),
    [
        (QWEN_8B, {}, 36 * 8 * 128 * 2 * 2),
        (QWEN_8B, {"dtype": "float32"}, 36 * 8 * 128 * 2 * 4),
        (QWEN_8B, {"kv_dtype": "fp8"}, 36 * 8 * 128 * 2),
        (QWEN_8B, {"tensor_parallel": 4}, 36 * 2 * 128 * 2 * 2),
        # More GPUs than heads: each has one.
        (QWEN_8B, {"tensor_parallel": 16}, 36 * 1 * 128 * 2 * 2),
        (QWEN_8B, {"pipeline_parallel": 2}, 18 * 8 * 128 * 2 * 2),
        # One compressed vector for all heads, on every GPU.
        (DEEPSEEK, {"tensor_parallel": 8}, 61 * 576 * 2),
        # The shape of the text in a model that sees pictures.
        ({"architectures": ["XForConditionalGeneration"], "text_config": QWEN_8B}, {}, 147_456),
        (QWEN_8B | {"layer_types": ["linear_attention", "full_attention"] * 18}, {}, 73_728),
    ],
)
def test_the_kv_cache_of_a_token(config, given, size):
    assert kv_bytes_per_token(shape_of(config), needs(**given)) == size


def test_models_that_generate_nothing_have_no_kv_cache_and_odd_configs_no_shape():
    assert not shape_of(BERT).generates
    assert shape_of(QWEN_8B).generates and shape_of(DEEPSEEK).quantized
    for odd in ({}, {"num_hidden_layers": None}, QWEN_8B | {"num_attention_heads": 0}):
        shape = read_shape({name: value for name, value in odd.items() if name != "head_dim"})
        assert shape is None or shape.kv_heads


def test_weights_are_spread_and_change_with_their_type():
    shape = shape_of(QWEN_8B)
    assert weight_bytes(16 * GIB, shape, needs()) == 16 * GIB
    assert weight_bytes(16 * GIB, shape, needs(dtype="float32")) == 32 * GIB
    assert weight_bytes(16 * GIB, shape, needs(tensor_parallel=2, pipeline_parallel=2)) == 4 * GIB
    assert weight_bytes(GIB, shape_of(DEEPSEEK), needs(dtype="float32")) == GIB, "quantized"


def test_the_share_is_of_the_gpu_or_of_what_weights_leave():
    assert kv_room(80 * GIB, 16 * GIB, needs(0.9)) == pytest.approx(56 * GIB - RUNTIME)
    rest = kv_room(80 * GIB, 16 * GIB, needs(0.9, of_rest=True))
    assert rest == pytest.approx(0.9 * (64 * GIB - RUNTIME))


def test_a_24_gb_gpu_does_not_hold_one_long_request_of_an_8b_model():
    """facts: 16.4 GB of weights and 4.8 GB for 32,768 tokens do not fit into 0.9 of an L4."""
    shape = shape_of(QWEN_8B)
    room = kv_room(23034 << 20, weight_bytes(16_381_470_720, shape, needs()), needs())
    assert what_fits(room, shape, needs(context=32768)).longest == 0
    assert what_fits(room, shape, needs(context=4096)).longest > 0


@given(
    gpu=st.integers(1, 200),
    weights=st.integers(0, 200),
    share=st.floats(0.1, 1.0),
    context=st.integers(1, 1 << 20),
    of_rest=st.booleans(),
)
def test_what_fits_does_fit(gpu, weights, share, context, of_rest):
    asked = needs(share, context=context, of_rest=of_rest)
    shape = shape_of(QWEN_8B)
    fits = what_fits(kv_room(gpu * GIB, weights * GIB, asked), shape, asked)
    used = fits.longest * context * kv_bytes_per_token(shape, asked)
    if fits.longest:
        assert used + weights * GIB <= gpu * GIB
    assert fits.usual >= fits.longest >= 0
    assert fits.usual_tokens <= context and math.isfinite(fits.tokens)
