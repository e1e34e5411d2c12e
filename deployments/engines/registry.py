"""The engine adapters, by the name that a configuration uses."""

from __future__ import annotations

from importlib import import_module

from app.core.settings import Problem, SettingsError
from deployments.engines.base import EngineAdapter

ADAPTERS = {
    "vllm": "deployments.engines.vllm:Vllm",
    "sglang": "deployments.engines.sglang:Sglang",
    "tensorrt_llm": "deployments.engines.tensorrt_llm:TensorrtLlm",
    "simulated": "deployments.engines.simulated:Simulated",
}
"""Each adapter's module and class. A module is imported only when its engine is requested."""


def adapter_named(name: str) -> EngineAdapter:
    """Return the adapter of an engine.

    Raises:
        SettingsError: there is no such engine.
    """
    target = ADAPTERS.get(name)
    if target is None:
        raise SettingsError(
            Problem(("engine",), f"expected one of {', '.join(ADAPTERS)} (got {name!r})")
        )
    module, _, cls = target.partition(":")
    adapter: EngineAdapter = getattr(import_module(module), cls)()
    return adapter
