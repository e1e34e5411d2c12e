"""Serve's controller, which knows every application and deployment."""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE


def serve_controller() -> Any:
    """Return a handle to the controller's actor. Blocks for a question to Ray's head.

    Raises:
        ValueError: Serve does not run on this cluster.
    """
    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
