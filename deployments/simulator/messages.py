"""Anthropic's messages: requests, answers and events, in the shapes of vLLM 0.32.0
(``vllm/entrypoints/anthropic``) and SGLang 0.5.23 (``sglang/srt/entrypoints/anthropic``)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import BaseModel, Field

from deployments.simulator.chunks import StreamWriter, escape
from deployments.simulator.generation import Choice, GeneratedReply
from deployments.simulator.language import minimal_json
from deployments.simulator.requests import (
    Body,
    InvalidBodyError,
    Prompt,
    Wish,
    chat_prompt,
    problem,
)

_BLOCK = 16
"""The tokens of a block of vLLM's prefix cache."""


class AnthropicTool(BaseModel):
    """A tool that the client runs."""

    name: str
    input_schema: dict[str, Any] = {}


class CountTokensBody(Body):
    """``POST /v1/messages/count_tokens``."""

    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[AnthropicTool] | None = None

    def prompt(self) -> Prompt:
        """Return the prompt, without a chat template."""
        return chat_prompt([{"content": self.system}, *self.messages])


class TokenizeBody(Body):
    """``POST /v1/tokenize``, vLLM's and SGLang's."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None

    def parts(self) -> Prompt:
        """Return the prompt."""
        return chat_prompt(self.messages) if self.messages else Prompt.of(self.prompt or "")


class DetokenizeBody(Body):
    """``POST /v1/detokenize``."""

    tokens: list[int]


class MessagesBody(CountTokensBody):
    """``POST /v1/messages``."""

    max_tokens: int = Field(gt=0)
    stop_sequences: list[str] | None = None
    stream: bool | None = False
    temperature: float | None = None
    tool_choice: dict[str, Any] | None = None

    def wish(self, prompt: Prompt) -> Wish:
        """Return what the request asks for.

        Raises:
            InvalidBodyError: it forces a tool that it does not bring.
        """
        wish = Wish(
            [prompt],
            limit=self.max_tokens,
            stops=self.stop_sequences or (),
            stream=bool(self.stream),
        )
        if tool := self._forced():
            wish.tool = tool.name
            wish.tool_arguments = orjson.dumps(minimal_json(tool.input_schema)).decode()
        return wish

    def _forced(self) -> AnthropicTool | None:
        choice = self.tool_choice or {}
        if choice.get("type") not in ("any", "tool"):
            return None
        for tool in self.tools or []:
            if choice["type"] == "any" or choice.get("name") == tool.name:
                return tool
        found = problem("value_error", ("tool_choice",), "Value error, no such tool", choice)
        raise InvalidBodyError([found])


class MessagesAnswer:
    """The message of one reply.

    Args:
        reply: what was generated.
        whole_usage: whether the end of a stream tells the prompt's tokens again, as vLLM's does;
            SGLang's beginning tells what was cached, and its end the answer's tokens alone.
    """

    def __init__(self, reply: GeneratedReply, *, whole_usage: bool) -> None:
        self.reply, self.whole_usage = reply, whole_usage
        self.choice: Choice = reply.choices[0]

    def message(self, content: list[Any], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return the message with this content, before its end."""
        return {
            "id": self.reply.id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self.reply.model,
            "usage": usage,
        }

    def finished(self) -> dict[str, Any]:
        """Return the whole message."""
        choice = self.choice
        block: dict[str, Any] = {"type": "text", "text": choice.text}
        if choice.tool:
            block = self.tool_block() | {"input": orjson.loads(choice.text)}
        return self.message([block], self.usage()) | self.stop()

    def tool_block(self) -> dict[str, Any]:
        """Return the block of the tool's call, before its input is known."""
        name = f"toolu_{uuid.uuid4().hex}"
        return {"type": "tool_use", "id": name, "name": self.choice.tool, "input": {}}

    def stop(self) -> dict[str, Any]:
        """Return why the message ended."""
        choice = self.choice
        if choice.tool:
            return {"stop_reason": "tool_use"}
        if choice.finish_reason == "length":
            return {"stop_reason": "max_tokens"}
        if choice.stop is not None and self.whole_usage:
            return {"stop_reason": "stop_sequence", "stop_sequence": choice.stop}
        return {"stop_reason": "end_turn"}

    def usage(self) -> dict[str, Any]:
        """Return the usage of the whole message."""
        return self._prompt() | {"output_tokens": self.reply.completion_tokens}

    def begun(self) -> dict[str, Any]:
        """Return the usage at the beginning of a stream."""
        if self.whole_usage:
            return {"input_tokens": self.reply.prompt_tokens, "output_tokens": 0}
        return self._prompt() | {"output_tokens": 0}

    def ended(self) -> dict[str, Any]:
        """Return the usage at the end of a stream."""
        return self.usage() if self.whole_usage else {"output_tokens": self.reply.completion_tokens}

    def _prompt(self) -> dict[str, Any]:
        cached = self.reply.cached_tokens
        fields = {"input_tokens": self.reply.prompt_tokens - cached}
        if cached or self.whole_usage:
            fields["cache_read_input_tokens"] = cached
        if self.whole_usage:
            written = cache_writes(self.reply.prompt_tokens, cached)
            fields["cache_creation_input_tokens"] = written
            fields["input_tokens"] -= written
        return fields


def cache_writes(prompt: int, cached: int) -> int:
    """Return how many tokens of a prompt vLLM writes to its prefix cache, in whole blocks."""
    return max(prompt // _BLOCK * _BLOCK - cached, 0)


def message_event(kind: str, **fields: object) -> bytes:
    """Return one event of a stream."""
    data = orjson.dumps({"type": kind, **fields})
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


class MessagesWriter(StreamWriter):
    """The events of a message with one block."""

    def __init__(self, answer: MessagesAnswer) -> None:
        super().__init__(answer.reply)
        self.answer = answer

    def opening(self) -> bytes:
        answer = self.answer
        start = {**answer.message([], answer.begun()), "stop_reason": None, "stop_sequence": None}
        block: dict[str, Any] = {"type": "text", "text": ""}
        if answer.choice.tool:
            block = answer.tool_block()
        events = message_event("message_start", message=start)
        return events + message_event("content_block_start", index=0, content_block=block)

    def tokens(self, first: int, last: int) -> bytes:
        tool = self.answer.choice.tool
        kind, name = ("input_json_delta", "partial_json") if tool else ("text_delta", "text")
        head = (
            b"event: content_block_delta\n"
            b'data: {"type":"content_block_delta","index":0,"delta":{"type":"%b","%b":"'
        ) % (kind.encode(), name.encode())
        tokens = self.answer.choice.tokens[first:last]
        return b"".join(head + escape(token) + b'"}}\n\n' for token in tokens)

    def closing(self) -> bytes:
        answer = self.answer
        stop = {"stop_reason": None, "stop_sequence": None} | answer.stop()
        events = message_event("content_block_stop", index=0)
        events += message_event("message_delta", delta=stop, usage=answer.ended())
        return events + message_event("message_stop")
