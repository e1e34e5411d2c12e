"""vLLM's HTTP dialect. Shapes, order of fields and words are those of vLLM 0.32.0
(``vllm/entrypoints/openai``, ``vllm/entrypoints/serve``, ``vllm/renderers/params.py``)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, ClassVar

from pydantic import Field, TypeAdapter, ValidationError

from app.core.dialect import AUDIO_ROUTES, Route
from deployments.simulator import VERSION
from deployments.simulator.chunks import (
    DONE,
    ChunkWriter,
    StreamWriter,
    chat_logprobs,
    completion_logprobs,
    event,
    tool_call,
)
from deployments.simulator.generation import Choice, GeneratedReply
from deployments.simulator.messages import cache_writes
from deployments.simulator.observations import EngineState
from deployments.simulator.ranking import RANKING_ROUTES
from deployments.simulator.requests import (
    InvalidBodyError,
    RefusedError,
    problem,
)
from deployments.simulator.wire import Headers, Samples, Wire, base_card, prometheus

_INT64 = TypeAdapter[int](Annotated[int, Field(ge=-(2**63), le=2**63 - 1)])


class VllmWire(Wire):
    """Unknown fields are ignored, errors are wrapped, a lower priority goes first, the header
    ``X-Vllm-Priority`` overrides the body, and a client's leaving is noticed at once."""

    headers_before_first_token: ClassVar[bool] = True
    keeps_request_id: ClassVar[bool] = True
    echoes_service_tier: ClassVar[bool] = True
    routes: ClassVar[frozenset[Route]] = Wire.routes | RANKING_ROUTES | AUDIO_ROUTES

    def priority(self, route: Route, values: Mapping[str, Any], headers: Headers) -> float:
        if route is Route.MESSAGES:
            # The class of its requests has no such field.
            values = {}
        try:
            priority = _INT64.validate_python(values.get("priority", 0))
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False)[0]
            raise InvalidBodyError([{**found, "loc": ("body", "priority")}]) from None
        header = headers.get(b"x-vllm-priority", b"")
        if header and route.generates:
            try:
                return int(header)
            except ValueError:
                return priority
        return priority

    def check_model(self, route: Route, model: str | None) -> None:
        if model and model not in (self.served_name, *self.adapters):
            message = f"The model `{model}` does not exist. Valid aliases: {self.served_name}."
            raise RefusedError(404, message, "NotFoundError", "model")

    def check_stream_options(self, route: Route, values: Mapping[str, Any]) -> None:
        if values.get("stream_options") and not values.get("stream"):
            message = "Value error, Stream options can only be defined when `stream=True`."
            raise InvalidBodyError([problem("value_error", ("stream_options",), message)])

    def check_length(self, prompt_tokens: int, limit: int | None, field: str) -> None:
        context = self.settings.context_length
        if limit is not None and limit > context:
            message = f"{field}={limit} cannot be greater than max_model_len={context}."
            raise RefusedError(400, f"{message} Please request fewer output tokens.", param=field)
        if prompt_tokens > context:
            # vLLM cuts a prompt that is too long to one token too many before it counts.
            raise RefusedError(
                400,
                f"This model's maximum context length is {context} tokens. However, your prompt "
                f"contains at least {context + 1} input tokens, which exceeds this limit even "
                "without any output tokens. Please reduce the length of the input prompt.",
                param="input_tokens",
            )
        if prompt_tokens == context:
            raise RefusedError(
                400,
                f"The decoder prompt (length {prompt_tokens}) plus the number of requested output "
                "tokens (at least 1) is longer than the maximum model length of "
                f"{context}. Make sure that `max_model_len` is no smaller than the number of text "
                "tokens (prompt + requested output tokens).",
            )

    def answered_model(self, requested: str | None) -> str:
        if requested in self.adapters:
            return requested
        return self.served_name

    def invalid(self, error: InvalidBodyError, route: Route) -> dict[str, Any]:
        count = len(error.problems)
        lines = [f"{count} validation error{'s' if count > 1 else ''}:"]
        for found in error.problems[:10]:
            place = ".".join(map(str, found["loc"]))
            lines.append(f"  { {**found, 'loc': place} }")
        first = error.problems[0]
        param = str(first["loc"][-1]) if first["type"] == "value_error" else place_of(first)
        refusal = RefusedError(400, "\n".join(lines), HTTPStatus.BAD_REQUEST.phrase, param)
        return self.refused(refusal, route)

    def message_id(self, request_id: str) -> str:
        return f"chatcmpl-{request_id}"

    def refused(self, error: RefusedError, route: Route | None) -> dict[str, Any]:
        if route is not None and route.is_anthropic:
            return {"type": "error", "error": {"type": error.kind, "message": error.message}}
        return {
            "error": {
                "message": error.message,
                "type": error.kind,
                "param": error.param,
                "code": error.status,
            }
        }

    def refused_event(self, error: RefusedError) -> bytes:
        return event(self.refused(error, None))

    def usage(self, prompt: int, completion: int, total: int, cached: int) -> dict[str, Any]:
        return {
            "prompt_tokens": prompt,
            "total_tokens": total,
            "completion_tokens": completion,
            "prompt_tokens_details": {
                "cached_tokens": cached,
                "created_cache_tokens": None,
                "multimodal_tokens": None,
            },
            "completion_tokens_details": None,
        }

    def chat(self, reply: GeneratedReply) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{reply.id}",
            "object": "chat.completion",
            "created": reply.created,
            "model": reply.model,
            "choices": [self._chat_choice(choice, reply) for choice in reply.choices],
            "service_tier": None,
            "system_fingerprint": VERSION,
            "usage": _with_cache_writes(self.reply_usage(reply)),
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "prompt_text": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def _chat_choice(self, choice: Choice, reply: GeneratedReply) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "" if choice.tool else choice.text,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
        }
        if choice.tool:
            message["tool_calls"] = [tool_call(choice)]
        top = reply.wish.top_logprobs
        return {
            "index": choice.index,
            "message": {**message, "reasoning": None},
            "logprobs": chat_logprobs(choice, 0, len(choice.tokens), top)
            if reply.wish.logprobs
            else None,
            "finish_reason": finish_reason(choice),
            "stop_reason": choice.stop,
            "token_ids": None,
            "routed_experts": None,
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
                    "logprobs": completion_logprobs(choice, 0, len(choice.tokens))
                    if reply.wish.logprobs
                    else None,
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop,
                    "token_ids": None,
                    "prompt_logprobs": None,
                    "prompt_token_ids": None,
                    "routed_experts": None,
                }
                for choice in reply.choices
            ],
            "service_tier": None,
            "system_fingerprint": VERSION,
            "usage": self.reply_usage(reply),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def chat_stream(self, reply: GeneratedReply) -> StreamWriter:
        return _ChatWriter(reply)

    def completion_stream(self, reply: GeneratedReply) -> StreamWriter:
        return _CompletionWriter(reply)

    def embedding(
        self, id: str, created: int, model: str, vectors: Sequence[object], tokens: int
    ) -> dict[str, Any]:
        usage = {**self.usage(tokens, 0, tokens, 0), "prompt_tokens_details": None}
        data = [
            {"index": index, "object": "embedding", "embedding": vector}
            for index, vector in enumerate(vectors)
        ]
        head = {"id": f"embd-{id}", "object": "list", "created": created, "model": model}
        return {**head, "data": data, "usage": usage}

    def model_card(self, created: int) -> dict[str, Any]:
        return {
            **base_card(self, created),
            "root": self.model,
            "parent": None,
            "max_model_len": self.settings.context_length,
            "permission": [_permission(created)],
        }

    def metrics(self, state: EngineState) -> Mapping[str, bytes]:
        samples: Samples = {
            "vllm:num_requests_running": ("gauge", state.running),
            "vllm:num_requests_waiting": ("gauge", state.waiting),
            "vllm:kv_cache_usage_perc": ("gauge", state.usage),
            "vllm:num_preemptions_total": ("counter", state.preemptions),
            "vllm:prefix_cache_queries_total": ("counter", state.timings.prompt_tokens),
            "vllm:prefix_cache_hits_total": ("counter", state.timings.cached_tokens),
            "vllm:request_queue_time_seconds": ("histogram", state.timings.queue),
            "vllm:time_to_first_token_seconds": ("histogram", state.timings.ttft),
        }
        return {"/metrics": prometheus(samples, f'engine="0",model_name="{self.served_name}"')}


