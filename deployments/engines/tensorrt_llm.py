"""TensorRT-LLM's adapter: options, sign of priority and facts of its OpenAI server.

Based on the source of its main branch of 2026 (``tensorrt_llm/commands/serve.py``,
``serve/openai_server.py``), with what builds of 2025 did otherwise. It was run against the
simulated engine in this dialect, and never against TensorRT-LLM itself, which needs a GPU.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from app.core.dialect import Dialect, Route
from app.core.settings import Problem, SettingsError
from deployments.engines.base import (
    METERED_STREAM,
    EngineAdapter,
    EngineArg,
    EngineContractError,
    EngineFacts,
    EngineHttp,
    Launch,
    prove_guarded,
    reserved_problems,
    stay_on_loopback,
)
from deployments.engines.metrics import Role, engine_metrics
from deployments.engines.needs import EngineNeeds, MemoryRule, TriedVersions, share, whole, word
from deployments.engines.start_phases import TENSORRT_LLM
from deployments.engines.tensorrt_llm_requests import (
    CLIENT_FIELDS,
    PRIORITY_ROUTES,
    PRIORITY_VALUES,
    refused_fields,
)

TRIED: Final = TriedVersions("1.2", "1.5")
"""The versions whose source was read. None of them was run."""
_MEMORY_SHARE: Final = 0.9
"""TensorRT-LLM's own default."""

_INSIDE: Final = Path(__file__).parent / "inside"
_STARTER: Final = _INSIDE / "frontline_trtllm_start.py"
_FACTS_PATH: Final = "/frontline/facts"
_CONFIG: Final[dict[str, Any]] = {
    # Without it the engine answers 200 with text that does not follow the schema.
    "guided_decoding_backend": "xgrammar",
    # Without it a prompt longer than `max_num_tokens` (8192 by default) is refused.
    "enable_chunked_prefill": True,
}
"""What Frontline sets in the configuration file, unless the operator does."""
_POLICY: Final = "priority"
# Options that Frontline sets itself, and `grpc`, which would start a server without HTTP routes.
_RESERVED: Final = frozenset({"model", "host", "port", "served_model_name", "grpc", "middleware"})
# Two more ways to set what `config` sets. The policy in force must be readable from one place.
_IN_CONFIG: Final[Mapping[str, tuple[str, ...]]] = {
    "tp_size": ("tensor_parallel_size",),
    "pp_size": ("pipeline_parallel_size",),
    "ep_size": ("moe_expert_parallel_size",),
    "kv_cache_free_gpu_memory_fraction": ("kv_cache_config", "free_gpu_memory_fraction"),
}
"""Where the configuration file has a setting that is an option under another name."""
_SET_BY_CONFIG: Final = frozenset({"extra_llm_api_options", "set"})

_PROMPTS: Final[Mapping[Route, Mapping[str, Any]]] = {
    Route.CHAT: {"messages": [{"role": "user", "content": "Hi"}], "tool_choice": "none"},
    Route.COMPLETIONS: {"prompt": "Hi"},
}
_STRANGER: Final = "frontline_no_such_field"
# Every build knows these fields. Sent as null, they would hide the list of unknown fields:
# max_completion_tokens is an alias of max_tokens, and logprobs are validated before the rest.
_NOT_ASKED_FOR: Final = frozenset({"max_completion_tokens", "logprobs", "top_logprobs"})

_METRICS: Final = engine_metrics(
    {
        Role.RUNNING: "trtllm_num_requests_running",
        Role.WAITING: "trtllm_num_requests_waiting",
        Role.SUSPENDED: "trtllm_num_paused_requests",
        Role.KV_USE: "trtllm_kv_cache_utilization",
        Role.HIT_RATE: "trtllm_kv_cache_hit_rate",
        Role.QUEUE_TIME: "trtllm_request_queue_time_seconds",
        Role.TTFT: "trtllm_time_to_first_token_seconds",
    }
)


