"""The routes that load and unload LoRA adapters, as vLLM 0.32 and SGLang 0.5.23 answer them.

A simulated adapter is a folder with an ``adapter_config.json``; nothing else of it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from deployments.simulator.exchange import JSON
from deployments.simulator.settings import DialectName, SimulatedSettings

_CONFIG: Final = "adapter_config.json"
_TEXT: Final = b"text/plain; charset=utf-8"
_ROUTES: Final[Mapping[DialectName, tuple[str, str]]] = {
    DialectName.VLLM: ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    DialectName.SGLANG: ("/load_lora_adapter", "/unload_lora_adapter"),
}

Answer = tuple[int, bytes, bytes]
"""A status, a body and its content type."""


class LoraRoutes:
    """The adapters of one simulated engine, changed by requests.

    Args:
        settings: the engine's; without ``adapter_room`` it has no such routes.
        loaded: the names of its adapters, which are changed in place.
    """

    def __init__(self, settings: SimulatedSettings, loaded: list[str]) -> None:
        self._dialect, self._loaded = settings.dialect, loaded
        paths = _ROUTES.get(self._dialect) if settings.adapter_room else None
        self._routes: dict[str, Callable[[Mapping[str, Any]], Answer]] = (
            dict(zip(paths, (self._load, self._unload), strict=True)) if paths else {}
        )

    def __contains__(self, path: str) -> bool:
        return path in self._routes

    def answer(self, path: str, body: Mapping[str, Any]) -> Answer:
        """Answer a request to one of the routes."""
        return self._routes[path](body)

    def _load(self, body: Mapping[str, Any]) -> Answer:
        name, path = str(body.get("lora_name")), str(body.get("lora_path"))
        if name in self._loaded:
            return self._refused(400, f"The lora adapter '{name}' has already been loaded.")
        if not (Path(path) / _CONFIG).is_file():
            return self._refused(404, f"Loading lora {name} failed: No adapter found for {path}")
        self._loaded.append(name)
        return self._done(f"Success: LoRA adapter '{name}' added successfully.")

    def _unload(self, body: Mapping[str, Any]) -> Answer:
        name = str(body.get("lora_name"))
        if name not in self._loaded:
            return self._refused(404, f"The lora adapter '{name}' cannot be found.")
        self._loaded.remove(name)
        return self._done(f"Success: LoRA adapter '{name}' removed successfully.")

    def _done(self, sentence: str) -> Answer:
        if self._dialect is DialectName.VLLM:
            return 200, sentence.encode(), _TEXT
        return 200, self._update(success=True), JSON

    def _refused(self, status: int, message: str) -> Answer:
        if self._dialect is DialectName.VLLM:
            kind = "NotFoundError" if status == 404 else "InvalidUserInput"
            error = {"message": message, "type": kind, "param": None, "code": status}
            return status, orjson.dumps({"error": error}), JSON
        return 400, self._update(success=False, message=message), JSON

    def _update(self, *, success: bool, message: str = "") -> bytes:
        loaded = dict.fromkeys(self._loaded, "/simulated")
        update = {"success": success, "error_message": message, "loaded_adapters": loaded}
        return orjson.dumps(update)
