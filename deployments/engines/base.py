"""The contract of an engine adapter: the only place that knows an engine's flags and quirks.

Adding an engine is one module with a subclass of ``EngineAdapter`` and one line in
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
"""Priorities on engines that serve lower numbers first. vLLM always does; SGLang, told to do the
same, preempts only at gaps above 10, so gaps of 100 leave one scale for both."""

METERED_STREAM: Final = {"include_usage": True, "continuous_usage_stats": True}
"""The stream options by which an engine tells its usage on every chunk. vLLM heeds the second only
together with the first."""


@dataclass(frozen=True, slots=True)
class NodeSpan:
    """The nodes that one engine runs on together, and which of its processes this one is.

    Attributes:
        nodes: how many there are; the engine's ranks are spread over them evenly.
        rank: the number of this node among them. Number 0 has the engine's HTTP server.
        here: this node's address.
        address: the address of number 0, at which all meet.
        port: the port there, reserved for that.
    """

    nodes: int = 1
    rank: int = 0
    here: str = ""
    address: str = ""
    port: int = 0

    @property
    def meeting_place(self) -> str:
        """Where all of them meet, as ``HOST:PORT``."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything an adapter needs to know to start one engine server.

    Attributes:
        model: the folder or name of the model that the engine loads.
        served_name: the model's id, by which requests name it.
        host: the address to bind to; always loopback.
        port: a port reserved for this engine.
        slots: how many requests the engine runs at once.
        key: the secret that every request to the engine carries as a bearer token.
        python: the interpreter of the engine's environment.
        engine_args: the operator's own engine arguments, by name, with underscores; they win
            over an adapter's defaults, except for the address, the key and the served name.
        span: the nodes that the engine runs on; just this one by default.
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

    @property
    def base_url(self) -> str:
        """Where the engine answers on its own machine."""
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a running engine told about itself.

    Attributes:
        version: the engine's version.
        context_length: longest prompt and answer together, in tokens; ``None``: not known.
        dialect: how to speak to it, with native priority only if it is really in force.
    """

    version: str
    context_length: int | None
    dialect: Dialect


class EngineHttp(Protocol):
    """A connection to a running engine, carrying its key."""

    async def get_json(self, path: str, *, authorized: bool = True) -> tuple[int, Any]:
        """Return status and parsed body (``None`` where it is not JSON) of a GET."""
        ...

    async def post_json(
        self, path: str, body: Mapping[str, Any], *, authorized: bool = True
    ) -> tuple[int, Any]:
        """Return status and parsed body (``None`` where it is not JSON) of a POST."""
        ...


class EngineAdapter(ABC):
    """How to start one kind of engine and how to speak to it. Holds no state."""

    name: ClassVar[str]
    """The engine's name in configuration files."""
    ready_path: ClassVar[str]
    """Answers 200 once requests will be served; cheap enough to ask several times a second."""
    health_path: ClassVar[str]
    """Answers 200 while the engine is alive; cheap enough to ask every second."""
    port_stays_reserved: ClassVar[bool] = True
    """Whether the engine's port can stay reserved for it while it starts, which takes a server
    that binds with SO_REUSEADDR. If not, the port is free for a moment, for anyone to take."""

    spans_nodes: ClassVar[bool] = False
    """Whether the engine can run on several nodes together, which takes a ``command`` and an
    ``environment`` that heed ``launch.span``."""

    @abstractmethod
    def command(self, launch: Launch) -> list[str]:
        """Return the command line that starts the engine's OpenAI server.

        On a node that is not the engine's first it starts that node's part of the engine.
        """

    def environment(self, launch: Launch) -> dict[str, str]:
        """Return environment variables to set for the engine, besides those it inherits."""
        return {}

    def files(self, launch: Launch) -> dict[str, str]:
        """Return the text of each file that is made for the engine, by the option that names it."""
        return {}

    @abstractmethod
    def priority_routes(self, launch: Launch) -> frozenset[Route]:
        """Return the routes on which an engine that is started so ought to have native priority.

        That is a plan; what counts for requests is what ``inspect`` finds in the running engine.
        """

    @abstractmethod
    async def inspect(self, launch: Launch, http: EngineHttp) -> EngineFacts:
        """Ask the engine, once it is ready, what it is and what it has in force.

        Raises:
            EngineContractError: the engine runs, but not as it must to be served from.
        """


class EngineContractError(RuntimeError):
    """A running engine does not do what its adapter relies on."""


async def prove_guarded(http: EngineHttp, engine: str, paths: Iterable[str]) -> None:
    """Check that nothing but the key opens an engine: not even these paths.

    Raises:
        EngineContractError: one of them is answered without the key.
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
    """Refuse engine arguments that Frontline sets itself.

    Raises:
        SettingsError: there are such; each is named.
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
