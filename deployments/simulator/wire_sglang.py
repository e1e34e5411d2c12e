"""SGLang's HTTP dialect. Shapes, order of fields and words are those of SGLang 0.5.23
(``sglang/srt/entrypoints/openai``, ``sglang/srt/managers/tokenizer_manager.py``)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, ClassVar

from pydantic import TypeAdapter, ValidationError

from app.core.dialect import Route
from deployments.simulator.chunks import (
    DONE,
    ChunkWriter,
    StreamWriter,
    chat_logprobs,
    completion_logprobs,
    event,
)
from deployments.simulator.generation import Choice, GeneratedReply
from deployments.simulator.messages import message_event
from deployments.simulator.observations import EngineState
from deployments.simulator.requests import (
    GenerationBody,
    InvalidBodyError,
    RefusedError,
)
from deployments.simulator.wire import Headers, Samples, Wire, base_card, prometheus

# FastAPI adds the place in the source that refused, and SGLang passes it on.
_PLACE = 'File "/opt/sglang/srt/entrypoints/http_server.py", line 1870, in openai_v1'
_PRIORITY = TypeAdapter[int | None](int | None)


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def _anthropic_error(error: RefusedError) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
    return {"type": kind, "message": error.message}


class SglangWire(Wire):
    """Unknown fields are dropped, errors outside a stream and outside ``/v1/responses`` are not
    wrapped, the priority of ``/v1/responses`` is dropped, and a client's leaving is noticed after
    some seconds. The port is open, and ``/ready`` 503, before the engine is ready."""

    headers_before_first_token: ClassVar[bool] = False
    refuses_in_band: ClassVar[bool] = True
    listens_before_ready: ClassVar[bool] = True
    whole_messages_usage: ClassVar[bool] = False
    detokenized: ClassVar[str] = "text"

    def priority(self, route: Route, values: Mapping[str, Any], headers: Headers) -> float:
        if route is Route.RESPONSES:
            return self.settings.unset_priority
        if route is Route.MESSAGES:
            # The class of its requests has no such field.
            values = {}
        try:
            priority = _PRIORITY.validate_python(values.get("priority"))
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False)[0]
            raise InvalidBodyError([{**found, "loc": ("body", "priority")}]) from None
        header = headers.get(b"x-override-priority", b"")
        if header.lstrip(b"-").isdigit():
            return int(header)
        return self.settings.unset_priority if priority is None else priority

    def check_model(self, route: Route, model: str | None) -> None:
        # Chat completions and completions answer to any name, and echo it.
        if route is Route.RESPONSES and model not in (None, self.served_name):
            message = f"The model '{model}' does not exist"
            raise RefusedError(404, message, "invalid_request_error", "model")

    def check_adapter(self, values: Mapping[str, Any]) -> None:
        name = values.get("lora_path")
        if name is not None and name not in self.adapters:
            message = (
                f"Got LoRA adapter that has never been loaded: {name}\nAll loaded adapters: "
                f"dict_keys({list(self.adapters)})."
            )
            raise RefusedError(400, message, "BadRequestError")

    def check_stream_options(self, route: Route, values: Mapping[str, Any]) -> None:
        """They are ignored where nothing is streamed."""

    def continuous_usage(self, body: GenerationBody) -> bool:
        # Here it does not depend on ``include_usage``.
        return bool(body.stream_options and body.stream_options.continuous_usage_stats)

    def check_length(self, prompt_tokens: int, limit: int | None, field: str) -> None:
        context = self.settings.context_length
        if prompt_tokens >= context:
            raise RefusedError(
                400,
                f"The input ({prompt_tokens} tokens) is longer than the model's context length "
                f"({context} tokens).",
                "BadRequestError",
            )
        if limit is not None and limit + prompt_tokens > context:
            raise RefusedError(
                400,
                "Requested token count exceeds the model's maximum context length of "
                f"{context} tokens. You requested a total of {limit + prompt_tokens} tokens: "
                f"{prompt_tokens} tokens from the input messages and {limit} tokens for the "
                "completion. Please reduce the number of tokens in the input messages or the "
                "completion to fit within the limit.",
                "BadRequestError",
            )

    def invalid(self, error: InvalidBodyError, route: Route) -> dict[str, Any]:
        found = [dict(problem) for problem in error.problems]
        counted = f"{len(found)} validation error{'s' if len(found) > 1 else ''}:"
        listed = "".join(f"\n  {problem}" for problem in found)
        message = f"{counted}{listed}\n\n  {_PLACE}\n    POST {route.path} {found}"
        return self.refused(RefusedError(400, message, HTTPStatus.BAD_REQUEST.phrase), route)

    def refused(self, error: RefusedError, route: Route | None) -> dict[str, Any]:
        flat = {
            "message": error.message,
            "type": error.kind,
            "param": error.param,
            "code": error.status,
        }
        if route is not None and route.is_anthropic:
            return {"type": "error", "error": _anthropic_error(error)}
        return {"error": flat} if route is Route.RESPONSES else {"object": "error", **flat}

    def message_error(self, error: RefusedError, *, begun: bool) -> bytes:
        start = {
            "id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "content": [],
            "model": self.served_name, "usage": {"input_tokens": 0, "output_tokens": 0},
        }  # fmt: skip
        events = b"" if begun else message_event("message_start", message=start)
        events += message_event("error", error=_anthropic_error(error))
        return events + message_event("message_stop")

    def busy(self) -> RefusedError:
        return RefusedError(503, "The request queue is full.", "SERVICE_UNAVAILABLE")

    def usage(self, prompt: int, completion: int, total: int, cached: int) -> dict[str, Any]:
        return {
            "prompt_tokens": prompt,
            "total_tokens": total,
            "completion_tokens": completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "reasoning_tokens": 0,
            "completion_tokens_details": None,
        }

    def chat(self, reply: GeneratedReply) -> dict[str, Any]:
        choices = [self._chat_choice(choice, reply) for choice in reply.choices]
        return self._answer(reply, "chat.completion", choices)

    def completion(self, reply: GeneratedReply) -> dict[str, Any]:
        choices = [
            {
                "index": choice.index,
                "text": choice.text,
                "logprobs": completion_logprobs(choice, 0, len(choice.tokens))
                if reply.wish.logprobs
                else None,
                "finish_reason": choice.finish_reason,
                "matched_stop": choice.stop,
            }
            for choice in reply.choices
        ]
        return self._answer(reply, "text_completion", choices)

    def _answer(
        self, reply: GeneratedReply, kind: str, choices: list[dict[str, Any]]
    ) -> dict[str, Any]:
        length = len(reply.choices[0].tokens)
        weights = {"version": "default", "start": 0, "end": length}
        return {
            "id": reply.id,
            "object": kind,
            "created": reply.created,
            "model": reply.model,
            "choices": choices,
            "usage": self.reply_usage(reply),
            "metadata": {"weight_version": "default", "weight_versions": [weights]},
        }

    def _chat_choice(self, choice: Choice, reply: GeneratedReply) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if choice.tool else choice.text,
            "reasoning_content": None,
        }
        if choice.tool:
            message["tool_calls"] = [sglang_tool_call(choice, choice.text)]
        top = reply.wish.top_logprobs
        return {
            "index": choice.index,
            "message": message,
            "logprobs": chat_logprobs(choice, 0, len(choice.tokens), top)
            if reply.wish.logprobs
            else None,
            "finish_reason": "tool_calls" if choice.tool else choice.finish_reason,
            "matched_stop": choice.stop,
        }

    def chat_stream(self, reply: GeneratedReply) -> StreamWriter:
        return _ChatWriter(reply, self)

    def completion_stream(self, reply: GeneratedReply) -> StreamWriter:
        return _CompletionWriter(reply, self)

    def embedding(
        self, id: str, created: int, model: str, vectors: Sequence[object], tokens: int
    ) -> dict[str, Any]:
        usage = {**self.usage(tokens, 0, tokens, 0), "prompt_tokens_details": None}
        data = [
            {"embedding": vector, "index": index, "object": "embedding"}
            for index, vector in enumerate(vectors)
        ]
        return {"data": data, "model": model, "object": "list", "usage": usage}

    def model_card(self, created: int) -> dict[str, Any]:
        return {
            **base_card(self, created),
            "root": self.served_name,
            "parent": None,
            "max_model_len": self.settings.context_length,
        }

    def metrics(self, state: EngineState) -> Mapping[str, bytes]:
        samples: Samples = {
            "sglang:num_running_reqs": ("gauge", state.running),
            "sglang:num_queue_reqs": ("gauge", state.waiting),
            "sglang:token_usage": ("gauge", state.usage),
            "sglang:num_retracted_requests_total": ("counter", state.preemptions),
            "sglang:prompt_tokens_total": ("counter", state.timings.prompt_tokens),
            "sglang:cached_tokens_total": ("counter", state.timings.cached_tokens),
            "sglang:queue_time_seconds": ("histogram", state.timings.queue),
            "sglang:time_to_first_token_seconds": ("histogram", state.timings.ttft),
        }
        labels = f'engine_type="unified",model_name="{self.served_name}",priority=""'
        return {"/metrics": prometheus(samples, labels)}


def sglang_tool_call(choice: Choice, arguments: str) -> dict[str, Any]:
    """Return a tool call, which here carries its index even outside a stream."""
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "index": 0,
        "type": "function",
        "function": {"name": choice.tool, "arguments": arguments},
    }


class _SglangWriter(ChunkWriter):
    kind: ClassVar[str]

    def __init__(self, reply: GeneratedReply, wire: Wire) -> None:
        super().__init__(reply)
        self.wire = wire

    def usage(self, prompt: int, completion: int, total: int) -> dict[str, Any]:
        return self.wire.usage(prompt, completion, total, self.reply.cached_tokens)

    def head(self, choice: Choice | None = None) -> dict[str, Any]:
        """Return the fields that a chunk begins with. Each choice has an id of its own."""
        reply = self.reply
        id_ = f"{reply.id}{choice.index}"[-len(reply.id) :] if choice and choice.index else reply.id
        head = {"id": id_, "object": self.kind, "created": reply.created}
        return {**head, "model": reply.model}

    def closing(self) -> bytes:
        if not self.reply.wish.include_usage:
            return DONE
        usage = self.wire.reply_usage(self.reply)
        return event({**self.head(), "choices": [], "usage": usage}) + DONE


class _ChatWriter(_SglangWriter):
    """The first chunk has the role, the last, without text, the reason of the end."""

    kind = "chat.completion.chunk"

    def opening(self) -> bytes:
        delta = {"reasoning_content": None, "role": "assistant", "content": ""}
        return b"".join(self._bare(choice, delta) for choice in self.reply.choices)

    def closing(self) -> bytes:
        ends = []
        for choice in self.reply.choices:
            reason = "tool_calls" if choice.tool else choice.finish_reason
            ends.append(self._bare(choice, {"reasoning_content": None}, reason))
        return b"".join(ends) + super().closing()

    def _bare(self, choice: Choice, delta: object, reason: str | None = None) -> bytes:
        part = self._part(choice, delta, None, reason)
        part["matched_stop"] = choice.stop if reason else None
        return event({**self.head(choice), "choices": [part]})

    def _part(
        self, choice: Choice, delta: object, logprobs: object, reason: str | None
    ) -> dict[str, Any]:
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
            "matched_stop": None,
        }

    def chunk(
        self, choice: Choice, text: str, final: bool, logprobs: object, usage: object
    ) -> dict[str, Any]:
        delta: dict[str, Any] = {"reasoning_content": None}
        if choice.tool:
            delta["tool_calls"] = [sglang_tool_call(choice, text)]
        else:
            delta["content"] = text
        chunk = {**self.head(choice), "choices": [self._part(choice, delta, logprobs, None)]}
        return chunk if usage is None else {**chunk, "usage": usage}

    def logprobs(self, choice: Choice, token: int) -> object:
        return chat_logprobs(choice, token, token + 1, self.reply.wish.top_logprobs)


class _CompletionWriter(_SglangWriter):
    kind = "text_completion"

    def usage(self, prompt: int, completion: int, total: int) -> dict[str, Any]:
        return {**super().usage(prompt, completion, total), "prompt_tokens_details": None}

    def chunk(
        self, choice: Choice, text: str, final: bool, logprobs: object, usage: object
    ) -> dict[str, Any]:
        part = {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason if final else None,
            "matched_stop": choice.stop if final else None,
        }
        return {**self.head(choice), "choices": [part], "usage": usage}

    def logprobs(self, choice: Choice, token: int) -> object:
        return completion_logprobs(choice, token, token + 1)
