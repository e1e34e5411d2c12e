"""Starts SGLang's server with the guard around it: ``python -m frontline_sglang ARGUMENTS``.

Runs under the engine's interpreter, where Frontline is not installed.

SGLang has no option for a middleware, but its application is a public name of a module. Where
several of its processes serve HTTP, they import the application from the module that
``SGLANG_HTTP_SERVER_APP_PATH`` names, which is this one.

On one machine SGLang's processes rendezvous through a file in memory and communicate over loopback.
The default is torch's TCP store, which listens on every address and requires no key.
"""

from __future__ import annotations

import os
import runpy
import sys

from frontline_guard import Guard
from sglang.srt.entrypoints.http_server import app

MEETING_PLACE = "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"

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
