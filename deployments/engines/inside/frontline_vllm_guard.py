"""Loaded by vLLM's API server into itself, as a middleware (``--middleware``).

Runs under the engine's interpreter, where Frontline is not installed: standard library only.

It asks for the key on every route, which vLLM's own ``--api-key`` does not, and tells on
``GET /frontline/facts`` what the running engine has in force: its configuration as it stands
after every flag, file and default, not what it was asked to have.
"""

from __future__ import annotations

from typing import Any

import frontline_guard
from frontline_guard import Receive, Scope, Send, answer

FACTS_PATH = "/frontline/facts"


class Guard(frontline_guard.Guard):
    """An ASGI application around vLLM's."""

    async def admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == FACTS_PATH:
            await answer(send, 200, _facts(scope["app"]))
        else:
            await super().admit(scope, receive, send)


def _facts(app: Any) -> dict[str, Any]:
    import vllm

    # Anything that is not found is told as null, and a null is never taken for a capability.
    config = getattr(app.state, "vllm_config", None)
    scheduler = getattr(config, "scheduler_config", None)
    model = getattr(config, "model_config", None)
    policy = getattr(scheduler, "policy", None)
    return {
        "version": vllm.__version__,
        "scheduling_policy": getattr(policy, "value", policy),
        "max_num_seqs": getattr(scheduler, "max_num_seqs", None),
        "max_model_len": getattr(model, "max_model_len", None),
    }
