"""Pools on real engines, for the tests that need one, as the configurations have them."""

from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[2] / "configs"


def pool_of(config: str, application: str, name: str) -> dict[str, Any]:
    """Return a pool of a model in one of the configuration files."""
    apps = yaml.safe_load((CONFIGS / config).read_text())["applications"]
    [app] = (app for app in apps if app["name"] == application)
    [pool] = (pool for pool in app["args"]["pools"] if pool["name"] == name)
    return pool


SGLANG = pool_of("three-engines.yaml", "smollm2", "sglang")
"""SGLang on the CPU with the small chat model: 2.6 GB."""
