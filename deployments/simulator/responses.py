"""The Responses route: its object and its events, in the shapes of vLLM 0.32.0
(``vllm/entrypoints/openai/responses``). The other dialects answer in the same shapes, but without
``service_tier``, which they do not echo."""

from __future__ import annotations

import uuid
from typing import Any

import orjson

from deployments.simulator.chunks import StreamWriter, escape
from deployments.simulator.generation import Choice, GeneratedReply
from deployments.simulator.requests import ResponsesBody


class ResponsesAnswer:
    """The response object of one reply, at the start of its making and at the end."""

    def __init__(
        self, reply: GeneratedReply, body: ResponsesBody, echo_tier: bool, room: int
    ) -> None:
        self.reply, self.body, self.echo_tier = reply, body, echo_tier
        self.choice = reply.choices[0]
        self.limit = body.max_output_tokens or room
        kind = "fc" if self.choice.tool else "msg"
        self.item_id = f"{kind}_{uuid.uuid4().hex}"
        self.call_id = f"chatcmpl-tool-{uuid.uuid4().hex}"

    def begun(self) -> dict[str, Any]:
        """Return the response as it is before its first token."""
        return self._response("in_progress", [], None)

    def finished(self) -> dict[str, Any]:
        """Return the response as it is after its last token."""
        status = "incomplete" if self.choice.finish_reason == "length" else "completed"
        return self._response(status, [self.item("completed")], self._usage())

    def item(self, status: str) -> dict[str, Any]:
        """Return the one output item, empty while it is ``in_progress``."""
        done = status == "completed"
        if self.choice.tool:
            return {
                "arguments": self.choice.text if done else "",
                "call_id": self.call_id,
                "name": self.choice.tool,
                "type": "function_call",
                "id": self.item_id,
                "namespace": None,
                "status": status,
            }
        return {
            "id": self.item_id,
            "content": [text_part(self.choice, done=True)] if done else [],
            "role": "assistant",
            "status": status,
            "type": "message",
            "phase": None,
        }

    def _usage(self) -> dict[str, Any]:
        reply = self.reply
        return {
            "input_tokens": reply.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": reply.cached_tokens,
                "cache_write_tokens": 0,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": reply.completion_tokens,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        }

    def _response(self, status: str, output: list[Any], usage: object) -> dict[str, Any]:
        body = self.body
        response = {
            "id": self.reply.id,
            "created_at": self.reply.created,
            "incomplete_details": {"reason": "max_output_tokens"}
            if status == "incomplete"
            else None,
            "instructions": body.instructions,
            "metadata": body.metadata,
            "model": self.reply.model,
            "object": "response",
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "tool_choice": body.tool_choice if body.tools else "none",
            "tools": body.tools,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "background": False,
            "max_output_tokens": self.limit,
            "max_tool_calls": None,
            "previous_response_id": body.previous_response_id,
            "prompt": None,
            "reasoning": body.reasoning,
            "service_tier": body.service_tier,
            "status": status,
            "text": body.text,
            "top_logprobs": None,
            "truncation": body.truncation,
            "usage": usage,
            "user": body.user,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "input_messages": None,
            "output_messages": None,
        }
        if not self.echo_tier:
            del response["service_tier"]
        return response


def text_part(choice: Choice, *, done: bool) -> dict[str, Any]:
    """Return the content of a message, empty before it is ``done``."""
    text = choice.text if done else ""
    logprobs: list[object] | None = None if done else []
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": logprobs}


class ResponsesWriter(StreamWriter):
    """The events of a response. vLLM ends them with ``response.completed``, without ``[DONE]``,
    also where the answer was cut at its limit."""

    def __init__(self, answer: ResponsesAnswer) -> None:
        super().__init__(answer.reply)
        self.answer = answer
        self._sequence = 0
        self._place = {"item_id": answer.item_id, "output_index": 0}

    def _event(self, kind: str, **fields: object) -> bytes:
        # The fields of OpenAI's own event classes stand in alphabetical order.
        fields |= {"sequence_number": self._sequence, "type": kind}
        self._sequence += 1
        data = orjson.dumps(dict(sorted(fields.items())))
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)

    def greeting(self) -> bytes:
        begun = self.answer.begun()
        events = self._event("response.created", response=begun)
        return events + self._event("response.in_progress", response=begun)

    def opening(self) -> bytes:
        item = self.answer.item("in_progress")
        events = self._event("response.output_item.added", item=item, output_index=0)
        if self.answer.choice.tool:
            return events
        part = text_part(self.answer.choice, done=False)
        return events + self._content("response.content_part.added", part=part)

    def tokens(self, first: int, last: int) -> bytes:
        tokens = self.answer.choice.tokens[first:last]
        if self.answer.choice.tool:
            return b"".join(self._arguments(token) for token in tokens)
        return b"".join(self._delta(token) for token in tokens)

    def _delta(self, token: str) -> bytes:
        self._sequence += 1
        return (
            b"event: response.output_text.delta\n"
            b'data: {"content_index":0,"delta":"%b","item_id":"%b","logprobs":[],"output_index":0,'
            b'"sequence_number":%d,"type":"response.output_text.delta"}\n\n'
        ) % (escape(token), self.answer.item_id.encode(), self._sequence - 1)

    def _arguments(self, token: str) -> bytes:
        return self._event("response.function_call_arguments.delta", delta=token, **self._place)

    def closing(self) -> bytes:
        choice, item = self.answer.choice, self.answer.item("completed")
        if choice.tool:
            kind = "response.function_call_arguments.done"
            events = self._event(kind, arguments=choice.text, name=choice.tool, **self._place)
        else:
            part = text_part(choice, done=True)
            kind = "response.output_text.done"
            events = self._content(kind, text=choice.text, logprobs=[])
            events += self._content("response.content_part.done", part=part)
        events += self._event("response.output_item.done", item=item, output_index=0)
        return events + self._event("response.completed", response=self.answer.finished())

    def _content(self, kind: str, **fields: object) -> bytes:
        return self._event(kind, content_index=0, **self._place, **fields)
