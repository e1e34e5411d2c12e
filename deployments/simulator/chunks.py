"""Streams: chunks that are encoded once and filled in for each token. Pure."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final

import orjson

from deployments.simulator.generation import Choice, GeneratedReply

DONE: Final = b"data: [DONE]\n\n"
TOKEN_LOGPROB: Final = -0.125
"""The log probability of every token; a power of two, so that sums of it are exact."""

# Placeholders for a token's text and counts in a template; they occur nowhere else.
_TEXT: Final = uuid.uuid4().hex
_TOTAL: Final = 7_034_911_204_588_801
_COMPLETION: Final = 7_034_911_204_588_802


def event(value: object) -> bytes:
    """Return an event whose data is the JSON of a value."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def escape(text: str) -> bytes:
    """Return a text as encoded inside a JSON string."""
    return orjson.dumps(text)[1:-1]


class ChunkTemplate:
    """A chunk that is encoded once; only its text and counts change with each token."""

    def __init__(self, chunk: Mapping[str, Any], end: bytes = b"\n\n") -> None:
        data = b"data: " + orjson.dumps(chunk) + end
        data = data.replace(b"%", b"%%").replace(_TEXT.encode(), b"%b", 1)
        total, completion = b"%d" % _TOTAL, b"%d" % _COMPLETION
        self._counted = total in data
        self._format = data.replace(total, b"%d", 1).replace(completion, b"%d", 1)

    def fill(self, text: bytes, completion: int, total: int) -> bytes:
        """Return the chunk. Every engine writes the total before the completion's count."""
        if self._counted:
            return self._format % (text, total, completion)
        return self._format % text


class StreamWriter(ABC):
    """Writes one reply as a stream: its greeting, its opening, its tokens, its closing."""

    def __init__(self, reply: GeneratedReply) -> None:
        self.reply = reply

    def greeting(self) -> bytes:
        """Return what is sent at once, before the request has a slot."""
        return b""

    def opening(self) -> bytes:
        """Return what comes together with the first token."""
        return b""

    @abstractmethod
    def tokens(self, first: int, last: int) -> bytes:
        """Return the chunks of the tokens from ``first`` up to, not including, ``last``, of all
        choices."""

    def closing(self) -> bytes:
        """Return what comes after the last token of a stream that went well."""
        return DONE


class ChunkWriter(StreamWriter):
    """A stream of chunks: chat completions and completions."""

    def __init__(self, reply: GeneratedReply) -> None:
        super().__init__(reply)
        self._templates: dict[tuple[int, bool], ChunkTemplate] = {}

    @abstractmethod
    def chunk(
        self, choice: Choice, text: str, final: bool, logprobs: object, usage: object
    ) -> dict[str, Any]:
        """Return the chunk of one token; ``usage`` is ``None`` where none was asked for."""

    @abstractmethod
    def logprobs(self, choice: Choice, token: int) -> object:
        """Return a token's log probabilities, in the form of this route."""

    @abstractmethod
    def usage(self, prompt: int, completion: int, total: int) -> dict[str, Any]:
        """Return the usage that a chunk carries when it was asked for on every chunk."""

    def tokens(self, first: int, last: int) -> bytes:
        written = []
        for token in range(first, last):
            for choice in self.reply.choices:
                if token < len(choice.tokens):
                    written.append(self._token(choice, token))
        return b"".join(written)

    def _token(self, choice: Choice, token: int) -> bytes:
        text, count = choice.tokens[token], token + 1
        final = count == len(choice.tokens)
        total = choice.prompt_tokens + count
        if self.reply.wish.logprobs:
            logprobs = self.logprobs(choice, token)
            usage = self._asked_usage(choice, count, total)
            return event(self.chunk(choice, text, final, logprobs, usage))
        template = self._templates.get((choice.index, final))
        if template is None:
            usage = self._asked_usage(choice, _COMPLETION, _TOTAL)
            template = ChunkTemplate(self.chunk(choice, _TEXT, final, None, usage))
            self._templates[choice.index, final] = template
        return template.fill(escape(text), count, total)

    def _asked_usage(self, choice: Choice, completion: int, total: int) -> dict[str, Any] | None:
        if not self.reply.wish.continuous_usage:
            return None
        return self.usage(choice.prompt_tokens, completion, total)


def chat_logprobs(choice: Choice, first: int, last: int, top: int) -> dict[str, Any]:
    """Return the log probabilities of a choice's tokens, as chat completions have them."""
    content = []
    for token in choice.tokens[first:last]:
        entry = {"token": token, "logprob": TOKEN_LOGPROB, "bytes": list(token.encode())}
        others = [
            {"token": other, "logprob": TOKEN_LOGPROB - rank, "bytes": list(other.encode())}
            for rank in range(1, top)
            for other in [f"{token}{rank}"]
        ]
        content.append({**entry, "top_logprobs": [entry, *others] if top else []})
    return {"content": content}


def completion_logprobs(choice: Choice, first: int, last: int) -> dict[str, Any]:
    """Return the log probabilities of a choice's tokens, as completions have them."""
    tokens = choice.tokens[first:last]
    offset = sum(map(len, choice.tokens[:first]))
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "text_offset": offsets,
        "token_logprobs": [TOKEN_LOGPROB] * len(tokens),
        "tokens": tokens,
        "top_logprobs": [{token: TOKEN_LOGPROB} for token in tokens],
    }


def tool_call(choice: Choice) -> dict[str, Any]:
    """Return a call of the function that the choice must call."""
    return {
        "id": f"chatcmpl-tool-{uuid.uuid4().hex}",
        "type": "function",
        "function": {"name": choice.tool, "arguments": choice.text},
    }
