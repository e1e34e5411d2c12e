"""The contract of an engine adapter, the only code that knows an engine's flags and quirks.

To add an engine, add one module with a subclass of ``EngineAdapter`` and one line in
``deployments.engines.registry``.
"""

from __future__ import annotations

import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Final, Protocol

from app.contracts.status import Preempted
from app.core.dialect import (
    GENERATING_ROUTES,
    MESSAGES_ROUTES,
    OPENAI_ROUTES,
    TOKEN_ROUTES,
    Dialect,
    Route,
)
from app.core.settings import Problem, SettingsError
from app.core.tiers import Tier
from app.protocol.form import File, Form
from app.protocol.json_body.spliced import Spliced
from app.protocol.recording import FORMAT, engine_form
from deployments.engines.lora import NO_ROOM, LoraAdapter, LoraRoom, listed_loras
from deployments.engines.metrics import EngineMetric
from deployments.engines.needs import EngineNeeds
from deployments.engines.start_phases import COMMON, Phases, phase_of

EngineArg = str | int | float | bool | None | list[str] | dict[str, Any]
"""A value of ``engine_args`` in a model's configuration."""


LOW_FIRST: Final = {Tier.PRIORITY: -100, Tier.DEFAULT: 0, Tier.FLEX: 100}
"""Priorities on engines that serve lower numbers first. vLLM always does, SGLang can be configured
to."""

PREEMPTION_MARGIN: Final = 50
"""A running request gives way only to one whose number is better by more than this. Tiers are 100
apart, and requests of one tier have one number."""

METERED_STREAM: Final = {"include_usage": True, "continuous_usage_stats": True}
"""The stream options that make an engine report usage on every chunk. vLLM applies the second only
together with the first."""


