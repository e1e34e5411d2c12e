"""Starts SGLang's server with the guard around it: ``python -m frontline_sglang ARGUMENTS``.

Runs under the engine's interpreter, where Frontline is not installed.

SGLang has no option for a middleware, but its application is a public name of a module. Where
several of its processes serve HTTP, they import the application from the module that
``SGLANG_HTTP_SERVER_APP_PATH`` names, which is this one.

With each answer it tells how often the request was suspended (``frontline_tally``). SGLang reports
that with each output of a request, and shows it to clients of some routes only.

On one machine SGLang's processes rendezvous through a file in memory and communicate over loopback.
The default is torch's TCP store, which listens on every address and requires no key.
"""

from __future__ import annotations

import inspect
import logging
import os
import runpy
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from functools import cache
from typing import Any

import frontline_guard
import frontline_tally
from frontline_guard import Application, Receive, Scope, Send
from sglang.srt.entrypoints.http_server import app

logger = logging.getLogger("sglang.frontline")

MEETING_PLACE = "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"


class Guard(frontline_guard.Guard):
    """The guard around SGLang's application."""

    def __init__(self, app: Application) -> None:
        super().__init__(app)
        self._tallies = _count_preemptions()

    async def admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._tallies:
            send = frontline_tally.telling(send)
        await super().admit(scope, receive, send)


@cache
def _count_preemptions() -> bool:
    """Have SGLang add its requests to the tally of their HTTP request; return whether it does."""
    try:
        from sglang.srt.managers.tokenizer_manager import TokenizerManager

        generate = TokenizerManager.generate_request
        assert inspect.isasyncgenfunction(generate)
    except Exception as error:
        logger.warning("How often a request is suspended is not told: %r", error)
        return False

    async def generate_request(self: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        tally, counts = frontline_tally.current(), dict[Any, int]()
        if tally is not None:
            tally.add(lambda: sum(counts.values()))
        async with aclosing(generate(self, *args, **kwargs)) as outputs:
            async for output in outputs:
                counts.update(_retractions(output))
                yield output

    TokenizerManager.generate_request = generate_request
    return True


def _retractions(output: Any) -> Iterator[tuple[Any, int]]:
    """Yield the sequences of an output, and how often each was suspended."""
    for one in output if isinstance(output, list) else (output,):
        about = one.get("meta_info") if isinstance(one, dict) else None
        if about and isinstance(count := about.get("num_retractions"), int):
            yield about.get("id"), count


app.add_middleware(Guard)


def _stay_on_this_machine() -> None:
    # An address that is set explicitly means that the engine spans several machines.
    if MEETING_PLACE not in os.environ and "--dist-init-addr" not in sys.argv:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # The file disappears with this process, however that ends.
        store = os.memfd_create("frontline-sglang")
        os.environ[MEETING_PLACE] = f"file:///proc/{os.getpid()}/fd/{store}"


if __name__ == "__main__":
    _stay_on_this_machine()
    # SGLang's child processes see its own module as the main module, as in a direct start.
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
