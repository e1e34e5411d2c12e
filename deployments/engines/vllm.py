"""vLLM's adapter: flags, sign of priority and facts of its OpenAI server.

Based on the source of vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from app.core.dialect import Dialect, Route
from deployments.engines.base import (
    LOW_FIRST,
    METERED_STREAM,
    EngineAdapter,
    EngineContractError,
    EngineFacts,
    EngineHttp,
    Launch,
    NodeSpan,
    prove_guarded,
    refuse_reserved,
    render_flags,
)

_GUARD: Final = "frontline_vllm_guard"
_HEADLESS: Final = "frontline_vllm_headless"
_SCHEDULER: Final = "frontline_vllm_scheduler.make_scheduler"
_INSIDE: Final = Path(__file__).parent / "inside"
_POLICY: Final = "priority"
_FACTS_PATH: Final = "/frontline/facts"
# Each of these would open a way around the ingress, or break what the ingress relies on.
_RESERVED: Final = frozenset(
    {
        "api_key",
        "headless",
        "host",
        "master_addr",
        "master_port",
        "model",
        "nnodes",
        "node_rank",
        "port",
        "root_path",
        "served_model_name",
        "ssl_keyfile",
        "uds",
    }
)


class Vllm(EngineAdapter):
    """vLLM's ``vllm.entrypoints.openai.api_server``."""

    name = "vllm"
    ready_path = "/health"
    health_path = "/health"
    spans_nodes = True

    def command(self, launch: Launch) -> list[str]:
        refuse_reserved(launch.engine_args, _RESERVED)
        args: dict[str, Any] = {
            "max_num_seqs": launch.slots,
            "scheduling_policy": _POLICY,
            **({"scheduler_cls": _SCHEDULER} if self._is_to_preempt(launch) else {}),
            "enable_prompt_tokens_details": True,
            "disable_uvicorn_access_log": True,
            **launch.engine_args,
            "model": launch.model,
            "host": launch.host,
            "port": launch.port,
            "served_model_name": launch.served_name,
            **_span_args(launch.span),
        }
        own = args.pop("middleware", [])
        if launch.span.rank:
            # `python -m vllm.entrypoints.openai.api_server` cannot start a headless part.
            flags = render_flags(args | {"headless": True})
            return [launch.python, "-m", _HEADLESS, "serve", *flags]
        middlewares = [f"{_GUARD}.Guard", *([own] if isinstance(own, str) else own)]
        # Not the `vllm` script: it looks for a distribution named vllm, and the CPU build has
        # another name.
        command = [launch.python, "-m", "vllm.entrypoints.openai.api_server", *render_flags(args)]
        # In vLLM the middleware that is named last is the outermost.
        for middleware in reversed(middlewares):
            command += ["--middleware", middleware]
        return command

    def environment(self, launch: Launch) -> dict[str, str]:
        return {
            "PYTHONPATH": str(_INSIDE),
            # In the environment and not as a flag: other users can read a command line.
            "FRONTLINE_ENGINE_KEY": launch.key,
            "VLLM_NO_USAGE_STATS": "1",
            # Otherwise the parts look for each other at the address of this machine's host name.
            **({"VLLM_HOST_IP": launch.span.here} if launch.span.nodes > 1 else {}),
        }

    def priority_routes(self, launch: Launch) -> frozenset[Route]:
        return _priority_routes(launch.engine_args.get("scheduling_policy", _POLICY))

    def _is_to_preempt(self, launch: Launch) -> bool:
        return launch.preemption and bool(self.priority_routes(launch))

    async def inspect(self, launch: Launch, http: EngineHttp) -> EngineFacts:
        # vLLM's own ``--api-key`` leaves ``/invocations``, which answers chats, and others open.
        await prove_guarded(http, "vLLM", ("/v1/models", "/invocations", "/metrics"))
        status, facts = await http.get_json(_FACTS_PATH)
        if status != 200 or not isinstance(facts, dict):
            raise EngineContractError(f"vLLM did not tell its facts (status {status})")
        routes = _priority_routes(facts.get("scheduling_policy"))
        dialect = Dialect(
            engine=self.name,
            priority_values=LOW_FIRST,
            priority_routes=routes,
            stream_options=METERED_STREAM,
            preempts=bool(routes) and _preempts(facts.get("preemption")),
        )
        return EngineFacts(str(facts.get("version")), facts.get("max_model_len"), dialect)


def _preempts(schedulers: object) -> bool:
    """Return whether every scheduler of the engine has reported that it preempts."""
    if not isinstance(schedulers, list) or not schedulers:
        return False
    return all(isinstance(one, dict) and one.get("preempts") is True for one in schedulers)


def _priority_routes(policy: object) -> frozenset[Route]:
    return frozenset(Route) if policy == _POLICY else frozenset()


def _span_args(span: NodeSpan) -> dict[str, Any]:
    if span.nodes == 1:
        return {}
    return {
        "nnodes": span.nodes,
        "node_rank": span.rank,
        "master_addr": span.address,
        "master_port": span.port,
    }
