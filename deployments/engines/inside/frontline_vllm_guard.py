"""A middleware that vLLM's API server loads (``--middleware``).

Runs under the engine's interpreter, where Frontline is not installed: standard library only.

It requires the key on every route, which vLLM's own ``--api-key`` does not. On
``GET /frontline/facts`` it reports the configuration that is in force in the running engine, after
every flag, file and default, and not the requested one.

With each answer it tells how often the request was suspended (``frontline_tally``). vLLM counts
that for each request in the process of its API server, if its statistics are on, as by default.

Each scheduler of the engine is asked over vLLM's own channel to its engine cores whether it
preempts. So the answer is that of the running scheduler, wherever its process is.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import sys
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import frontline_guard
import frontline_tally
from frontline_guard import Application, Receive, Scope, Send, answer, read_json

logger = logging.getLogger("vllm.frontline_guard")

FACTS_PATH = "/frontline/facts"
LIMIT_PATH = "/frontline/limit"
AT_THE_ROOT = {
    f"/v1/{name}": f"/{name}" for name in ("tokenize", "detokenize", "classify", "pooling")
}
"""Routes that vLLM has at its root, where Frontline asks every engine below ``/v1``."""
SCHEDULER = "frontline_vllm_scheduler.make_scheduler"
_REPORT = "frontline_preemption_report"
_LIMIT = "frontline_limit"
_REPORT_S = 30.0
"""The longest wait for the report. An engine core answers between two steps."""


class Guard(frontline_guard.Guard):
    """The guard around vLLM's application, with the route for the facts."""

    def __init__(self, app: Application) -> None:
        super().__init__(app)
        self._tallies = _count_preemptions()

    async def admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == FACTS_PATH:
            await answer(send, 200, await _facts(scope["app"]))
            return
        if scope["path"] == LIMIT_PATH:
            await answer(send, 200, await _limit(scope["app"], await read_json(receive)))
            return
        path = AT_THE_ROOT.get(scope["path"])
        if path is not None:
            scope = {**scope, "path": path, "raw_path": path.encode()}
        elif self._tallies and _has_statistics(scope["app"]):
            send = frontline_tally.telling(send)
        await super().admit(scope, receive, send)


@cache
def _count_preemptions() -> bool:
    """Have vLLM add each of its requests to the tally of its HTTP request; return whether it does.

    vLLM itself counts a request's preemptions, and puts them into a histogram only.
    """
    try:
        from vllm.v1.engine.output_processor import OutputProcessor
        from vllm.v1.metrics.stats import RequestStateStats

        add = OutputProcessor.add_request
        assert RequestStateStats().num_preemptions == 0
    except Exception as error:
        logger.warning("How often a request is suspended is not told: %r", error)
        return False

    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        add(self, request, *args, **kwargs)
        tally = frontline_tally.current()
        state = self.request_states.get(request.request_id)
        if tally is not None and state is not None and state.stats is not None:
            tally.add(partial(getattr, state.stats, "num_preemptions"))

    OutputProcessor.add_request = add_request
    return True


def _has_statistics(app: Any) -> bool:
    client = getattr(getattr(app, "state", None), "engine_client", None)
    return bool(getattr(client, "log_stats", False))


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
        "runner": getattr(model, "runner_type", None),
        "kv_tokens": _kv_tokens(getattr(config, "cache_config", None)),
        "preemption": await _preemption(app, scheduler),
        "messages_priority_header": _messages_priority_header(app),
    }


def _messages_priority_header(app: Any) -> str | None:
    """Return the header from which ``/v1/messages`` takes a priority; ``None`` if from none.

    The requests of this route have no field for it. The route hands its HTTP request on to the code
    of chat completions, which reads the header. Both are looked at in the running server.
    """
    serving: Any = getattr(app.state, "anthropic_serving_messages", None)
    try:
        reads = serving._get_priority  # noqa: SLF001 - there is no public way to ask
        name: str = sys.modules[reads.__module__].PRIORITY_HEADER
        source = inspect.getsource(type(serving).create_messages)
        given = reads(SimpleNamespace(priority=0), SimpleNamespace(headers={name: "7"}))
    except Exception as error:
        logger.warning("Messages take no priority from a header here: %r", error)
        return None
    hands_on = re.search(r"\.create_chat_completion\(\s*\w+,\s*raw_request\s*\)", source)
    return name if hands_on and given == 7 else None


def _kv_tokens(cache: Any) -> int | None:
    """Return how many tokens the KV cache holds, which vLLM finds out while it starts."""
    blocks, size = getattr(cache, "num_gpu_blocks", None), getattr(cache, "block_size", None)
    return blocks * size if blocks and size else None


async def _preemption(app: Any, scheduler: Any) -> list[Any] | None:
    """Return the report of each scheduler; ``None`` if they are others or do not answer."""
    try:
        return await _ask_all(app, scheduler, _REPORT)
    except Exception:
        logger.exception("The scheduler did not report whether it preempts")
        return None


async def _limit(app: Any, wanted: Any) -> dict[str, bool]:
    """Have every scheduler run fewer requests at once; say whether all do.

    ``wanted`` is the request's body: ``{"slots": 12}``.
    """
    slots = wanted.get("slots") if isinstance(wanted, dict) else None
    if type(slots) is not int or slots < 1:
        return {"limited": False}
    config = getattr(app.state, "vllm_config", None)
    try:
        done = await _ask_all(app, getattr(config, "scheduler_config", None), _LIMIT, slots)
    except Exception:
        logger.exception("The scheduler did not say whether it runs fewer requests at once")
        done = None
    return {"limited": bool(done) and all(one is True for one in done or ())}


async def _ask_all(app: Any, scheduler: Any, method: str, *given: Any) -> list[Any] | None:
    """Return the answer of each of Frontline's schedulers; ``None`` if they are others."""
    if getattr(scheduler, "scheduler_cls", None) != SCHEDULER:
        return None
    cores = app.state.engine_client.engine_core
    answers = await asyncio.wait_for(cores.call_utility_all_async(method, *given), _REPORT_S)
    return list(answers)
