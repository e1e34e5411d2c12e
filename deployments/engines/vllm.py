"""vLLM's adapter: flags, sign of priority and facts of its OpenAI server.

Based on the source of vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from app.contracts.status import Preempted
from app.core.dialect import (
    AUDIO_ROUTES,
    GENERATING_ROUTES,
    OPENAI_ROUTES,
    PRIORITY_ROUTES,
    Dialect,
    Route,
)
from deployments.engines.base import (
    LOW_FIRST,
    METERED_STREAM,
    EngineAdapter,
    EngineContractError,
    EngineFacts,
    EngineHttp,
    Launch,
    NodeSpan,
    PreemptionReport,
    prove_guarded,
    prove_lora,
    proved_routes,
    refuse_reserved,
    render_flags,
    serves_transcriptions,
    stay_on_loopback,
)
from deployments.engines.lora import LoraAdapter, why_refused
from deployments.engines.metrics import Role, engine_metrics
from deployments.engines.needs import EngineNeeds, MemoryRule, TriedVersions, share, whole, word
from deployments.engines.start_phases import VLLM
from deployments.engines.traces import ENDPOINT, sends_spans, trace_variables

TRIED: Final = TriedVersions("0.32", "0.34")
_MEMORY_SHARE: Final = 0.92
"""vLLM's own default."""

