"""Where Serve writes the log of this replica."""

from __future__ import annotations

import logging
from logging.handlers import MemoryHandler
from pathlib import Path

from ray import serve
from ray.serve._private.logging_utils import get_serve_logs_dir


def replica_log(kind: str) -> Path:
    """Return the path of a further log of this replica, beside Serve's own."""
    replica = serve.get_replica_context().replica_id
    deployment = replica.deployment_id
    name = f"{kind}_{deployment.app_name}_{deployment.name}_{replica.unique_id}.log"
    # An application's name may hold any character.
    return _folder() / name.replace("/", "_")


def session_logs() -> Path:
    """Return the folder of Serve's logs on this machine, for a process that is connected to Ray."""
    return Path(get_serve_logs_dir())


def _folder() -> Path:
    """Return the folder of this replica's log, as its ``logging_config`` has it."""
    for handler in logging.getLogger("ray.serve").handlers:
        target = handler.target if isinstance(handler, MemoryHandler) else handler
        if isinstance(target, logging.FileHandler):
            return Path(target.baseFilename).parent
    return Path(get_serve_logs_dir())
