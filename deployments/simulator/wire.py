"""The common part of the dialects: reads requests, writes answers and streams. Pure."""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import orjson

from app.contracts.traffic import Histogram
from app.core.dialect import AUDIO_ROUTES, POOLED_ROUTES, Route
from deployments.simulator import OWNER
from deployments.simulator.chunks import DONE, StreamWriter, event
from deployments.simulator.generation import GeneratedReply
from deployments.simulator.language import embed, minimal_json
from deployments.simulator.messages import MessagesBody, message_event
from deployments.simulator.observations import EngineState
from deployments.simulator.requests import (
    COMPLETION_LIMIT,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    GenerationBody,
    InvalidBodyError,
    Problem,
    Prompt,
    RefusedError,
    ResponsesBody,
    Wish,
    chat_prompt,
    fixed_text,
    forced_response_tool,
    forced_tool,
    problem,
    prompts_of,
    read,
)
from deployments.simulator.settings import SimulatedSettings
from deployments.simulator.transcripts import TranscriptionBody

Headers = Mapping[bytes, bytes]
"""A request's headers by lower-case name; the last one if a name is repeated."""


class Wire(ABC):
    """One engine's HTTP dialect: what it accepts, its error messages, and the exact shape and order
    of its answers."""

    headers_before_first_token: ClassVar[bool]
    """Whether a stream's status line is sent before its first token."""
    refuses_in_band: ClassVar[bool] = False
    """Whether a stream to a full engine gets HTTP 200 and an error as its first event."""
    accepted_fields: ClassVar[Mapping[Route, frozenset[str]]] = {}
    """By route, the only accepted fields. Other routes accept any field."""
    keeps_request_id: ClassVar[bool] = False
    """Whether an answer's id is the request's ``x-request-id``."""
    tells_preemptions: ClassVar[bool] = True
    """Whether Frontline's code inside the engine tells how often it has suspended a request."""
    echoes_service_tier: ClassVar[bool] = False
    """Whether ``/v1/responses`` answers with the request's ``service_tier``."""
    listens_before_ready: ClassVar[bool] = False
    """Whether the port is open before the engine is ready."""
    default_limit: ClassVar[int | None] = COMPLETION_LIMIT
    """The length of a completion without a limit; ``None``: the engine's default."""

    routes: ClassVar[frozenset[Route]] = frozenset(Route) - POOLED_ROUTES - AUDIO_ROUTES
    """The routes that it has."""
    detokenized: ClassVar[str] = "prompt"
    """The field of the text that tokens stand for."""
    whole_messages_usage: ClassVar[bool] = True
    """Whether a stream of messages tells the usage of the prompt at its end, too."""

    def __init__(self, settings: SimulatedSettings, served_name: str, model: str) -> None:
        self.settings, self.served_name, self.model = settings, served_name, model
        self.adapters = list(settings.adapters)

    # Reading

    @abstractmethod
    def priority(self, route: Route, values: Mapping[str, Any], headers: Headers) -> float:
        """Return the priority that the engine reads from a request."""

    @abstractmethod
    def check_length(self, prompt_tokens: int, limit: int | None, field: str) -> None:
        """Reject a prompt, or a limit in ``field``, that exceeds the context."""

    def check_fields(self, route: Route, values: Mapping[str, Any]) -> None:
        """Reject unknown fields, if the engine does not accept them."""
        if unknown := self.unknown_fields(route, values):
            raise InvalidBodyError(unknown)

    def unknown_fields(self, route: Route, values: Mapping[str, Any]) -> list[Problem]:
        """Return a problem for each unknown field that the engine does not accept."""
        known = self.accepted_fields.get(route)
        if known is None:
            return []
        lacking, words = self.settings.lacking_fields, "Extra inputs are not permitted"
        unknown = [name for name in values if name not in known or name in lacking]
        return [problem("extra_forbidden", (name,), words, values[name]) for name in unknown]

    @abstractmethod
    def check_model(self, route: Route, model: str | None) -> None:
        """Reject an unknown model, if the engine checks that."""

    def check_adapter(self, values: Mapping[str, Any]) -> None:  # noqa: B027 - for SGLang alone
        """Reject an adapter that is not loaded, where a field beside ``model`` names it."""

    @abstractmethod
    def check_stream_options(self, route: Route, values: Mapping[str, Any]) -> None:
        """Reject stream options that do not fit the request."""

    def answered_model(self, requested: str | None) -> str:
        """Return the model's name in answers: the requested one."""
        return requested or self.served_name

    def include_usage(self, body: GenerationBody) -> bool:
        """Return whether a stream ends with a chunk of usage."""
        return bool(body.stream_options and body.stream_options.include_usage)

    def continuous_usage(self, body: GenerationBody) -> bool:
        """Return whether every chunk of a stream carries usage."""
        options = body.stream_options
        return self.include_usage(body) and bool(options and options.continuous_usage_stats)

    def read_generation(
        self, route: Route, values: Mapping[str, Any]
    ) -> tuple[GenerationBody | ResponsesBody | MessagesBody | TranscriptionBody, Wish]:
        """Return a generation request, parsed, and what to generate."""
        if route is Route.TRANSCRIPTIONS:
            spoken = read(TranscriptionBody, values)
            return spoken, spoken.wish()
        if route is Route.MESSAGES:
            return self._read_messages(values)
        if route is Route.CHAT:
            return self._read_chat(values)
        if route is Route.COMPLETIONS:
            return self._read_completion(values)
        return self._read_responses(values)

    def _read_chat(self, values: Mapping[str, Any]) -> tuple[ChatBody, Wish]:
        body = read(ChatBody, values)
        limit = body.max_completion_tokens
        if limit is None:
            limit = body.max_tokens
        wish = self._wish(body, [chat_prompt(body.messages)], limit)
        function, wish.tool_required = forced_tool(body)
        if function is not None:
            wish.tool = function.name
            wish.tool_arguments = orjson.dumps(minimal_json(function.parameters)).decode()
        wish.logprobs, wish.top_logprobs = bool(body.logprobs), body.top_logprobs or 0
        return body, wish

    def _read_completion(self, values: Mapping[str, Any]) -> tuple[CompletionBody, Wish]:
        body = read(CompletionBody, values)
        limit = self.default_limit if body.max_tokens is None else body.max_tokens
        wish = self._wish(body, prompts_of(body.prompt), limit)
        wish.logprobs, wish.top_logprobs = body.logprobs is not None, body.logprobs or 0
        return body, wish

    def _read_responses(self, values: Mapping[str, Any]) -> tuple[ResponsesBody, Wish]:
        body = read(ResponsesBody, values)
        messages = [{"content": body.input}] if isinstance(body.input, str) else body.input
        prompt = chat_prompt([{"content": body.instructions}, *messages])
        self.check_length(len(prompt.tokens), body.max_output_tokens, "max_output_tokens")
        wish = Wish([prompt], limit=body.max_output_tokens, stream=bool(body.stream))
        if (tool := forced_response_tool(body)) is not None:
            wish.tool = tool["name"]
            wish.tool_arguments = orjson.dumps(minimal_json(tool.get("parameters"))).decode()
        return body, wish

    def _read_messages(self, values: Mapping[str, Any]) -> tuple[MessagesBody, Wish]:
        body = read(MessagesBody, values)
        prompt = body.prompt()
        self.check_length(len(prompt.tokens), body.max_tokens, "max_tokens")
        return body, body.wish(prompt)

    def message_id(self, request_id: str) -> str:
        """Return the id of a message."""
        return f"msg_{request_id}"

    def read_embedding(self, values: Mapping[str, Any]) -> tuple[EmbeddingBody, list[Prompt]]:
        """Return an embedding request and its prompts."""
        body = read(EmbeddingBody, values)
        prompts = prompts_of(body.input)
        for prompt in prompts:
            self.check_length(len(prompt.tokens), None, "")
        return body, prompts

    def _wish(self, body: GenerationBody, prompts: list[Prompt], limit: int | None) -> Wish:
        if limit is not None and limit < 1:
            raise RefusedError(
                400, f"max_tokens must be at least 1, got {limit}.", param="max_tokens"
            )
        for prompt in prompts:
            self.check_length(len(prompt.tokens), limit, "max_tokens")
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        return Wish(
            prompts,
            n=body.n or 1,
            limit=self.settings.context_length if body.ignore_eos and limit is None else limit,
            min_tokens=body.min_tokens,
            stops=stops,
            keep_stop=body.include_stop_str_in_output,
            fixed_text=fixed_text(body.response_format),
            stream=bool(body.stream),
            include_usage=self.include_usage(body),
            continuous_usage=self.continuous_usage(body),
        )

    # Answering

    @abstractmethod
    def invalid(self, error: InvalidBodyError, route: Route) -> dict[str, Any]:
        """Return the body of the 400 for a malformed request."""

    @abstractmethod
    def refused(self, error: RefusedError, route: Route | None) -> dict[str, Any]:
        """Return the body of an error."""

    @abstractmethod
    def usage(self, prompt: int, completion: int, total: int, cached: int) -> dict[str, Any]:
        """Return the usage of an answer."""

    @abstractmethod
    def chat(self, reply: GeneratedReply) -> dict[str, Any]:
        """Return a chat completion."""

    @abstractmethod
    def completion(self, reply: GeneratedReply) -> dict[str, Any]:
        """Return a completion."""

    @abstractmethod
    def chat_stream(self, reply: GeneratedReply) -> StreamWriter:
        """Return the writer of a chat completion's stream."""

    @abstractmethod
    def completion_stream(self, reply: GeneratedReply) -> StreamWriter:
        """Return the writer of a completion's stream."""

    @abstractmethod
    def embedding(
        self, id: str, created: int, model: str, vectors: Sequence[object], tokens: int
    ) -> dict[str, Any]:
        """Return the answer with embeddings."""

    @abstractmethod
    def model_card(self, created: int) -> dict[str, Any]:
        """Return the entry of ``GET /v1/models``."""

    def model_cards(self, created: int) -> list[dict[str, Any]]:
        """Return the entries of the model and of its adapters."""
        card = self.model_card(created)
        of_adapters = {"root": "/simulated", "parent": self.served_name, "max_model_len": None}
        return [card, *({**card, "id": one, **of_adapters} for one in self.adapters)]

    @abstractmethod
    def metrics(self, state: EngineState) -> Mapping[str, bytes]:
        """Return the metrics, by path."""

    def busy(self) -> RefusedError:
        """Return the error for a request when too many are waiting."""
        return RefusedError(
            503,
            "The engine is currently busy and cannot accept new requests. Please try again later "
            "or on a different instance.",
            "Service Unavailable",
        )

    def refused_event(self, error: RefusedError) -> bytes:
        """Return an error as an event of a stream."""
        return event({"error": self.refused(error, None)})

    def stream_error(self, route: Route, error: RefusedError, *, begun: bool) -> tuple[bytes, bool]:
        """Return the last bytes of a stream that an error ends, and whether its HTTP message ends
        as it should; else its connection breaks. ``begun``: it has sent events."""
        if route is Route.MESSAGES:
            return self.message_error(error, begun=begun), True
        return self.refused_event(error) + DONE, True

    def message_error(self, error: RefusedError, *, begun: bool) -> bytes:
        """Return the events with which a stream of messages ends."""
        return message_event("error", error={"type": error.kind, "message": error.message})

    def reply_usage(self, reply: GeneratedReply) -> dict[str, Any]:
        """Return the usage of a whole reply."""
        prompt, completion = reply.prompt_tokens, reply.completion_tokens
        return self.usage(prompt, completion, prompt + completion, reply.cached_tokens)

    def vectors(self, body: EmbeddingBody, prompts: Sequence[Prompt]) -> list[object]:
        """Return the embeddings, in the encoding that was asked for."""
        dimensions = body.dimensions or self.settings.embedding_dimensions
        vectors = [embed(prompt.text, dimensions, self.settings.seed) for prompt in prompts]
        if body.encoding_format == "base64":
            return [base64.b64encode(vector.tobytes()).decode() for vector in vectors]
        return [vector.tolist() for vector in vectors]


def base_card(wire: Wire, created: int) -> dict[str, Any]:
    """Return the fields that every engine's model card begins with."""
    return {"id": wire.served_name, "object": "model", "created": created, "owned_by": OWNER}


Samples = Mapping[str, tuple[str, float | Histogram]]
"""The kind and the value of metrics, by name."""


def prometheus(samples: Samples, labels: str) -> bytes:
    """Return metrics as Prometheus text."""
    lines = []
    for name, (kind, value) in samples.items():
        lines += [f"# HELP {name} Simulated.", f"# TYPE {name} {kind}"]
        if isinstance(value, Histogram):
            lines += _histogram(name, value, labels)
        else:
            lines.append(f"{name}{{{labels}}} {float(value)}")
    return "\n".join([*lines, ""]).encode()


def _histogram(name: str, value: Histogram, labels: str) -> Iterator[str]:
    bounds = [*map(str, value.bounds), "+Inf"]
    for bound, below in zip(bounds, accumulate(value.counts), strict=True):
        yield f'{name}_bucket{{{labels},le="{bound}"}} {float(below)}'
    yield f"{name}_count{{{labels}}} {float(value.count)}"
    yield f"{name}_sum{{{labels}}} {value.total}"
