"""The adapter of the simulated engine, a child process like the real engines."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

import orjson

from app.contracts.status import Preempted
from app.core.dialect import (
    AUDIO_ROUTES,
    MESSAGES_ROUTES,
    OPENAI_ROUTES,
    POOLED_ROUTES,
    TOKEN_ROUTES,
    Dialect,
    Route,
)
from app.core.dialect import (
    PRIORITY_ROUTES as ALL_PRIORITY_ROUTES,
)
from app.core.tiers import Tier
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
    prove_lora,
)
from deployments.engines.lora import LoraAdapter
from deployments.engines.metrics import EngineMetric
from deployments.engines.sglang import ADAPTER_FIELD, ADAPTER_ROUTES, Sglang
from deployments.engines.tensorrt_llm import TensorrtLlm
from deployments.engines.tensorrt_llm_requests import (
    CLIENT_FIELDS,
    PRIORITY_ROUTES,
    PRIORITY_VALUES,
)
from deployments.engines.vllm import Vllm
from deployments.simulator import KEY_VARIABLE
from deployments.simulator.ranking import RANKING_ROUTES
from deployments.simulator.settings import DialectName, Policy, SimulatedSettings

_SERVER: Final = "deployments.simulator"
_ROOT: Final = Path(__file__).resolve().parents[2]
_INSIDE: Final = Path(__file__).resolve().parent / "inside"

_HIGH_FIRST: Final = {tier: -value for tier, value in LOW_FIRST.items()}

_PRIORITY_ROUTES: Final = {
    DialectName.VLLM: ALL_PRIORITY_ROUTES,
    DialectName.SGLANG: ALL_PRIORITY_ROUTES - POOLED_ROUTES - {Route.RESPONSES},
    DialectName.TENSORRT_LLM: PRIORITY_ROUTES,
}

_IMITATED: Final[dict[DialectName, type[EngineAdapter]]] = {
    DialectName.VLLM: Vllm,
    DialectName.SGLANG: Sglang,
    DialectName.TENSORRT_LLM: TensorrtLlm,
}


_PRIORITY_HEADERS: Final = {
    DialectName.VLLM: {Route.MESSAGES: "x-vllm-priority"},
    DialectName.SGLANG: {Route.MESSAGES: "x-override-priority"},
}


class Simulated(EngineAdapter):
    """The simulated engine; its ``engine_args`` are ``SimulatedSettings``."""

    name: ClassVar[str] = "simulated"
    ready_path: ClassVar[str] = "/ready"
    health_path: ClassVar[str] = "/health"
    spans_nodes: ClassVar[bool] = True
    loads_lora: ClassVar[bool] = True
    swaps_lora: ClassVar[bool] = True
    reserved_environment: ClassVar[frozenset[str]] = frozenset({KEY_VARIABLE})

    def command(self, launch: Launch) -> list[str]:
        """Return the command line.

        Raises:
            SettingsError: ``engine_args`` has an unknown key or a bad value.
        """
        settings = _settings(launch).model_dump(mode="json", exclude_unset=True)
        # -P: Python finds the module through PYTHONPATH (``environment``), not in the working
        # directory.
        return [
            *(launch.python, "-P", "-m", _SERVER),
            *("--host", launch.host, "--port", str(launch.port)),
            *("--model", launch.model, "--served-name", launch.served_name),
            *("--settings", orjson.dumps(settings).decode()),
            *_span_args(launch.span),
        ]

    def environment(self, launch: Launch) -> dict[str, str]:
        """Return the key, and the paths of the server's modules."""
        path = os.pathsep.join([str(_ROOT), str(_INSIDE)])
        return {KEY_VARIABLE: launch.key, "PYTHONPATH": path}

    def relayed(self, launch: Launch) -> tuple[str, tuple[EngineMetric, ...]]:
        """Return the metrics of the engine whose dialect is simulated."""
        adapter = _imitated(launch)
        return adapter.metrics_path, adapter.metrics

    def priority_routes(self, launch: Launch) -> frozenset[Route]:
        """Return the routes of the engine whose dialect is simulated."""
        settings = _settings(launch)
        in_force = settings.policy is Policy.PRIORITY and "priority" not in settings.lacking_fields
        return _PRIORITY_ROUTES[settings.dialect] if in_force else frozenset()

    async def inspect(self, launch: Launch, http: EngineHttp) -> EngineFacts:
        """Query the running engine for its dialect and for the policy in force."""
        status, report = await http.get_json("/simulate")
        if status != 200 or not isinstance(report, dict) or not report.get("simulated"):
            raise EngineContractError(f"not a simulated engine: /simulate answered {status}")
        status, _ = await http.get_json("/v1/models", authorized=False)
        if status != 401:
            raise EngineContractError(f"the key does not guard: /v1/models answered {status}")
        adapters = await prove_lora(http, "the simulated engine", launch)
        return EngineFacts(
            report["version"],
            report["context_length"],
            replace(_dialect(report), adapters=adapters),
            kv_tokens=report["settings"]["kv_tokens"],
            most_running=report["slots"],
        )

    async def limit(self, launch: Launch, http: EngineHttp, slots: int) -> bool:
        """Lower the number of slots of the running engine."""
        status, report = await http.post_json("/simulate", {"slots": slots})
        return status == 200 and isinstance(report, dict) and report.get("slots") == slots

    async def load_lora(self, launch: Launch, http: EngineHttp, lora: LoraAdapter) -> str:
        """Do as the adapter of the engine that is simulated."""
        return await _imitated(launch).load_lora(launch, http, lora)

    async def unload_lora(self, launch: Launch, http: EngineHttp, name: str) -> str:
        """Do as the adapter of the engine that is simulated."""
        return await _imitated(launch).unload_lora(launch, http, name)

    async def preemption(self, http: EngineHttp) -> PreemptionReport | None:
        """Query the running engine for what it has suspended."""
        status, report = await http.get_json("/simulate")
        if status != 200 or not isinstance(report, dict) or "preempts" not in report:
            return None
        counts = Preempted(report["preempted"], report["suspended"], report["suspended_s"])
        preempts = report["preempts"] is True
        return PreemptionReport(preempts, "" if preempts else "it was turned off", counts)


