"""An engine's HTTP dialect as the ingress needs it, as plain values.

An engine adapter (``deployments.engines``) creates a ``Dialect``; the ingress reads it. The ingress
thus depends on this contract and never on an engine's module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from app.core.tiers import Tier


class Route(StrEnum):
    """The engine routes that Frontline serves; the value is the path below ``/v1/``."""

    CHAT = "chat/completions"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"
    RESPONSES = "responses"

    @property
    def path(self) -> str:
        """The path on the engine's own server."""
        return f"/v1/{self.value}"

    @property
    def prompt_field(self) -> str:
        """The request field that holds the prompt."""
        return _PROMPT_FIELDS[self]


_PROMPT_FIELDS = {
    Route.CHAT: "messages",
    Route.COMPLETIONS: "prompt",
    Route.EMBEDDINGS: "input",
    Route.RESPONSES: "input",
}


@dataclass(frozen=True, slots=True)
class Dialect:
    """How to send requests to one engine.

    Attributes:
        engine: the engine's name as users know it, such as ``vllm``.
        simulated: whether it simulates an engine.
        priority_values: the value of the request's ``priority`` field for each tier, in the
            engine's own sign and scale.
        priority_routes: the routes on which the engine has priority in force. Empty if its
            native priority is off. On other routes no ``priority`` field is sent.
        stream_options: the options with which a stream of chat completions or completions carries
            its token usage on every chunk.
        accepted_fields: by route, the request fields that the engine accepts; other fields are
            dropped. A route that is not named here tolerates unknown fields.
        preempts: whether the running engine has proved that a waiting request takes the slot of a
            running one of a lower tier, which later resumes exactly where it stopped. False if
            that is unknown.
    """

    engine: str
    simulated: bool = False
    priority_values: Mapping[Tier, int | float] = field(default_factory=dict)
    priority_routes: frozenset[Route] = frozenset()
    stream_options: Mapping[str, Any] = field(default_factory=dict)
    accepted_fields: Mapping[Route, frozenset[str]] = field(default_factory=dict)
    preempts: bool = False

    def __post_init__(self) -> None:
        assert not self.priority_routes or set(self.priority_values) == set(Tier), (
            "native priority has a value for every tier"
        )
        assert self.priority_routes or not self.preempts, "an engine preempts by native priority"

    @property
    def native_priority(self) -> bool:
        """Whether the running engine has native priority in force on any route."""
        return bool(self.priority_routes)
