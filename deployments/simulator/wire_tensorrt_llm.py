"""TensorRT-LLM's HTTP dialect. Shapes, fields and words are those of TensorRT-LLM's main branch of
2026 (``tensorrt_llm/serve/openai_protocol.py``, ``postprocess_handlers.py``,
``openai_server.py``). The real server has no key; the simulated one guards its routes all the
same, because nothing may reach an engine round the ingress."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final

import orjson
from pydantic import Field, TypeAdapter, ValidationError

from app.core.dialect import OPENAI_ROUTES, Route
from deployments.engines.tensorrt_llm_requests import PRIORITY_ROUTES, REQUEST_FIELDS
from deployments.simulator.chunks import (
    DONE,
    ChunkWriter,
    StreamWriter,
    chat_logprobs,
    completion_logprobs,
    event,
)
from deployments.simulator.generation import Choice, GeneratedReply
from deployments.simulator.observations import EngineState
from deployments.simulator.requests import (
    GenerationBody,
    InvalidBodyError,
    Problem,
    RefusedError,
    problem,
)
from deployments.simulator.wire import Headers, Samples, Wire, base_card, prometheus

_PRIORITY = TypeAdapter[float | None](Annotated[float, Field(ge=0.0, le=1.0)] | None)


_STREAM_OPTIONS: Final = frozenset({"include_usage", "continuous_usage_stats"})
# Of the optional fields those that may be left out, but not be null.
_NEVER_NULL: Final = frozenset({"n", "ignore_eos", "min_tokens", "include_stop_str_in_output"})


class TensorrtLlmWire(Wire):
    """Unknown fields are an error but on ``/v1/responses``, errors are not wrapped, a higher
    priority, between 0 and 1, goes first, and a stream of chat that an error ends breaks off."""

    routes: ClassVar[frozenset[Route]] = OPENAI_ROUTES
    headers_before_first_token: ClassVar[bool] = True
    tells_preemptions: ClassVar[bool] = False
    accepted_fields = REQUEST_FIELDS
    default_limit: ClassVar[int | None] = None

    def check_fields(self, route: Route, values: Mapping[str, Any]) -> None:
        problems = [*self.unknown_fields(route, values), *_unknown_stream_options(values)]
        if {"max_tokens", "max_completion_tokens"} <= values.keys() and route is Route.CHAT:
            # They are one field with two names: of two values one is too many.
            problems.append(_extra(("max_completion_tokens",), values["max_completion_tokens"]))
        if "model" not in values:
            problems.append(problem("missing", ("model",), "Field required", dict(values)))
        if route in PRIORITY_ROUTES:
            nulls = [name for name in _NEVER_NULL & values.keys() if values[name] is None]
            words = "Input should be a valid integer"
            problems += [problem("int_type", (name,), words) for name in sorted(nulls)]
        if problems:
            raise InvalidBodyError(problems)

    def priority(self, route: Route, values: Mapping[str, Any], headers: Headers) -> float:
        if route not in PRIORITY_ROUTES:
            return self.settings.unset_priority
        try:
            priority = _PRIORITY.validate_python(values.get("priority"))
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False)[0]
            raise InvalidBodyError([{**found, "loc": ("body", "priority")}]) from None
        return self.settings.unset_priority if priority is None else priority

    def check_stream_options(self, route: Route, values: Mapping[str, Any]) -> None:
        if values.get("stream_options") is None or values.get("stream"):
            return
        words = "Stream options can only be defined when stream is true."
        if route is Route.CHAT:
            words = "stream_options can only be set if stream is true"
        message = f"Value error, {words}"
        raise InvalidBodyError([problem("value_error", (), message, dict(values))])

    def include_usage(self, body: GenerationBody) -> bool:
        # Here the option is on unless it is given, once there are stream options at all.
        return body.stream_options is not None and body.stream_options.include_usage is not False

    def check_model(self, route: Route, model: str | None) -> None:
        """The engine answers to any name, and echoes it."""

    def check_length(self, prompt_tokens: int, limit: int | None, field: str) -> None:
        context = self.settings.context_length
        if prompt_tokens >= context:
            raise RefusedError(
                400,
                f"The sum of prompt length ({float(prompt_tokens)}), query length (0) should not "
                f"exceed max_num_tokens ({context})",
            )

    def invalid(self, error: InvalidBodyError, route: Route) -> dict[str, Any]:
        text = str([dict(found) for found in error.problems])
        if self.settings.older_errors:
            return self.refused(RefusedError(400, text), route)
        return {"error": text}

    def refused(self, error: RefusedError, route: Route | None) -> dict[str, Any]:
        return {
            "object": "error",
            "message": error.message,
            "type": error.kind,
            "param": None,
            "code": error.status,
        }

    def stream_error(self, route: Route, error: RefusedError, *, begun: bool) -> tuple[bytes, bool]:
        if route is not Route.COMPLETIONS:
            return b"", False
        shown = {"message": error.message, "type": "server_error", "code": None, "param": None}
        return event({"error": shown}) + DONE, True

    def usage(self, prompt: int, completion: int, total: int, cached: int) -> dict[str, Any]:
        return {
            "prompt_tokens": prompt,
            "total_tokens": total,
            "completion_tokens": completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def chat(self, reply: GeneratedReply) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{reply.id}",
            "object": "chat.completion",
            "created": reply.created,
            "model": reply.model,
            "choices": [self._chat_choice(choice, reply) for choice in reply.choices],
            "usage": self.reply_usage(reply),
            "prompt_token_ids": None,
            "prompt_token_ids_b64": None,
        }

    def _chat_choice(self, choice: Choice, reply: GeneratedReply) -> dict[str, Any]:
        calls = [_tool_call(choice)] if choice.tool else []
        top = reply.wish.top_logprobs
        return {
            "index": choice.index,
            "message": {
                "role": "assistant",
                "content": "" if choice.tool else choice.text,
                "reasoning_content": None if choice.tool else "",
                "reasoning": None,
                "tool_calls": calls,
            },
            "logprobs": chat_logprobs(choice, 0, len(choice.tokens), top)
            if reply.wish.logprobs
            else None,
            "finish_reason": _finish_reason(choice),
            "stop_reason": choice.stop,
            "mm_embedding_handle": None,
            "disaggregated_params": None,
            "avg_decoded_tokens_per_iter": None,
        }

    def completion(self, reply: GeneratedReply) -> dict[str, Any]:
        return {
            "id": f"cmpl-{reply.id}",
            "object": "text_completion",
            "created": reply.created,
            "model": reply.model,
            "choices": [
                {
                    "index": choice.index,
                    "text": choice.text,
                    "token_ids": None,
                    "logprobs": completion_logprobs(choice, 0, len(choice.tokens))
                    if reply.wish.logprobs
                    else None,
                    "context_logits": None,
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop,
                    "disaggregated_params": None,
                    "avg_decoded_tokens_per_iter": None,
                }
                for choice in reply.choices
            ],
            "usage": self.reply_usage(reply),
            "prompt_token_ids": None,
        }

    def chat_stream(self, reply: GeneratedReply) -> StreamWriter:
        return _ChatWriter(reply, self)

    def completion_stream(self, reply: GeneratedReply) -> StreamWriter:
        return _CompletionWriter(reply, self)

    def embedding(
        self, id: str, created: int, model: str, vectors: Sequence[object], tokens: int
    ) -> dict[str, Any]:
        data = [
            {"index": index, "object": "embedding", "embedding": vector}
            for index, vector in enumerate(vectors)
        ]
        head = {"id": f"embd-{id}", "object": "list", "created": created, "model": model}
        return {**head, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}

    def model_card(self, created: int) -> dict[str, Any]:
        return base_card(self, created)

    def metrics(self, state: EngineState) -> Mapping[str, bytes]:
        samples: Samples = {
            "trtllm_num_requests_running": ("gauge", state.running),
            "trtllm_num_requests_waiting": ("gauge", state.waiting),
            "trtllm_kv_cache_utilization": ("gauge", state.usage),
            "trtllm_num_paused_requests": ("gauge", 0),
            "trtllm_kv_cache_hit_rate": ("gauge", state.timings.hit_rate),
            "trtllm_request_queue_time_seconds": ("histogram", state.timings.queue),
            "trtllm_time_to_first_token_seconds": ("histogram", state.timings.ttft),
        }
        iteration = {
            "numActiveRequests": state.running,
            "numQueuedRequests": state.waiting,
        }
        labels = f'engine_type="simulated",model_name="{self.served_name}"'
        return {
            "/metrics": orjson.dumps([iteration]),
            "/prometheus/metrics": prometheus(samples, labels),
        }


def _extra(place: tuple[str, ...], value: object) -> Problem:
    return problem("extra_forbidden", place, "Extra inputs are not permitted", value)


def _unknown_stream_options(values: Mapping[str, Any]) -> list[Problem]:
    options = values.get("stream_options")
    if not isinstance(options, Mapping):
        return []
    unknown = [name for name in options if name not in _STREAM_OPTIONS]
    return [_extra(("stream_options", name), options[name]) for name in unknown]


def _finish_reason(choice: Choice) -> str:
    return "tool_calls" if choice.tool and choice.tool_required else choice.finish_reason


def _tool_call(choice: Choice) -> dict[str, Any]:
    function = {"name": choice.tool, "arguments": choice.text}
    name = f"chatcmpl-tool-{uuid.uuid4().hex}"
    return {"id": name, "type": "function", "function": function}


class _TensorrtLlmWriter(ChunkWriter):
    prefix: ClassVar[str]
    kind: ClassVar[str]

    def __init__(self, reply: GeneratedReply, wire: Wire) -> None:
        super().__init__(reply)
        self.wire = wire

    def usage(self, prompt: int, completion: int, total: int) -> dict[str, Any]:
        return self.wire.usage(prompt, completion, total, self.reply.cached_tokens)

    def head(self) -> dict[str, Any]:
        """Return the fields that a chunk begins with."""
        reply = self.reply
        name = f"{self.prefix}-{reply.id}"
        head = {"id": name, "object": self.kind, "created": reply.created}
        return {**head, "model": reply.model}

    def closing(self) -> bytes:
        if not self.reply.wish.include_usage:
            return DONE
        usage = self.wire.reply_usage(self.reply)
        return event({**self.head(), "choices": [], "usage": usage}) + DONE


class _ChatWriter(_TensorrtLlmWriter):
    """Null fields are left out, and the first chunk has a space before its end of line."""

    prefix = "chatcmpl"
    kind = "chat.completion.chunk"

    def opening(self) -> bytes:
        chunks = []
        for choice in self.reply.choices:
            part = {"index": choice.index, "delta": {"role": "assistant"}}
            chunk: dict[str, Any] = {**self.head(), "choices": [part]}
            if self.reply.wish.continuous_usage:
                chunk["usage"] = self.usage(choice.prompt_tokens, 0, choice.prompt_tokens)
            chunks.append(b"data: " + orjson.dumps(chunk) + b" \n\n")
        return b"".join(chunks)

    def chunk(
        self, choice: Choice, text: str, final: bool, logprobs: object, usage: object
    ) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": text, "reasoning_content": ""}
        if choice.tool:
            function = {"name": choice.tool, "arguments": text}
            delta = {"tool_calls": [{"type": "function", "index": 0, "function": function}]}
        part: dict[str, Any] = {"index": choice.index, "delta": delta}
        if logprobs is not None:
            part["logprobs"] = logprobs
        if final:
            part["finish_reason"] = _finish_reason(choice)
        if final and choice.stop is not None:
            part["stop_reason"] = choice.stop
        chunk = {**self.head(), "choices": [part]}
        return chunk if usage is None else {**chunk, "usage": usage}

    def logprobs(self, choice: Choice, token: int) -> object:
        return chat_logprobs(choice, token, token + 1, self.reply.wish.top_logprobs)


class _CompletionWriter(_TensorrtLlmWriter):
    prefix = "cmpl"
    kind = "text_completion"

    def chunk(
        self, choice: Choice, text: str, final: bool, logprobs: object, usage: object
    ) -> dict[str, Any]:
        part = {
            "index": choice.index,
            "text": text,
            "token_ids": None,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason if final else None,
            "stop_reason": choice.stop if final else None,
            "avg_decoded_tokens_per_iter": None,
        }
        return {**self.head(), "choices": [part], "usage": usage}

    def logprobs(self, choice: Choice, token: int) -> object:
        return completion_logprobs(choice, token, token + 1)