@dataclass(frozen=True, slots=True)
class NodeSpan:
    """The nodes that one engine runs on, and this node's position among them.

    Attributes:
        nodes: how many there are; the engine's ranks are spread over them evenly.
        rank: the number of this node, from 0. Node 0 runs the engine's HTTP server.
        here: this node's address.
        address: the address of node 0, where all parts of the engine rendezvous.
        port: the port on node 0 that is reserved for the rendezvous.
    """

    nodes: int = 1
    rank: int = 0
    here: str = ""
    address: str = ""
    port: int = 0

    @property
    def meeting_place(self) -> str:
        """The rendezvous address of all parts, as ``HOST:PORT``."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything that an adapter needs to start one engine server.

    Attributes:
        model: the folder or name of the model that the engine loads.
        served_name: the model's id, which requests use as the model name.
        host: the address to bind to; always loopback.
        port: a port reserved for this engine.
        slots: how many requests the engine runs at most at once.
        key: the secret that every request to the engine carries as a bearer token.
        python: the interpreter of the engine's environment.
        engine_args: the operator's own engine arguments, by name, with underscores. They override
            an adapter's defaults, except for the address, the key and the served name.
        span: the nodes that the engine runs on; just this one by default.
        preemption: whether the engine is to suspend running requests for waiting ones of a better
            tier, if it can.
        loras: the LoRA adapters that the engine loads.
        traces: the URL that the engine sends its spans to, by OTLP over HTTP; empty for none.
        lora_room: what it reserves for LoRA adapters that it loads while it runs.
    """

    model: str
    served_name: str
    host: str
    port: int
    slots: int
    key: str
    python: str
    engine_args: Mapping[str, EngineArg] = field(default_factory=dict)
    span: NodeSpan = NodeSpan()
    preemption: bool = True
    loras: tuple[LoraAdapter, ...] = ()
    traces: str = ""
    lora_room: LoraRoom = NO_ROOM

    @property
    def base_url(self) -> str:
        """The URL of the engine's server on its own machine."""
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a running engine reported about itself.

    Attributes:
        version: the engine's version.
        context_length: longest prompt and answer together, in tokens; ``None`` if unknown.
        dialect: the engine's request format, with native priority only if it is really in force.
        kv_tokens: how many tokens its KV cache holds; ``None`` if it does not report it.
        most_running: how many requests it runs at most at once; ``None`` if it does not report it.
    """

    version: str
    context_length: int | None
    dialect: Dialect
    kv_tokens: int | None = None
    most_running: int | None = None


@dataclass(frozen=True, slots=True)
class PreemptionReport:
    """What a running engine reports about its preemption.

    Attributes:
        preempts: whether it suspends running requests for better ones.
        why_not: why it does not, in words; empty otherwise.
        counts: what it has suspended so far.
    """

    preempts: bool
    why_not: str
    counts: Preempted


POOLED_PROMPTS: Final[Mapping[Route, Mapping[str, Any]]] = {
    Route.RERANK: {"query": "Hi", "documents": ["Hi"]},
    Route.SCORE: {"text_1": "Hi", "text_2": "Hi"},
    Route.CLASSIFY: {"input": "Hi"},
    Route.POOLING: {"input": "Hi"},
}
"""The shortest request of each of these routes."""

NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})


class EngineHttp(Protocol):
    """HTTP requests to a running engine, with its key unless ``authorized`` is false."""

    async def get_json(self, path: str, *, authorized: bool = True) -> tuple[int, Any]:
        """Return the status and the parsed body (``None`` if it is not JSON) of a GET."""
        ...

    async def post_json(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        authorized: bool = True,
        headers: Mapping[str, str] = NO_HEADERS,
    ) -> tuple[int, Any]:
        """Return the status and the parsed body (``None`` if it is not JSON) of a POST.

        ``headers`` are sent in addition to those that every request has.
        """
        ...

    async def post_form(self, path: str, form: Spliced) -> tuple[int, Any]:
        """Return the same of a POST of a form."""
        ...


class EngineAdapter(ABC):
    """How to start one kind of engine and send it requests. Holds no state."""

    name: ClassVar[str]
    """The engine's name in configuration files."""
    ready_path: ClassVar[str]
    """Answers 200 once the engine serves requests; cheap enough for several polls a second."""
    health_path: ClassVar[str]
    """Answers 200 while the engine is alive; cheap enough to poll every second."""
    port_stays_reserved: ClassVar[bool] = True
    """Whether the engine's port can stay reserved while the engine starts. This requires a server
    that binds with SO_REUSEADDR. Otherwise any process could take the port for a moment."""

    metrics: ClassVar[tuple[EngineMetric, ...]] = ()
    """The engine's own metrics that its replicas relay."""
    metrics_path: ClassVar[str] = "/metrics"
    """Answers with the engine's metrics in Prometheus' format."""

    spans_nodes: ClassVar[bool] = False
    """Whether the engine can run on several nodes together. This requires a ``command`` and an
    ``environment`` that use ``launch.span``."""

    loads_lora: ClassVar[bool] = False
    """Whether the engine can serve LoRA adapters. This requires a ``command`` that uses
    ``launch.loras``, and a dialect that names those that are loaded."""

    swaps_lora: ClassVar[bool] = False
    """Whether the engine can load and unload LoRA adapters while it runs. This requires a
    ``command`` that uses ``launch.lora_room``, and ``load_lora`` and ``unload_lora``."""

    reserved_environment: ClassVar[frozenset[str]] = frozenset({"FRONTLINE_ENGINE_KEY"})
    """Variables that a pool may not set: without Frontline's values the engine would run without
    key or proof."""

    start_phases: ClassVar[Phases] = COMMON
    """The phases of a start that its log shows."""

    @abstractmethod
    def command(self, launch: Launch) -> list[str]:
        """Return the command line that starts the engine's OpenAI server.

        On a node other than the engine's first, it starts that node's part of the engine.
        """

    def environment(self, launch: Launch) -> dict[str, str]:
        """Return environment variables to set for the engine, in addition to inherited ones.

        ``PYTHONPATH`` is put before the inherited one, or the pool's.
        """
        return {}

    def needs(self, launch: Launch, environment: Mapping[str, str]) -> EngineNeeds | None:
        """Return what this launch needs of its machine; ``None`` if that is nothing.

        ``environment`` is the engine's whole environment.
        """
        return None

    def start_phase(self, tail: str) -> str | None:
        """Return what a starting engine is doing, from the end of its log; ``None`` if unknown."""
        return phase_of(tail, self.start_phases)

    def files(self, launch: Launch) -> dict[str, str]:
        """Return the text of each file generated for the engine, by the option that names it."""
        return {}

    def relayed(self, launch: Launch) -> tuple[str, tuple[EngineMetric, ...]]:
        """Return where the engine shows its metrics, and which of them its replicas relay."""
        return self.metrics_path, self.metrics

    @abstractmethod
    def priority_routes(self, launch: Launch) -> frozenset[Route]:
        """Return the routes on which an engine with this launch should have native priority.

        This is only the plan. Requests rely on what ``inspect`` finds in the running engine.
        """

    @abstractmethod
    async def inspect(self, launch: Launch, http: EngineHttp) -> EngineFacts:
        """Query a ready engine for its facts and for the settings that are in force.

        Raises:
            EngineContractError: the engine runs, but does not meet what Frontline relies on.
        """

    async def limit(self, launch: Launch, http: EngineHttp, slots: int) -> bool:
        """Have a running engine run fewer requests at once than it was started for.

        Called where ``slots: auto`` has found that fewer fit. Returns whether the engine does so.
        An engine that preempts must, or priority would wait for memory instead of taking a slot.
        Others get no more requests than there are slots anyway.
        """
        return False

    async def load_lora(self, launch: Launch, http: EngineHttp, lora: LoraAdapter) -> str:
        """Have a running engine load an adapter whose name it has not loaded.

        Returns why it has not, in the engine's words, which may name paths; empty if it has.
        """
        return f"{self.name} loads no LoRA adapters while it runs"

    async def unload_lora(self, launch: Launch, http: EngineHttp, name: str) -> str:
        """Have a running engine unload an adapter; requests that use it already end normally.

        Returns why it has not, as ``load_lora``. SGLang answers when the last of these has ended.
        """
        return f"{self.name} unloads no LoRA adapters while it runs"

    async def preemption(self, http: EngineHttp) -> PreemptionReport | None:
        """Ask a running engine about its preemption; ``None`` if it does not report it.

        Called every few seconds.
        """
        return None