def _imitated(launch: Launch) -> EngineAdapter:
    return _IMITATED[_settings(launch).dialect]()


def _span_args(span: NodeSpan) -> list[str]:
    if span.nodes == 1:
        return []
    return ["--nodes", str(span.nodes), "--rank", str(span.rank), "--meet", span.meeting_place]


def _settings(launch: Launch) -> SimulatedSettings:
    given: dict[str, Any] = {"slots": launch.slots}
    if not launch.preemption:
        given["preemption"] = False
    if launch.loras:
        given["adapters"] = [one.name for one in launch.loras]
    if launch.lora_room.count:
        given["adapter_room"] = launch.lora_room.count
    given |= launch.engine_args
    return SimulatedSettings.load(given, "engine_args")


def _dialect(report: dict[str, Any]) -> Dialect:
    name = DialectName(report["dialect"])
    strict = name is DialectName.TENSORRT_LLM
    values: dict[Tier, int | float] = dict(PRIORITY_VALUES) if strict else dict(LOW_FIRST)
    if not strict and not report["lower_goes_first"]:
        values = dict(_HIGH_FIRST)
    lacking = frozenset(report["settings"]["lacking_fields"])
    in_force = report["policy"] == Policy.PRIORITY and "priority" not in lacking
    fields = {route: names - lacking for route, names in CLIENT_FIELDS.items()}
    routes = _routes(name, embeds=bool(report["settings"]["embedding_dimensions"]))
    if report["settings"]["transcribes"]:
        routes |= AUDIO_ROUTES
    return Dialect(
        engine=f"simulated-{name.replace('_', '-')}",
        simulated=True,
        priority_values=values,
        priority_routes=_PRIORITY_ROUTES[name] if in_force else frozenset(),
        preempts=in_force and report["preempts"] is True,
        stream_options=METERED_STREAM,
        accepted_fields=fields if strict else {},
        routes=routes,
        priority_headers=_PRIORITY_HEADERS.get(name, {}),
        adapter_routes=ADAPTER_ROUTES if name is DialectName.SGLANG else routes,
        adapter_field=ADAPTER_FIELD if name is DialectName.SGLANG else "",
    )


def _routes(name: DialectName, *, embeds: bool) -> frozenset[Route]:
    if name is DialectName.TENSORRT_LLM:
        return OPENAI_ROUTES
    more = RANKING_ROUTES if embeds and name is DialectName.VLLM else frozenset()
    return OPENAI_ROUTES | MESSAGES_ROUTES | TOKEN_ROUTES | more
