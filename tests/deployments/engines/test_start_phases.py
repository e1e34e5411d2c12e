"""Phases of a start, in lines that the engines write."""

import pytest

from deployments.engines.registry import adapter_named

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("engine", "line", "phase"),
    [
        ("vllm", "Fetching 12 files:  25%|##5   | 3/12 [00:07<00:22]", "downloading 25 %"),
        ("vllm", "INFO [cpu_model_runner.py:68] Starting to load model /m...", "loading weights"),
        (
            "vllm",
            "Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:01<00:01]",
            "loading weights 50 %",
        ),
        (
            "vllm",
            "INFO [backends.py:1] Dynamo bytecode transform time: 5.80 s",
            "compiling",
        ),
        (
            "vllm",
            "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  66%|###",
            "capturing graphs 66 %",
        ),
        (
            "vllm",
            "INFO [core.py:402] init engine (profile, create kv cache, warmup model) took 4.61 s",
            "starting the server",
        ),
        ("vllm", "WARNING Enforce eager set, disabling torch.compile, CUDAGraphs", None),
        ("sglang", "[2026-11-29 19:00:00] Load weight begin. avail mem=78.4 GB", "loading weights"),
        (
            "sglang",
            "Loading safetensors checkpoint shards:  75% Completed | 3/4",
            "loading weights 75 %",
        ),
        ("sglang", "Capture decode CUDA graph begin. It takes minutes.", "capturing graphs"),
        (
            "sglang",
            "Capturing batches (bs=8 avail_mem=6.9 GB):  30%|###       | 7/23",
            "capturing graphs 30 %",
        ),
        ("tensorrt_llm", "Loading weights: 40%|####", "loading weights 40 %"),
        ("tensorrt_llm", "[Autotuner] Autotuning process starts ...", "compiling"),
        (
            "tensorrt_llm",
            "Run generation-only CUDA graph warmup",
            "capturing graphs",
        ),
        ("simulated", "nothing of interest", None),
    ],
)
def test_the_last_line_that_names_a_phase_counts(engine, line, phase):
    adapter = adapter_named(engine)
    earlier = "Fetching 12 files:  8%|#" if phase else ""
    assert adapter.start_phase(f"{earlier}\n{line}\nINFO something else") == phase