class EngineContractError(RuntimeError):
    """A running engine does not behave as its adapter requires."""


def stay_on_loopback(span: NodeSpan) -> dict[str, str]:
    """Return the variables that keep an engine on one node off the node's other addresses.

    Otherwise NCCL and Gloo listen on the node's first address while its processes meet, and ask for
    no key.
    """
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    return dict.fromkeys(names, "lo") if span.nodes == 1 else {}


async def prove_guarded(http: EngineHttp, engine: str, paths: Iterable[str]) -> None:
    """Check that an engine answers 401 without the key, also on these paths.

    Raises:
        EngineContractError: one of the paths is answered otherwise without the key.
    """
    for path in paths:
        status, _ = await http.get_json(path, authorized=False)
        if status != 401:
            raise EngineContractError(f"{engine} answers {path} without the key (status {status})")


async def prove_lora(http: EngineHttp, engine: str, launch: Launch) -> frozenset[str]:
    """Return the names of the LoRA adapters that an engine has loaded: all of its launch.

    Raises:
        EngineContractError: its models list lacks one of them.
    """
    if not launch.loras:
        return frozenset()
    _, models = await http.get_json("/v1/models")
    loaded = listed_loras(models, launch.loras)
    if missing := [one.name for one in launch.loras if one.name not in loaded]:
        raise EngineContractError(f"{engine} has not loaded the adapter {missing[0]}")
    return loaded


async def serves_messages(http: EngineHttp, served_name: str) -> bool:
    """Return whether an engine has Anthropic's routes, for the model that it has loaded.

    It is asked to count the tokens of a short message, which generates nothing. A model without a
    chat template, or one for embeddings, has no messages.
    """
    asked = {"model": served_name, "messages": [{"role": "user", "content": "Hi"}]}
    status, answer = await http.post_json(Route.COUNT_TOKENS.path, asked)
    match answer:
        case {"input_tokens": int(tokens)}:
            return status == 200 and tokens > 0
    return False