_GUARD: Final = "frontline_vllm_guard"
STARTER: Final = "frontline_vllm_start"
_HEADLESS: Final = "frontline_vllm_headless"
_SCHEDULER: Final = "frontline_vllm_scheduler.make_scheduler"
_INSIDE: Final = Path(__file__).parent / "inside"
_POLICY: Final = "priority"
_EMBEDS: Final = "pooling"
_FACTS_PATH: Final = "/frontline/facts"
LOAD_LORA: Final = "/v1/load_lora_adapter"
UNLOAD_LORA: Final = "/v1/unload_lora_adapter"
RUNTIME_LORA: Final = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
_LIMIT_PATH: Final = "/frontline/limit"
# Each of these would open a way around the ingress, or break what the ingress relies on.
_RESERVED: Final = frozenset(
    {
        "api_key",
        "headless",
        "host",
        "lora_modules",
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

_LORA_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM reserves memory for; an adapter needs the next that is not lower."""
_LORAS_AT_ONCE: Final = 8
"""Most adapters whose requests run in one batch, unless ``max_loras`` says otherwise: each takes
memory of the GPU, and with vLLM's default of one, requests of two adapters run by turns."""

_METRICS: Final = engine_metrics(
    {
        Role.RUNNING: "vllm:num_requests_running",
        Role.WAITING: "vllm:num_requests_waiting",
        Role.KV_USE: "vllm:kv_cache_usage_perc",
        Role.PREEMPTIONS: "vllm:num_preemptions_total",
        Role.PROMPT_TOKENS: "vllm:prefix_cache_queries_total",
        Role.CACHED_TOKENS: "vllm:prefix_cache_hits_total",
        Role.QUEUE_TIME: "vllm:request_queue_time_seconds",
        Role.TTFT: "vllm:time_to_first_token_seconds",
    }
)


class Vllm(EngineAdapter):
    """vLLM's OpenAI server, as ``frontline_vllm_start`` starts it."""

    start_phases = VLLM
    name = "vllm"
    ready_path = "/health"
    health_path = "/health"
    metrics = _METRICS
    spans_nodes = True
    loads_lora = True
    swaps_lora = True
    reserved_environment = EngineAdapter.reserved_environment | {
        RUNTIME_LORA,
        "VLLM_API_KEY",
        "VLLM_USE_RUST_FRONTEND",
    }

    def command(self, launch: Launch) -> list[str]:
        refuse_reserved(launch.engine_args, _RESERVED)
        args: dict[str, Any] = {
            "max_num_seqs": launch.slots,
            "scheduling_policy": _POLICY,
            **({"scheduler_cls": _SCHEDULER} if self._is_to_preempt(launch) else {}),
            "enable_prompt_tokens_details": True,
            "disable_uvicorn_access_log": True,
            **_lora_args(launch),
            **({ENDPOINT: launch.traces} if sends_spans(launch) else {}),
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
        # another name. And not one of vLLM's modules: which it has, its own interpreter sees.
        command = [launch.python, "-m", STARTER, *render_flags(args)]
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
            # vLLM's frontend in Rust loads no middleware, so it would ask for no key.
            "VLLM_USE_RUST_FRONTEND": "0",
            # It adds the routes that load and unload adapters. Like all, they require the key.
            **({RUNTIME_LORA: "True"} if launch.lora_room.count else {}),
            **stay_on_loopback(launch.span),
            **trace_variables(launch, self.name),
            # Otherwise the parts look for each other at the address of this machine's host name.
            **({"VLLM_HOST_IP": launch.span.here} if launch.span.nodes > 1 else {}),
        }

    def needs(self, launch: Launch, environment: Mapping[str, str]) -> EngineNeeds:
        args = launch.engine_args
        cache = environment.get("VLLM_CPU_KVCACHE_SPACE", "")
        memory = share(args.get("gpu_memory_utilization"), _MEMORY_SHARE)
        return EngineNeeds(
            module="vllm",
            distributions=("vllm", "vllm-cpu"),
            tried=TRIED,
            setup="vllm",
            memory=MemoryRule(memory, "gpu_memory_utilization"),
            context=whole(args.get("max_model_len"), 0) or None,
            context_option="max_model_len",
            tensor_parallel=whole(args.get("tensor_parallel_size"), 1),
            pipeline_parallel=whole(args.get("pipeline_parallel_size"), 1),
            dtype=word(args.get("dtype")),
            kv_dtype=word(args.get("kv_cache_dtype")),
            cpu_cache_bytes=int(cache) << 30 if cache.isdecimal() else None,
        )

    def priority_routes(self, launch: Launch) -> frozenset[Route]:
        prioritized = launch.engine_args.get("scheduling_policy", _POLICY) == _POLICY
        return PRIORITY_ROUTES if prioritized else frozenset()

    def _is_to_preempt(self, launch: Launch) -> bool:
        return launch.preemption and bool(self.priority_routes(launch))

    async def inspect(self, launch: Launch, http: EngineHttp) -> EngineFacts:
        # vLLM's own ``--api-key`` leaves ``/invocations``, which answers chats, and others open.
        await prove_guarded(http, "vLLM", ("/v1/models", "/invocations", "/metrics"))
        status, facts = await http.get_json(_FACTS_PATH)
        if status != 200 or not isinstance(facts, dict):
            raise EngineContractError(f"vLLM did not tell its facts (status {status})")
        prioritized = facts.get("scheduling_policy") == _POLICY
        generates = facts.get("runner") != _EMBEDS
        routes, pooled = await proved_routes(http, launch.served_name, generates=generates)
        if generates and await serves_transcriptions(http, launch.served_name):
            routes |= AUDIO_ROUTES
            if not await _completes(http, launch.served_name):
                routes, generates = routes - GENERATING_ROUTES, False
        header = facts.get("messages_priority_header") if Route.MESSAGES in routes else None
        by_priority = OPENAI_ROUTES | pooled
        if isinstance(header, str):
            by_priority |= {Route.MESSAGES}
        dialect = Dialect(
            engine=self.name,
            priority_values=LOW_FIRST,
            priority_routes=by_priority if prioritized else frozenset(),
            stream_options=METERED_STREAM,
            preempts=prioritized and _preempts(facts.get("preemption")),
            generates=generates,
            routes=routes,
            priority_headers={Route.MESSAGES: header.lower()} if isinstance(header, str) else {},
            adapters=await prove_lora(http, "vLLM", launch),
            adapter_routes=routes,
        )
        return EngineFacts(
            version=str(facts.get("version")),
            context_length=facts.get("max_model_len"),
            dialect=dialect,
            kv_tokens=whole(facts.get("kv_tokens"), 0) or None,
            most_running=whole(facts.get("max_num_seqs"), 0) or None,
        )

    async def limit(self, launch: Launch, http: EngineHttp, slots: int) -> bool:
        """Lower the number of requests that Frontline's schedulers run at once."""
        status, answer = await http.post_json(_LIMIT_PATH, {"slots": slots})
        return status == 200 and isinstance(answer, dict) and answer.get("limited") is True

    async def load_lora(self, launch: Launch, http: EngineHttp, lora: LoraAdapter) -> str:
        """Use vLLM's own route, which reads the adapter's weights before it answers."""
        asked = {"lora_name": lora.name, "lora_path": lora.path}
        return why_refused(*await http.post_json(LOAD_LORA, asked))

    async def unload_lora(self, launch: Launch, http: EngineHttp, name: str) -> str:
        """Use vLLM's own route. Requests that run keep the adapter's weights until they end."""
        return why_refused(*await http.post_json(UNLOAD_LORA, {"lora_name": name}))

    async def preemption(self, http: EngineHttp) -> PreemptionReport | None:
        status, facts = await http.get_json(_FACTS_PATH)
        schedulers = facts.get("preemption") if status == 200 and isinstance(facts, dict) else None
        # Null: a scheduler did not answer, which says nothing about whether it preempts.
        return _report(schedulers) if isinstance(schedulers, list) and schedulers else None


async def _completes(http: EngineHttp, served_name: str) -> bool:
    """Return whether a model that transcribes generates text, too: one like Whisper does not."""
    asked = {"model": served_name, Route.COMPLETIONS.prompt_field: "Hi", "max_tokens": 1}
    status, _ = await http.post_json(Route.COMPLETIONS.path, asked)
    return status == 200


def _preempts(schedulers: object) -> bool:
    """Return whether every scheduler of the engine has reported that it preempts."""
    if not isinstance(schedulers, list) or not schedulers:
        return False
    return all(isinstance(one, dict) and one.get("preempts") is True for one in schedulers)


def _report(schedulers: list[Any]) -> PreemptionReport:
    """Return the reports of all schedulers of an engine as one."""
    reports = [one for one in schedulers if isinstance(one, dict)]
    reasons = sorted({str(one["why_not"]) for one in reports if one.get("why_not")})
    counts = Preempted(
        sum(one.get("preemptions", 0) for one in reports),
        sum(one.get("suspended", 0) for one in reports),
        sum(one.get("suspended_s", 0.0) for one in reports),
    )
    return PreemptionReport(_preempts(schedulers), "; ".join(reasons), counts)


def _lora_args(launch: Launch) -> dict[str, Any]:
    """Return the arguments with which vLLM loads the adapters at its start, and later ones."""
    room = launch.lora_room
    count, rank = len(launch.loras) + room.count, room.highest_rank(launch.loras)
    if not count:
        return {}
    modules = [f"{one.name}={one.path}" for one in launch.loras]
    ranks = [one for one in _LORA_RANKS if rank is not None and one >= rank]
    return {
        "enable_lora": True,
        "max_loras": min(count, _LORAS_AT_ONCE),
        # Otherwise those beyond `max_loras` are read from disk whenever they are used.
        "max_cpu_loras": count,
        **({"max_lora_rank": ranks[0]} if ranks else {}),
        **({"lora_modules": modules} if modules else {}),
    }


def _span_args(span: NodeSpan) -> dict[str, Any]:
    if span.nodes == 1:
        return {}
    return {
        "nnodes": span.nodes,
        "node_rank": span.rank,
        "master_addr": span.address,
        "master_port": span.port,
    }
