"""A middleware that vLLM's API server loads (``--middleware``).

Runs under the engine's interpreter, where Frontline is not installed: standard library only.

It requires the key on every route, which vLLM's own ``--api-key`` does not. On
``GET /frontline/facts`` it reports the configuration that is in force in the running engine, after
every flag, file and default, and not the requested one.
"""

from __future__ import annotations

from typing import Any

import frontline_guard
from frontline_guard import Receive, Scope, Send, answer

FACTS_PATH = "/frontline/facts"


class Guard(frontline_guard.Guard):
    """The guard around vLLM's application, with the route for the facts."""

    async def admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == FACTS_PATH:
            await answer(send, 200, _facts(scope["app"]))
        else:
            await super().admit(scope, receive, send)


def _facts(app: Any) -> dict[str, Any]:
    import vllm

    # Facts that are not found are reported as null, and null never counts as a capability.
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
