"""SGLang's adapter: flags, sign of priority and facts of its OpenAI server.

Based on the source of SGLang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from app.core.dialect import POOLED_ROUTES, Dialect, Route
from app.core.dialect import PRIORITY_ROUTES as ALL_PRIORITY_ROUTES
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
    prove_lora,
    proved_routes,
    refuse_reserved,
    render_flags,
    stay_on_loopback,
)
from deployments.engines.lora import LoraAdapter, why_refused
from deployments.engines.metrics import Role, engine_metrics
from deployments.engines.needs import EngineNeeds, MemoryRule, TriedVersions, share, whole, word
from deployments.engines.start_phases import SGLANG
from deployments.engines.traces import ENDPOINT, sends_spans, trace_variables

TRIED: Final = TriedVersions("0.5.23", "0.6")
_MEMORY_SHARE: Final = 0.85
"""SGLang computes its own from the GPU, the batch and the graphs; this is on the safe side."""

PRIORITY_ROUTES: Final = ALL_PRIORITY_ROUTES - POOLED_ROUTES - {Route.RESPONSES}
"""SGLang's Responses route accepts a priority and ignores it."""

ADAPTER_FIELD: Final = "lora_path"
"""The field that names an adapter. ``model`` is only echoed on the routes that have it."""
ADAPTER_ROUTES: Final = frozenset({Route.CHAT, Route.COMPLETIONS, Route.EMBEDDINGS})

_PRIORITY_HEADER: Final = "x-override-priority"
"""The header from which messages take their priority: their requests have no field for it."""

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
        "lora_paths",
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

LOAD_LORA: Final = "/load_lora_adapter"
UNLOAD_LORA: Final = "/unload_lora_adapter"
_LORAS_AT_ONCE: Final = 8
"""Most adapters whose requests run in one batch, unless ``max_loras_per_batch`` says otherwise:
each takes memory of the GPU."""

_METRICS: Final = engine_metrics(
    {
        Role.RUNNING: "sglang:num_running_reqs",
        Role.WAITING: "sglang:num_queue_reqs",
        Role.KV_USE: "sglang:token_usage",
        Role.PREEMPTIONS: "sglang:num_retracted_requests_total",
        Role.PROMPT_TOKENS: "sglang:prompt_tokens_total",
        Role.CACHED_TOKENS: "sglang:cached_tokens_total",
        Role.QUEUE_TIME: "sglang:queue_time_seconds",
        Role.TTFT: "sglang:time_to_first_token_seconds",
    }
)


