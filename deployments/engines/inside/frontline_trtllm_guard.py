"""A middleware that TensorRT-LLM's server loads (``--middleware``), in builds that have the option.

Runs under the engine's interpreter, where Frontline is not installed: standard library only.

It requires the key on every route; TensorRT-LLM itself has no key. On ``GET /frontline/facts`` it
reports what is in force in the running engine, after every option, file and default.
"""

from __future__ import annotations

from typing import Any

import frontline_guard
from frontline_guard import Receive, Scope, Send, answer

FACTS_PATH = "/frontline/facts"


class Guard(frontline_guard.Guard):
    """The guard around TensorRT-LLM's application, with the route for the facts."""

    async def admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == FACTS_PATH:
            await answer(send, 200, _facts(scope.get("app")))
        else:
            await super().admit(scope, receive, send)


def _facts(app: Any) -> dict[str, Any]:
    # Facts that are not found are reported as null, and null never counts as a capability.
    arguments = getattr(_generator(app), "args", None)
    policy = getattr(getattr(arguments, "scheduler_config", None), "waiting_queue_policy", None)
    return {
        "waiting_queue_policy": getattr(policy, "value", policy),
        "max_seq_len": getattr(arguments, "max_seq_len", None),
        "max_batch_size": getattr(arguments, "max_batch_size", None),
    }


def _generator(app: Any) -> Any:
    """Return the engine behind the routes, which are methods of the object that owns it."""
    for route in getattr(app, "routes", ()):
        server = getattr(getattr(route, "endpoint", None), "__self__", None)
        if (generator := getattr(server, "generator", None)) is not None:
            return generator
    return None
