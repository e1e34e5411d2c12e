"""Pools on real engines, for the tests that need one."""

from typing import Any

SGLANG: dict[str, Any] = {
    "name": "sglang",
    "engine": "sglang",
    "model": "${FRONTLINE_HOME}/models/smollm2-135m-instruct",
    "python": "${FRONTLINE_HOME}/envs/sglang-cpu/bin/python",
    "slots": 4,
    "engine_args": {
        "device": "cpu",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "disable_overlap_schedule": True,
        "context_length": 4096,
        # Otherwise the KV cache takes most of the machine's memory, and half a minute to get it.
        "max_total_tokens": 16384,
        # Otherwise an idle scheduler keeps a core busy.
        "sleep_on_idle": True,
        "tool_call_parser": "pythonic",
    },
    "environment": {
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    },
}
"""SGLang on the CPU with the small chat model: 2.6 GB."""