class TensorrtLlm(EngineAdapter):
    """TensorRT-LLM's ``trtllm-serve``."""

    start_phases = TENSORRT_LLM
    name = "tensorrt_llm"
    ready_path = "/health"
    health_path = "/health"
    port_stays_reserved = False
    reserved_environment = EngineAdapter.reserved_environment | {"FRONTLINE_ENGINE_CONFIG"}
    metrics = _METRICS
    # Only there if the operator sets `return_perf_metrics` in the engine's config.
    metrics_path = "/prometheus/metrics"

    def command(self, launch: Launch) -> list[str]:
        _check(launch.engine_args)
        options: dict[str, EngineArg] = {"max_batch_size": launch.slots, **launch.engine_args}
        options.pop("config", None)
        options |= {"host": launch.host, "port": launch.port}
        start = [launch.python, str(_STARTER)]
        if _sets_policy(launch):
            start += ["--policy", _POLICY]
        return [
            *(*start, "--served-name", launch.served_name),
            *("--", launch.model, *_render_options(options)),
        ]

    def environment(self, launch: Launch) -> dict[str, str]:
        return {
            # In the environment and not as a flag: other users can read a command line.
            "FRONTLINE_ENGINE_CONFIG": json.dumps(_config(launch)),
            "FRONTLINE_ENGINE_KEY": launch.key,
            "PYTHONPATH": str(_INSIDE),
            "TRTLLM_NO_USAGE_STATS": "1",
            **stay_on_loopback(launch.span),
        }

    def needs(self, launch: Launch, environment: Mapping[str, str]) -> EngineNeeds:
        config = _config(launch)
        args, cache = config | dict(launch.engine_args), config.get("kv_cache_config")
        given = cache if isinstance(cache, dict) else {}
        fraction = given.get(
            "free_gpu_memory_fraction", args.get("kv_cache_free_gpu_memory_fraction")
        )
        return EngineNeeds(
            module="tensorrt_llm",
            distributions=("tensorrt-llm",),
            tried=TRIED,
            setup="tensorrt-llm",
            memory=MemoryRule(
                share(fraction, _MEMORY_SHARE), "free_gpu_memory_fraction", of_rest=True
            ),
            context=_context_length(launch),
            context_option="max_seq_len",
            tensor_parallel=whole(args.get("tp_size", args.get("tensor_parallel_size")), 1),
            pipeline_parallel=whole(args.get("pp_size", args.get("pipeline_parallel_size")), 1),
            dtype=word(_config(launch).get("dtype")),
            kv_dtype=word(given.get("dtype")),
        )

    def files(self, launch: Launch) -> dict[str, str]:
        """Return the configuration file that ``frontline_trtllm_start`` creates in memory."""
        config = copy.deepcopy(_config(launch))
        if _sets_policy(launch):
            config.setdefault("scheduler_config", {})["waiting_queue_policy"] = _POLICY
        return {"--extra_llm_api_options": json.dumps(config)} if config else {}

    def priority_routes(self, launch: Launch) -> frozenset[Route]:
        """Return the planned routes. Builds without the ``priority`` field have fewer, or none."""
        return PRIORITY_ROUTES if _policy(launch) == _POLICY else frozenset()

    async def inspect(self, launch: Launch, http: EngineHttp) -> EngineFacts:
        """Query the engine for its version, and probe with one-token requests what it accepts.

        A build with ``--middleware`` has the guard, which reports the policy of the waiting queue.
        Another build does not report it: it is taken from the launch, and if it is unknown there,
        priority is not offered.
        """
        status, answer = await http.get_json("/version")
        if status != 200 or not isinstance(answer, dict) or "version" not in answer:
            raise EngineContractError(f"TensorRT-LLM did not tell its version (status {status})")
        facts = await _facts(http)
        if facts is not None:
            await prove_guarded(http, "TensorRT-LLM", ("/v1/models", "/version", "/metrics"))
        policy = _policy(launch) if facts is None else facts["waiting_queue_policy"]
        honoured = {
            route
            for route in (PRIORITY_ROUTES if policy == _POLICY else ())
            if await _takes_priority(http, route, launch.served_name)
        }
        dialect = Dialect(
            engine="tensorrt-llm",
            priority_values=PRIORITY_VALUES,
            priority_routes=frozenset(honoured),
            stream_options=METERED_STREAM,
            accepted_fields={
                route: await _known_fields(http, route, launch.served_name)
                for route in CLIENT_FIELDS
            },
        )
        length = (facts or {}).get("max_seq_len") or _context_length(launch)
        return EngineFacts(str(answer["version"]), length, dialect)


