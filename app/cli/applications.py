"""Builds the applications of a config file as Serve does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def build_application(application: Mapping[str, Any]) -> Any:
    """Return the application of an entry under ``applications``, with its own deployments.

    Raises:
        ImportError, AttributeError, ValueError: ``import_path`` names nothing.
        SettingsError: ``args`` is wrong.
    """
    return builder(application["import_path"])(application.get("args") or {})


def builder(import_path: str) -> Callable[[dict[str, Any]], Any]:
    """Return the function that an ``import_path`` names.

    Raises:
        ImportError, AttributeError, ValueError: it names nothing.
    """
    module, separator, attribute = import_path.replace(":", ".").rpartition(".")
    if not separator:
        raise ValueError("expected `module:attribute`")
    build: Callable[[dict[str, Any]], Any] = getattr(import_module(module), attribute)
    return build
