"""Where Serve writes the log of this replica, and what it leaves out of it."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, Final

from ray import serve
from ray.serve._private.logging_utils import get_serve_logs_dir

_SERVE: Final = "ray.serve"
_ACCESS: Final = "serve_access_log"
"""What Serve marks the line of a request with."""
_logged: ContextVar[bool] = ContextVar("logged", default=False)


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


def leave_out_logged() -> None:
    """Have Serve write no line of its own for requests that ``note_logged`` was called for.

    A filter would do, but a record would be made first, with a walk of the stack: the most that
    Serve does for a request.
    """
    logger = logging.getLogger(_SERVE)
    write = logger.info

    def info(message: object, *arguments: object, stacklevel: int = 1, **options: Any) -> None:
        if not (_logged.get() and _ACCESS in (options.get("extra") or ())):
            # The line is the caller's, and not this function's.
            write(message, *arguments, stacklevel=stacklevel + 1, **options)

    # Of this one logger, and of this process alone: an ingress has no other use for it.
    vars(logger)["info"] = info


def note_logged() -> None:
    """Note that the current task's request is logged already."""
    _logged.set(True)


def _folder() -> Path:
    """Return the folder of this replica's log, as its ``logging_config`` has it."""
    for handler in logging.getLogger(_SERVE).handlers:
        target = handler.target if isinstance(handler, MemoryHandler) else handler
        if isinstance(target, logging.FileHandler):
            return Path(target.baseFilename).parent
    return Path(get_serve_logs_dir())