async def _facts(http: EngineHttp) -> dict[str, Any] | None:
    """Return what the guard reports; ``None`` for a build without it."""
    status, facts = await http.get_json(_FACTS_PATH)
    known = status == 200 and isinstance(facts, dict) and "waiting_queue_policy" in facts
    return facts if known else None


def _check(args: Mapping[str, EngineArg]) -> None:
    problems = reserved_problems(args, _RESERVED)
    problems += [
        Problem(("engine_args", name), "give the settings themselves, under 'config'")
        for name in _SET_BY_CONFIG & set(args)
    ]
    if not isinstance(args.get("config", {}), dict):
        words = "expected the contents of a configuration file, not its name"
        problems.append(Problem(("engine_args", "config"), words))
    problems += [
        Problem(("engine_args", name), "nested settings go under 'config'")
        for name, value in args.items()
        if isinstance(value, dict) and name != "config"
    ]
    given = args.get("config")
    config = given if isinstance(given, dict) else {}
    # Builds of 2025 read the file over the options. Since 2026, an option that is given counts.
    twice: set[tuple[str, ...]] = {
        (name,) for name in (args.keys() | {"max_batch_size"}) & set(config)
    }
    twice |= {path for name, path in _IN_CONFIG.items() if name in args and _has(config, path)}
    problems += [
        Problem(("engine_args", "config", *path), "builds differ in which counts: give the option")
        for path in sorted(twice)
    ]
    if problems:
        raise SettingsError(*problems)


def _has(config: Mapping[str, Any], path: tuple[str, ...]) -> bool:
    value: Any = config
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return False
        value = value[name]
    return True


def _config(launch: Launch) -> dict[str, Any]:
    config = launch.engine_args.get("config", {})
    return _CONFIG | config if isinstance(config, dict) else dict(_CONFIG)


def _sets_policy(launch: Launch) -> bool:
    """Return whether Frontline adds its policy, because the operator has set none."""
    scheduler = _config(launch).get("scheduler_config", {})
    return isinstance(scheduler, dict) and "waiting_queue_policy" not in scheduler


def _policy(launch: Launch) -> object:
    """Return the policy of the waiting queue that the engine was started with, if known."""
    if _sets_policy(launch):
        return _POLICY
    scheduler = _config(launch).get("scheduler_config")
    return scheduler.get("waiting_queue_policy") if isinstance(scheduler, dict) else None


def _context_length(launch: Launch) -> int | None:
    """Return the length that the operator has set; the server does not report its own."""
    length = _config(launch).get("max_seq_len", launch.engine_args.get("max_seq_len"))
    return length if isinstance(length, int) else None


def _render_options(options: Mapping[str, EngineArg]) -> list[str]:
    """Return options in trtllm-serve's style: with underscores, and repeated for a list."""
    words: list[str] = []
    for name, value in options.items():
        for single in value if isinstance(value, list) else [value]:
            if single is True:
                words.append(f"--{name}")
            elif single is not None and single is not False:
                words += [f"--{name}", str(single)]
    return words


async def _takes_priority(http: EngineHttp, route: Route, model: str) -> bool:
    """Return whether this build accepts a priority on this route: whether it answers 200."""
    asked = {"model": model, **_PROMPTS[route], "max_tokens": 1}
    status, _ = await http.post_json(
        route.path, {**asked, "priority": max(PRIORITY_VALUES.values())}
    )
    return status == 200


async def _known_fields(http: EngineHttp, route: Route, model: str) -> frozenset[str]:
    """Return the fields that this build knows, among those that clients may use.

    One request contains all of them and a field that no build knows, so every build rejects it. The
    error lists the unknown fields. If it does not list even the extra field, the error is
    inconclusive, and all fields count as known.
    """
    names = CLIENT_FIELDS[route]
    if route not in _PROMPTS:
        return names
    given = {"model": model, **_PROMPTS[route], "max_tokens": 1}
    asked = dict.fromkeys(names - _NOT_ASKED_FOR - {"stream"}) | given | {_STRANGER: None}
    _, answer = await http.post_json(route.path, asked)
    refused = refused_fields(answer)
    return names - refused if _STRANGER in refused else names
