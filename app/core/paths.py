"""Expands paths of a configuration on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from app.core.settings import Problem, SettingsError


def frontline_home() -> Path:
    """Return the folder of environments and models; it is in the user's cache by default."""
    if home := os.environ.get("FRONTLINE_HOME"):
        return Path(home)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "frontline"


def expand_path(value: str) -> str:
    """Return ``value`` with ``~`` and environment variables replaced, on this machine.

    Raises:
        SettingsError: ``value`` names a variable that is not set here.
    """
    value = value.replace("${FRONTLINE_HOME}", str(frontline_home()))
    expanded = os.path.expanduser(os.path.expandvars(value))
    if "$" in expanded:
        raise SettingsError(Problem((), f"{value!r} names an environment variable that is not set"))
    return expanded
