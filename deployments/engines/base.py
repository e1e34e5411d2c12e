"""The contract of an engine adapter, the only code that knows an engine's flags and quirks.

To add an engine, add one module with a subclass of ``EngineAdapter`` and one line in
``deployments.engines.registry``.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol

from app.core.dialect import Dialect, Route
from app.core.settings import Problem, SettingsError
from app.core.tiers import Tier

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
        slots: how many requests the engine runs at once.
        key: the secret that every request to the engine carries as a bearer token.
        python: the interpreter of the engine's environment.
        engine_args: the operator's own engine arguments, by name, with underscores. They override
            an adapter's defaults, except for the address, the key and the served name.
        span: the nodes that the engine runs on; just this one by default.
        preemption: whether the engine is to suspend running requests for waiting ones of a better
            tier, if it can.
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
    """

    version: str
    context_length: int | None
    dialect: Dialect


class EngineHttp(Protocol):
    """HTTP requests to a running engine, with its key unless ``authorized`` is false."""

    async def get_json(self, path: str, *, authorized: bool = True) -> tuple[int, Any]:
        """Return the status and the parsed body (``None`` if it is not JSON) of a GET."""
        ...

    async def post_json(
        self, path: str, body: Mapping[str, Any], *, authorized: bool = True
    ) -> tuple[int, Any]:
        """Return the status and the parsed body (``None`` if it is not JSON) of a POST."""
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

    spans_nodes: ClassVar[bool] = False
    """Whether the engine can run on several nodes together. This requires a ``command`` and an
    ``environment`` that use ``launch.span``."""

    @abstractmethod
    def command(self, launch: Launch) -> list[str]:
        """Return the command line that starts the engine's OpenAI server.

        On a node other than the engine's first, it starts that node's part of the engine.
        """

    def environment(self, launch: Launch) -> dict[str, str]:
        """Return environment variables to set for the engine, in addition to inherited ones."""
        return {}

    def files(self, launch: Launch) -> dict[str, str]:
        """Return the text of each file generated for the engine, by the option that names it."""
        return {}

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


class EngineContractError(RuntimeError):
    """A running engine does not behave as its adapter requires."""


async def prove_guarded(http: EngineHttp, engine: str, paths: Iterable[str]) -> None:
    """Check that an engine answers 401 without the key, also on these paths.

    Raises:
        EngineContractError: one of the paths is answered otherwise without the key.
    """
    for path in paths:
        status, _ = await http.get_json(path, authorized=False)
        if status != 401:
            raise EngineContractError(f"{engine} answers {path} without the key (status {status})")


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