def _with_cache_writes(usage: dict[str, Any]) -> dict[str, Any]:
    """Return the usage of a chat with the tokens that were written to the prefix cache."""
    details = usage["prompt_tokens_details"]
    written = cache_writes(usage["prompt_tokens"], details["cached_tokens"])
    return {**usage, "prompt_tokens_details": {**details, "created_cache_tokens": written}}


def place_of(found: Mapping[str, Any]) -> str:
    """Return where in the body a problem is, as vLLM writes it."""
    return ".".join(map(str, found["loc"]))


def _permission(created: int) -> dict[str, Any]:
    return {
        "id": f"modelperm-{uuid.uuid4().hex}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }


def finish_reason(choice: Choice) -> str:
    """Return why a chat choice ended: a function forced by name ends with ``stop``, one that was
    required with ``tool_calls``."""
    return "tool_calls" if choice.tool and choice.tool_required else choice.finish_reason


class _VllmWriter(ChunkWriter):
    prefix: ClassVar[str]
    kind: ClassVar[str]

    def head(self) -> dict[str, Any]:
        """Return the fields that a chunk begins with."""
        reply = self.reply
        name = f"{self.prefix}-{reply.id}"
        return {
            "id": name,
            "object": self.kind,
            "created": reply.created,
            "model": reply.model,
        }

    def closing(self) -> bytes:
        if not self.reply.wish.include_usage:
            return DONE
        prompt, completion = self.reply.prompt_tokens, self.reply.completion_tokens
        usage = {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": {"cached_tokens": self.reply.cached_tokens},
        }
        if self.kind == _ChatWriter.kind:
            usage = _with_cache_writes(usage)
        last = {**self.head(), "choices": [], "usage": usage, "system_fingerprint": VERSION}
        return event(last) + DONE

    def finish(self, chunk: dict[str, Any], final: bool, usage: object) -> dict[str, Any]:
        """Add to a chunk what stands behind its choices."""
        if usage is not None:
            chunk["usage"] = usage
        if final and not self.reply.wish.include_usage:
            chunk["system_fingerprint"] = VERSION
        return chunk


class _ChatWriter(_VllmWriter):
    prefix = "chatcmpl"
    kind = "chat.completion.chunk"

    def usage(self, prompt: int, completion: int, total: int) -> dict[str, Any]:
        return {
            "prompt_tokens": prompt,
            "total_tokens": total,
            "completion_tokens": completion,
            "completion_tokens_details": None,
        }

    def opening(self) -> bytes:
        delta = {"role": "assistant", "content": ""}
        chunks = []
        for choice in self.reply.choices:
            part = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
            chunk: dict[str, Any] = {**self.head(), "choices": [part]}
            if self.reply.wish.continuous_usage:
                prompt = choice.prompt_tokens
                chunk["usage"] = self.usage(prompt, 0, prompt)
            chunks.append(event({**chunk, "prompt_token_ids": None, "prompt_text": None}))
        return b"".join(chunks)

    def chunk(
        self, choice: Choice, text: str, final: bool, logprobs: object, usage: object
    ) -> dict[str, Any]:
        part: dict[str, Any] = {"index": choice.index, "delta": {"content": text}}
        if choice.tool:
            call = tool_call(choice)
            function = {"name": choice.tool, "arguments": text}
            call = {"id": call["id"], "type": "function", "index": 0, "function": function}
            part["delta"] = {"tool_calls": [call]}
        part["logprobs"] = logprobs
        part["finish_reason"] = finish_reason(choice) if final else None
        if final:
            part["stop_reason"] = choice.stop
        part["token_ids"] = None
        return self.finish({**self.head(), "choices": [part]}, final, usage)

    def logprobs(self, choice: Choice, token: int) -> object:
        return chat_logprobs(choice, token, token + 1, self.reply.wish.top_logprobs)


class _CompletionWriter(_VllmWriter):
    prefix = "cmpl"
    kind = "text_completion"

    def usage(self, prompt: int, completion: int, total: int) -> dict[str, Any]:
        return {"prompt_tokens": prompt, "total_tokens": total, "completion_tokens": completion}

    def chunk(
        self, choice: Choice, text: str, final: bool, logprobs: object, usage: object
    ) -> dict[str, Any]:
        part = {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason if final else None,
            "stop_reason": choice.stop if final else None,
            "prompt_token_ids": None,
            "token_ids": None,
        }
        return self.finish({**self.head(), "choices": [part]}, final, usage)

    def logprobs(self, choice: Choice, token: int) -> object:
        return completion_logprobs(choice, token, token + 1)
