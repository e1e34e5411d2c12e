"""A mock engine for measuring gateways: it answers as vLLM does on the wire, as fast as Python can.

    python scripts/bench/mock_engine.py --port 9000

It computes nothing, and every answer is the same. A request streams where it asks for that; it has
``max_tokens`` tokens, all of them written at once, or one every 10 ms where the prompt says
``PACED``. In place of the simulated engine's interpreter (a pool's ``python``) the script
``mock_python`` runs it, so that it stands behind Frontline as the simulated engine does: it takes
that engine's arguments and answers its questions.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Final, cast

import httptools
import orjson
import uvloop

from deployments.simulator import KEY_VARIABLE

PACED: Final = re.compile(rb"paced at (\d+) ms|paced")
"""In a prompt: one token in so many milliseconds, or every 10 ms."""
PACE_S: Final = 0.01
PROMPT_TOKENS: Final = 42
VERSION: Final = "mock-1"

_TOKENS = re.compile(rb'"max_tokens":\s*(\d+)')
_STREAM = re.compile(rb'"stream":\s*true')
_CONTINUOUS = re.compile(rb'"continuous_usage_stats":\s*true')
_USAGE = re.compile(rb'"include_usage":\s*true')
_HEAD: Final = b"HTTP/1.1 %b\r\ncontent-type: %b\r\n%b\r\n"
_EVENTS: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_END: Final = b"0\r\n\r\n"


def _usage(generated: int) -> dict[str, Any]:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "total_tokens": PROMPT_TOKENS + generated,
        "completion_tokens": generated,
        "prompt_tokens_details": {"cached_tokens": 16},
    }


def _chunk(choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
    chunk = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1790000000,
        "model": "mock",
        "choices": choices,
    }
    return chunk if usage is None else chunk | {"usage": usage}


def _choice(delta: dict[str, Any], finish: str | None = None) -> list[dict[str, Any]]:
    return [
        {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, "token_ids": None}
    ]


def _chunks(tokens: int, usage: bool, continuous: bool) -> Iterator[dict[str, Any]]:
    def told(generated: int) -> dict[str, Any] | None:
        return _usage(generated) if continuous else None

    yield _chunk(_choice({"role": "assistant", "content": ""}), told(0))
    for number in range(1, tokens):
        yield _chunk(_choice({"content": f" word{number % 10}"}), told(number))
    yield _chunk(_choice({"content": "."}, "length"), told(tokens))
    if usage:
        yield _chunk([], _usage(tokens))


@lru_cache(16)
def _events(tokens: int, usage: bool, continuous: bool) -> tuple[bytes, ...]:
    """Every event of a stream as it goes over the wire, a chunk of HTTP each."""
    data = [orjson.dumps(chunk) for chunk in _chunks(tokens, usage, continuous)]
    events = [b"data: " + each + b"\n\n" for each in [*data, b"[DONE]"]]
    return tuple(b"%x\r\n%b\r\n" % (len(event), event) for event in events)


def _answer(status: bytes, body: bytes, kind: bytes = b"application/json") -> bytes:
    return _HEAD % (status, kind, b"content-length: %d\r\n" % len(body)) + body


def _completion() -> bytes:
    message = {"role": "assistant", "content": "The sea is wide and deep and full of fish."}
    return orjson.dumps(
        {
            "id": "chatcmpl-0123456789abcdef0123456789abcdef",
            "object": "chat.completion",
            "created": 1790000000,
            "model": "mock",
            "choices": [
                {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
            ],
            "usage": _usage(12),
        }
    )


class Connection(asyncio.Protocol):
    """One connection, whose requests come one after the other."""

    def __init__(self, answers: dict[bytes, Callable[[bool], bytes]], key: bytes | None) -> None:
        self._answers = answers
        self._authorization = None if key is None else b"Bearer " + key
        self._unary = _answer(b"200 OK", _completion())
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._url, self._body, self._authorized = b"", [b""], key is None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    # What the parser calls

    def on_message_begin(self) -> None:
        self._body = []
        self._authorized = self._authorization is None

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        if value == self._authorization and name.lower() == b"authorization":
            self._authorized = True
        elif name.lower() == b"expect":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, piece: bytes) -> None:
        self._body.append(piece)

    def on_message_complete(self) -> None:
        answer = self._answers.get(self._url)
        if answer is not None:
            self._transport.write(answer(self._authorized))
        elif not self._authorized:
            self._transport.write(_answer(b"401 Unauthorized", b"{}"))
        else:
            self._generate(b"".join(self._body))

    def _generate(self, body: bytes) -> None:
        if _STREAM.search(body) is None:
            self._transport.write(self._unary)
            return
        tokens = _TOKENS.search(body)
        usage, continuous = _USAGE.search(body), _CONTINUOUS.search(body)
        events = _events(int(tokens[1]) if tokens else 128, usage is not None, bool(continuous))
        if paced := PACED.search(body):
            self._transport.write(_EVENTS)
            pace_s = int(paced[1]) / 1000 if paced[1] else PACE_S
            self._step(events, 0, self._loop.time(), pace_s)
        else:
            self._transport.write(b"".join((_EVENTS, *events, _END)))

    def _step(self, events: tuple[bytes, ...], number: int, due: float, pace_s: float) -> None:
        self._transport.write(events[number])
        if number + 1 < len(events):
            due += pace_s
            self._timer = self._loop.call_at(due, self._step, events, number + 1, due, pace_s)
        else:
            self._transport.write(_END)


def side_routes(model: str) -> dict[bytes, Callable[[bool], bytes]]:
    """What is asked beside completions: by Frontline of a simulated engine, by routers of any."""
    report = {
        "simulated": True,
        "version": VERSION,
        "dialect": "vllm",
        "policy": "priority",
        "lower_goes_first": True,
        "preempts": False,
        "context_length": 4_000_000,
        "slots": None,
        "settings": {
            "lacking_fields": [],
            "embedding_dimensions": 0,
            "transcribes": False,
            "kv_tokens": None,
        },
    }
    card = {"id": model, "object": "model", "created": 1790000000, "owned_by": "mock"}
    models = _answer(b"200 OK", orjson.dumps({"object": "list", "data": [card]}))
    info = _answer(b"200 OK", orjson.dumps({"model_path": model, "is_generation": True}))
    refused = _answer(b"401 Unauthorized", b"{}")
    fine = _answer(b"200 OK", b"{}")
    guarded = {b"/simulate": _answer(b"200 OK", orjson.dumps(report)), b"/v1/models": models}
    open_to_all = {b"/health": fine, b"/health_generate": fine, b"/ready": fine}
    open_to_all |= {path: info for path in (b"/get_model_info", b"/model_info")}
    open_to_all |= {path: info for path in (b"/get_server_info", b"/server_info", b"/version")}
    routes: dict[bytes, Callable[[bool], bytes]] = {
        path: lambda authorized, answer=answer: answer if authorized else refused  # type: ignore[misc]
        for path, answer in guarded.items()
    }
    return routes | {path: lambda _, answer=a: answer for path, a in open_to_all.items()}


async def _serve(host: str, port: int, model: str, key: str | None) -> None:
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopped.set)
    routes, secret = side_routes(model), key.encode() if key else None
    server = await loop.create_server(
        lambda: Connection(routes, secret), host, port, reuse_port=True, backlog=4096
    )
    await stopped.wait()
    server.close()


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-name", default="mock")
    options, _ = parser.parse_known_args()
    key = os.environ.get(KEY_VARIABLE)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(options.host, options.port, options.served_name, key))


if __name__ == "__main__":
    main()
