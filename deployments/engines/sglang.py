"""SGLang's adapter: flags, sign of priority and facts of its OpenAI server.

Based on the source of SGLang 0.5.23.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from app.core.dialect import Dialect, Route
from deployments.engines.base import (
    LOW_FIRST,
    METERED_STREAM,
    PREEMPTION_MARGIN,
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

PRIORITY_ROUTES: Final = frozenset(Route) - {Route.RESPONSES}
"""SGLang's Responses route accepts a priority and ignores it."""

_PRIORITY_FLAGS: Final = {
    "enable_priority_scheduling": True,
    "schedule_low_priority_values_first": True,
    # Otherwise a request without priority, such as one on the Responses route, comes last.
    "default_priority_value": 0,
    # Otherwise the request that has generated least is retracted when the KV cache is full.
    "retraction_policy": "priority",
}
_PREEMPTION_FLAGS: Final[dict[bool, dict[str, Any]]] = {
    True: {"priority_scheduling_preemption_threshold": PREEMPTION_MARGIN},
    False: {"disable_priority_preemption": True},
}

_INSIDE: Final = Path(__file__).parent / "inside"
_LAUNCHER: Final = "frontline_sglang"
# Each of these would open a way around the ingress, or break what the ingress relies on.
_RESERVED: Final = frozenset(
    {
        "admin_api_key",
        "api_key",
        "config",
        "dist_init_addr",
        "fastapi_root_path",
        "grpc_mode",
        "grpc_port",
        "host",
        "model",
        "model_path",
        "nnodes",
        "node_rank",
        "port",
        "served_model_name",
        "smg_grpc_mode",
        "ssl_certfile",
        "ssl_keyfile",
    }
)


class Sglang(EngineAdapter):
    """SGLang's ``sglang.launch_server``."""

    name = "sglang"
    ready_path = "/ready"
    # SGLang's own /health takes a second and generates a token. This route queries the scheduler.
    health_path = "/server_info"
    spans_nodes = True

    def command(self, launch: Launch) -> list[str]:
        refuse_reserved(launch.engine_args, _RESERVED)
        args: dict[str, Any] = {
            "max_running_requests": launch.slots,
            # Without priority scheduling SGLang rejects the other flags.
            **(_priority_flags(launch) if _prioritized(launch) else {}),
            "enable_metrics": True,
            "enable_cache_report": True,
            # Otherwise SGLang logs every request, including the health checks.
            "log_level_http": "warning",
            **launch.engine_args,
            "model_path": launch.model,
            "host": launch.host,
            "port": launch.port,
            "served_model_name": launch.served_name,
            # SGLang's warmup sends HTTP requests without a key; `inspect` warms up with the key.
            "skip_server_warmup": True,
            **_span_args(launch.span),
        }
        return [launch.python, "-m", _LAUNCHER, *render_flags(args)]

    def environment(self, launch: Launch) -> dict[str, str]:
        return {
            "PYTHONPATH": str(_INSIDE),
            # In the environment and not as --api-key: other users can read a command line, and
            # SGLang logs its arguments.
            "FRONTLINE_ENGINE_KEY": launch.key,
            "SGLANG_HTTP_SERVER_APP_PATH": f"{_LAUNCHER}:app",
        }

    def priority_routes(self, launch: Launch) -> frozenset[Route]:
        return PRIORITY_ROUTES if _prioritized(launch) else frozenset()

    async def inspect(self, launch: Launch, http: EngineHttp) -> EngineFacts:
        # SGLang's own ``--api-key`` leaves health, readiness, metrics and its websocket route open.
        await prove_guarded(http, "SGLang", ("/v1/models", "/health_generate", "/metrics"))
        status, info = await http.get_json("/server_info")
        if status != 200 or not isinstance(info, dict):
            raise EngineContractError(f"SGLang did not tell its facts (status {status})")
        schedulers = info.get("internal_states")
        low_first = _low_goes_first(schedulers)
        sign = 1 if low_first else -1
        dialect = Dialect(
            engine=self.name,
            priority_values={tier: sign * value for tier, value in LOW_FIRST.items()},
            priority_routes=frozenset() if low_first is None else PRIORITY_ROUTES,
            stream_options=METERED_STREAM,
            preempts=low_first is not None and _preempt(schedulers),
        )
        await _warm_up(launch, http)
        return EngineFacts(str(info.get("version")), await _context_length(http), dialect)


def _prioritized(launch: Launch) -> bool:
    return bool(launch.engine_args.get("enable_priority_scheduling", True))


def _priority_flags(launch: Launch) -> dict[str, Any]:
    return {**_PRIORITY_FLAGS, **_PREEMPTION_FLAGS[launch.preemption]}


def _span_args(span: NodeSpan) -> dict[str, Any]:
    if span.nodes == 1:
        return {}
    return {
        "nnodes": span.nodes,
        "node_rank": span.rank,
        "dist_init_addr": span.meeting_place,
    }


def _low_goes_first(schedulers: object) -> bool | None:
    """Return whether low numbers go first; ``None`` unless all schedulers have the same order.

    A scheduler without priority scheduling in force has none. ``schedulers`` is the configuration
    that each running scheduler reports.
    """
    orders = [_order(state) for state in schedulers] if isinstance(schedulers, list) else []
    return orders[0] if orders and all(order is orders[0] for order in orders) else None


def _preempt(schedulers: object) -> bool:
    """Return whether all schedulers preempt, and for a better tier only."""
    gap = min(after - before for before, after in pairwise(sorted(LOW_FIRST.values())))

    def preempts(scheduler: object) -> bool:
        match scheduler:
            case {
                "disable_priority_preemption": False,
                "priority_scheduling_preemption_threshold": int(threshold),
            }:
                return 0 <= threshold < gap
        return False

    return isinstance(schedulers, list) and all(map(preempts, schedulers))


def _order(scheduler: object) -> bool | None:
    match scheduler:
        case {
            "enable_priority_scheduling": True,
            "schedule_low_priority_values_first": bool(low_first),
        }:
            return low_first
    return None


async def _warm_up(launch: Launch, http: EngineHttp) -> None:
    """Do SGLang's warmup, which would lack the key: generate one token, then freeze the heap."""
    _, model = await http.get_json("/model_info")
    route, request = Route.COMPLETIONS, dict[str, Any](prompt="Hello", max_tokens=1)
    if isinstance(model, dict) and model.get("is_generation") is False:
        route, request = Route.EMBEDDINGS, {"input": "Hello"}
    status, _ = await http.post_json(route.path, {"model": launch.served_name, **request})
    if status != 200:
        raise EngineContractError(f"SGLang does not answer on {route.path} (status {status})")
    await http.post_json("/freeze_gc", {})


async def _context_length(http: EngineHttp) -> int | None:
    _, models = await http.get_json("/v1/models")
    match models:
        case {"data": [{"max_model_len": int(length)}, *_]}:
            return length
    return None