class Sglang(EngineAdapter):
    """SGLang's ``sglang.launch_server``."""

    start_phases = SGLANG
    name = "sglang"
    ready_path = "/ready"
    # SGLang's own /health takes a second and generates a token. This route queries the scheduler.
    health_path = "/server_info"
    metrics = _METRICS
    spans_nodes = True
    loads_lora = True
    swaps_lora = True
    reserved_environment = EngineAdapter.reserved_environment | {"SGLANG_HTTP_SERVER_APP_PATH"}

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
            **_lora_args(launch),
            **_trace_args(launch),
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
            # Whoever has the key may set a priority anyway; clients' headers never arrive here.
            "SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES": "1",
            **stay_on_loopback(launch.span),
            **_trace_variables(launch, self.name),
        }

    def needs(self, launch: Launch, environment: Mapping[str, str]) -> EngineNeeds:
        args = launch.engine_args
        memory = share(args.get("mem_fraction_static"), _MEMORY_SHARE)
        return EngineNeeds(
            module="sglang",
            distributions=("sglang",),
            tried=TRIED,
            setup="sglang",
            # The rest of the GPU is for what it needs besides.
            memory=MemoryRule(memory, "mem_fraction_static", runtime_inside=False),
            glibc=(2, 34),
            context=whole(args.get("context_length"), 0) or None,
            context_option="context_length",
            tensor_parallel=whole(args.get("tp_size", args.get("tensor_parallel_size")), 1),
            pipeline_parallel=whole(args.get("pp_size", args.get("pipeline_parallel_size")), 1),
            dtype=word(args.get("dtype")),
            kv_dtype=word(args.get("kv_cache_dtype")),
        )

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
        generates = await _generates(http)
        routes, pooled = await proved_routes(http, launch.served_name, generates=generates)
        by_header = Route.MESSAGES in routes and await _takes_header(http, launch.served_name)
        by_priority = PRIORITY_ROUTES | pooled
        if not by_header:
            by_priority -= {Route.MESSAGES}
        dialect = Dialect(
            engine=self.name,
            priority_values={tier: sign * value for tier, value in LOW_FIRST.items()},
            priority_routes=frozenset() if low_first is None else by_priority,
            stream_options=METERED_STREAM,
            preempts=low_first is not None and _preempt(schedulers),
            generates=generates,
            routes=routes,
            priority_headers={Route.MESSAGES: _PRIORITY_HEADER} if by_header else {},
            adapters=await prove_lora(http, "SGLang", launch),
            adapter_routes=ADAPTER_ROUTES,
            adapter_field=ADAPTER_FIELD,
        )
        await _warm_up(launch, http, Route.COMPLETIONS if generates else Route.EMBEDDINGS)
        return EngineFacts(
            version=str(info.get("version")),
            context_length=await _context_length(http),
            dialect=dialect,
            kv_tokens=whole(info.get("max_total_num_tokens"), 0) or None,
            most_running=_most_running(schedulers),
        )

    async def limit(self, launch: Launch, http: EngineHttp, slots: int) -> bool:
        """Lower the size of SGLang's running batch, which is what its preemption looks at.

        Without this, a priority request that finds slots and no memory would wait for a running
        request to end: SGLang preempts for a slot, and not for memory.
        """
        parts = self.needs(launch, {}).pipeline_parallel
        change = {"server_args": {"pp_max_micro_batch_size": max(1, slots // parts)}}
        status, done = await http.post_json("/set_internal_state", change)
        return status == 200 and isinstance(done, list) and bool(done) and all(done)

    async def load_lora(self, launch: Launch, http: EngineHttp, lora: LoraAdapter) -> str:
        """Use SGLang's own route, which reads the adapter's weights before it answers."""
        asked = {"lora_name": lora.name, "lora_path": lora.path}
        return why_refused(*await http.post_json(LOAD_LORA, asked))

    async def unload_lora(self, launch: Launch, http: EngineHttp, name: str) -> str:
        """Use SGLang's own route, which answers once no request uses the adapter."""
        return why_refused(*await http.post_json(UNLOAD_LORA, {"lora_name": name}))


def _prioritized(launch: Launch) -> bool:
    return bool(launch.engine_args.get("enable_priority_scheduling", True))


def _priority_flags(launch: Launch) -> dict[str, Any]:
    return {**_PRIORITY_FLAGS, **_PREEMPTION_FLAGS[launch.preemption]}


def _lora_args(launch: Launch) -> dict[str, Any]:
    """Return the arguments with which SGLang loads the adapters at its start, and later ones."""
    room = launch.lora_room
    count = len(launch.loras) + room.count
    if not count:
        return {}
    paths = [f"{one.name}={one.path}" for one in launch.loras]
    # Otherwise SGLang takes both from the adapters that it starts with, and refuses later ones of a
    # higher rank or with other modules.
    later = {"max_lora_rank": room.highest_rank(launch.loras), "lora_target_modules": ["all"]}
    return {
        "enable_lora": True,
        # Requests without an adapter count as one more.
        "max_loras_per_batch": min(count, _LORAS_AT_ONCE) + 1,
        **({"lora_paths": paths} if paths else {}),
        **(later if room.count else {}),
    }


def _trace_args(launch: Launch) -> dict[str, Any]:
    return {"enable_trace": True, ENDPOINT: launch.traces} if sends_spans(launch) else {}


def _trace_variables(launch: Launch, service: str) -> dict[str, str]:
    variables = trace_variables(launch, service)
    # With its default of 3, a request has a span for each of its tokens.
    return {**variables, "SGLANG_TRACE_LEVEL": "2"} if variables else {}


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


def _most_running(schedulers: object) -> int | None:
    """Return how many requests all schedulers run at once; ``None`` if one does not say it."""
    known = [
        whole(state.get("effective_max_running_requests_per_dp"), 0)
        for state in (schedulers if isinstance(schedulers, list) else ())
        if isinstance(state, dict)
    ]
    return min(known) if known and all(known) else None


def _order(scheduler: object) -> bool | None:
    match scheduler:
        case {
            "enable_priority_scheduling": True,
            "schedule_low_priority_values_first": bool(low_first),
        }:
            return low_first
    return None


async def _takes_header(http: EngineHttp, model: str) -> bool:
    """Return whether messages take their priority from the header.

    An engine that reads it refuses a value that is no number. One that does not generates a token.
    """
    asked = {
        "model": model,
        "max_tokens": 1,
        Route.MESSAGES.prompt_field: [{"role": "user", "content": "Hi"}],
    }
    status, answer = await http.post_json(
        Route.MESSAGES.path, asked, headers={_PRIORITY_HEADER: "none"}
    )
    match answer:
        case {"error": {"message": str(message)}}:
            return status == 400 and _PRIORITY_HEADER in message
    return False


async def _generates(http: EngineHttp) -> bool:
    """Return whether the model generates text; if not, it only embeds."""
    _, model = await http.get_json("/model_info")
    return not (isinstance(model, dict) and model.get("is_generation") is False)


async def _warm_up(launch: Launch, http: EngineHttp, route: Route) -> None:
    """Do SGLang's warmup, which would lack the key: generate one token, then freeze the heap."""
    embeds = route is Route.EMBEDDINGS
    request = {"input": "Hello"} if embeds else {"prompt": "Hello", "max_tokens": 1}
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
