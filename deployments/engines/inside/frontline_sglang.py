"""Starts SGLang's server with the guard around it: ``python -m frontline_sglang ARGUMENTS``.

Runs under the engine's interpreter, where Frontline is not installed.

SGLang has no option for a middleware, but its application is a module's public name, and where
several of its processes serve HTTP they import it from where ``SGLANG_HTTP_SERVER_APP_PATH`` says:
from here. Its processes on one machine meet in a file in memory and talk over loopback: the store
by which torch lets them meet otherwise listens on every address, and asks nobody for a key.
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
    # With an address of the operator's own, there are other machines.
    if MEETING_PLACE not in os.environ and "--dist-init-addr" not in sys.argv:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # It goes with this process, however that ends.
        store = os.memfd_create("frontline-sglang")
        os.environ[MEETING_PLACE] = f"file:///proc/{os.getpid()}/fd/{store}"


if __name__ == "__main__":
    _stay_on_this_machine()
    # SGLang's processes find its own module in the main one, as if it had been started itself.
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
