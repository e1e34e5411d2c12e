"""A middleware that vLLM's API server loads (``--middleware``).

Runs under the engine's interpreter, where Frontline is not installed: standard library only.

It requires the key on every route, which vLLM's own ``--api-key`` does not. On
``GET /frontline/facts`` it reports the configuration that is in force in the running engine, after
every flag, file and default, and not the requested one.

Each scheduler of the engine is asked over vLLM's own channel to its engine cores whether it
preempts. So the answer is that of the running scheduler, wherever its process is.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import frontline_guard
from frontline_guard import Receive, Scope, Send, answer

logger = logging.getLogger("vllm.frontline_guard")

FACTS_PATH = "/frontline/facts"
SCHEDULER = "frontline_vllm_scheduler.make_scheduler"
_REPORT = "frontline_preemption_report"
_REPORT_S = 30.0
"""The longest wait for the report. An engine core answers between two steps."""


class Guard(frontline_guard.Guard):
    """The guard around vLLM's application, with the route for the facts."""

    async def admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == FACTS_PATH:
            await answer(send, 200, await _facts(scope["app"]))
        else:
            await super().admit(scope, receive, send)


async def _facts(app: Any) -> dict[str, Any]:
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
        "preemption": await _preemption(app, scheduler),
    }


async def _preemption(app: Any, scheduler: Any) -> list[Any] | None:
    """Return the report of each scheduler; ``None`` if they are others or do not answer."""
    if getattr(scheduler, "scheduler_cls", None) != SCHEDULER:
        return None
    try:
        cores = app.state.engine_client.engine_core
        reports = await asyncio.wait_for(cores.call_utility_all_async(_REPORT), _REPORT_S)
    except Exception:
        logger.exception("The scheduler did not report whether it preempts")
        return None
    return list(reports)