async def serves_tokens(http: EngineHttp, served_name: str) -> bool:
    """Return whether an engine turns a text into tokens, and tokens into text."""
    asked = {"model": served_name, Route.TOKENIZE.prompt_field: "Hi"}
    status, answer = await http.post_json(Route.TOKENIZE.path, asked)
    match answer:
        case {"tokens": [int(), *_] as tokens} if status == 200:
            asked = {"model": served_name, Route.DETOKENIZE.prompt_field: tokens}
            status, _ = await http.post_json(Route.DETOKENIZE.path, asked)
            return status == 200
    return False


def silent_recording(served_name: str) -> Spliced:
    """Return the form of a request to transcribe half a second of silence."""
    samples = bytes(16_000)
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(samples), b"WAVE", b"fmt ", 16, 1, 1, 16_000,
        32_000, 2, 16, b"data", len(samples),
    )  # fmt: skip
    form = Form({}, File((head + samples,), "silence.wav", "audio/wav"))
    return engine_form(form, served_name, frozenset(), {FORMAT: "json"})


async def serves_transcriptions(http: EngineHttp, served_name: str) -> bool:
    """Return whether an engine transcribes a recording, and tells its length."""
    path = Route.TRANSCRIPTIONS.path
    match await http.post_form(path, silent_recording(served_name)):
        case (200, {"text": str(), "usage": {"seconds": int(seconds)}}):
            return seconds > 0
    return False


async def pooled_routes(
    http: EngineHttp, served_name: str
) -> tuple[frozenset[Route], frozenset[Route]]:
    """Return the pooled routes that an engine serves, and those on which it reads a priority.

    An engine serves a route if it answers a short request with its count of the prompt's tokens,
    by which the request is billed. It reads the priority if it refuses one that is no number.
    """
    served, prioritized = set(), set()
    for route, prompt in POOLED_PROMPTS.items():
        asked = {"model": served_name, **prompt}
        match await http.post_json(route.path, asked):
            case (200, {"usage": {"prompt_tokens": int(tokens)}}) if tokens > 0:
                served.add(route)
            case _:
                continue
        status, answer = await http.post_json(route.path, {**asked, "priority": "none"})
        if status == 400 and "priority" in json.dumps(answer):
            prioritized.add(route)
    return frozenset(served), frozenset(prioritized)


async def proved_routes(
    http: EngineHttp, served_name: str, *, generates: bool
) -> tuple[frozenset[Route], frozenset[Route]]:
    """Return the routes of a running engine, and the pooled ones on which it reads a priority.

    OpenAI's are those of a model that generates, or of one that does not. The others it has proved.
    """
    routes = GENERATING_ROUTES if generates else OPENAI_ROUTES - GENERATING_ROUTES
    if await serves_messages(http, served_name):
        routes |= MESSAGES_ROUTES
    if await serves_tokens(http, served_name):
        routes |= TOKEN_ROUTES
    if generates:
        return routes, frozenset()
    pooled, prioritized = await pooled_routes(http, served_name)
    return routes | pooled, prioritized


def reserved_problems(args: Mapping[str, EngineArg], reserved: frozenset[str]) -> list[Problem]:
    """Return a problem for each engine argument that Frontline sets itself."""
    return [
        Problem(("engine_args", name), "Frontline sets this itself")
        for name in reserved & args.keys()
    ]


def refuse_reserved(args: Mapping[str, EngineArg], reserved: frozenset[str]) -> None:
    """Reject engine arguments that Frontline sets itself.

    Raises:
        SettingsError: some are given; each is named.
    """
    if problems := reserved_problems(args, reserved):
        raise SettingsError(*problems)


def render_flags(args: Mapping[str, EngineArg]) -> list[str]:
    """Return command-line flags for named arguments, as Python engines spell them.

    ``max_model_len: 4096`` becomes ``--max-model-len 4096``, ``True`` a bare flag, ``False`` and
    ``None`` nothing, a list one flag with several values, and a mapping its JSON.
    """
    flags: list[str] = []
    for name, value in args.items():
        flag = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            flags.append(flag)
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        elif isinstance(value, dict):
            flags += [flag, json.dumps(value)]
        else:
            flags += [flag, str(value)]
    return flags
