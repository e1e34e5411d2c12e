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
    MESSAGES = "messages"
    """Anthropic's messages."""
    COUNT_TOKENS = "messages/count_tokens"
    """Anthropic's count of a prompt's tokens. Nothing is generated."""
    TOKENIZE = "tokenize"
    """vLLM's and SGLang's: the tokens of a text or of messages."""
    DETOKENIZE = "detokenize"
    """The text of tokens."""
    RERANK = "rerank"
    """Orders documents by how well they fit a query."""
    SCORE = "score"
    """How well texts fit others."""
    CLASSIFY = "classify"
    """The classes of texts."""
    POOLING = "pooling"
    """The vectors of a pooling model, as it makes them."""
    TRANSCRIPTIONS = "audio/transcriptions"
    """The text of a recording. The request is a form with a file, and not JSON."""

    @property
    def path(self) -> str:
        """The path on the engine's own server."""
        return f"/v1/{self.value}"

    @property
    def prompt_field(self) -> str:
        """The request field that holds the prompt."""
        return _PROMPT_FIELDS[self]

    @property
    def is_anthropic(self) -> bool:
        """Whether the route has Anthropic's shapes instead of OpenAI's."""
        # By identity, as in the others: the hash of an enum's member is computed in Python, and
        # every request asks several times.
        return self is _MESSAGES or self is _COUNT_TOKENS

    @property
    def generates(self) -> bool:
        """Whether an answer has tokens of its own."""
        return self is _CHAT or self is _COMPLETIONS or self is _RESPONSES or self is _MESSAGES

    @property
    def is_form(self) -> bool:
        """Whether a request is a form with a file (``multipart/form-data``) instead of JSON."""
        return self is _TRANSCRIPTIONS

    @property
    def streams(self) -> bool:
        """Whether an answer can be a stream."""
        return self.generates or self is _TRANSCRIPTIONS

    @property
    def takes_slot(self) -> bool:
        """Whether the engine runs a sequence for a request; without one, it is not queued."""
        return not (self is _COUNT_TOKENS or self is _TOKENIZE or self is _DETOKENIZE)


_PROMPT_FIELDS = {
    Route.CHAT: "messages",
    Route.COMPLETIONS: "prompt",
    Route.EMBEDDINGS: "input",
    Route.RESPONSES: "input",
    Route.MESSAGES: "messages",
    Route.COUNT_TOKENS: "messages",
    Route.TOKENIZE: "prompt",
    Route.DETOKENIZE: "tokens",
    Route.RERANK: "documents",
    Route.SCORE: "text_2",
    Route.CLASSIFY: "input",
    Route.POOLING: "input",
    Route.TRANSCRIPTIONS: "file",
}
_CHAT, _COMPLETIONS, _RESPONSES = Route.CHAT, Route.COMPLETIONS, Route.RESPONSES
_MESSAGES, _COUNT_TOKENS = Route.MESSAGES, Route.COUNT_TOKENS
_TOKENIZE, _DETOKENIZE = Route.TOKENIZE, Route.DETOKENIZE
_TRANSCRIPTIONS = Route.TRANSCRIPTIONS
AUDIO_ROUTES = frozenset({Route.TRANSCRIPTIONS})
"""The routes of recordings, which are billed by the second; not every engine has them."""
TOKEN_ROUTES = frozenset({Route.TOKENIZE, Route.DETOKENIZE})
"""The routes to an engine's tokenizer, which not every engine has."""
MESSAGES_ROUTES = frozenset(route for route in Route if route.is_anthropic)
"""The routes of Anthropic's API, which not every engine has."""
POOLED_ROUTES = frozenset({Route.RERANK, Route.SCORE, Route.CLASSIFY, Route.POOLING})
"""The routes of models that do not generate, beside embeddings; not every engine has them."""
OPENAI_ROUTES = frozenset({Route.CHAT, Route.COMPLETIONS, Route.EMBEDDINGS, Route.RESPONSES})
"""The routes that are served by every engine, if the model is of the right kind."""
GENERATING_ROUTES = frozenset(route for route in OPENAI_ROUTES if route.generates)
"""Those of them that a model which generates has."""
SLOT_ROUTES = frozenset(route for route in Route if route.takes_slot)
"""The routes on which a request takes a slot, and on which priority has a meaning."""
PRIORITY_ROUTES = SLOT_ROUTES - AUDIO_ROUTES
"""Those of them on which some engine reads a priority: none does so for recordings."""


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
        routes: the routes that the engine has.
        priority_headers: by route, the request header that carries the priority. On other routes
            it is the ``priority`` field of the body.
        preempts: whether the running engine has proved that a waiting request takes the slot of a
            running one of a lower tier, which later resumes exactly where it stopped. False if
            that is unknown.
        generates: whether the running engine generates text. If not, its model only embeds.
        adapters: the LoRA adapters that the running engine has loaded, by name.
        adapter_routes: the routes on which a request may name one of them.
        adapter_field: the request field that names the adapter beside ``model``; empty if
            ``model`` alone does.
    """

    engine: str
    simulated: bool = False
    priority_values: Mapping[Tier, int | float] = field(default_factory=dict)
    priority_routes: frozenset[Route] = frozenset()
    stream_options: Mapping[str, Any] = field(default_factory=dict)
    accepted_fields: Mapping[Route, frozenset[str]] = field(default_factory=dict)
    preempts: bool = False
    generates: bool = True
    routes: frozenset[Route] = OPENAI_ROUTES
    priority_headers: Mapping[Route, str] = field(default_factory=dict)
    adapters: frozenset[str] = frozenset()
    adapter_routes: frozenset[Route] = frozenset()
    adapter_field: str = ""

    def __post_init__(self) -> None:
        assert not self.priority_routes or set(self.priority_values) == set(Tier), (
            "native priority has a value for every tier"
        )
        assert self.priority_routes or not self.preempts, "an engine preempts by native priority"

    def serves(self, route: Route, adapter: str = "") -> bool:
        """Return whether the engine has a route, for an adapter if one is named."""
        if not adapter:
            return route in self.routes
        return adapter in self.adapters and route in self.adapter_routes & self.routes

    @property
    def native_priority(self) -> bool:
        """Whether the running engine has native priority in force on any route."""
        return bool(self.priority_routes)
