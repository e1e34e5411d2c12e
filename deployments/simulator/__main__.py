"""The process of the simulated engine: ``python -m deployments.simulator``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import orjson
import uvicorn
import uvloop

from app.core.settings import SettingsError
from deployments.simulator import KEY_VARIABLE, OWNER, VERSION
from deployments.simulator.application import Application
from deployments.simulator.engine import Engine
from deployments.simulator.ranks import Ranks, gather, join
from deployments.simulator.settings import (
    Change,
    InjectedFailures,
    RequestFailure,
    SimulatedSettings,
)

KEEP_ALIVE_SECONDS = 5
"""How long an idle connection is kept: vLLM's and TensorRT-LLM's default."""
BACKLOG = 2048
CHILD_SECONDS = 3600
"""How long the process of ``leave_child`` lives if nothing ends it."""


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: a setting decides what SIGTERM does."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers."""
        yield


def main(arguments: list[str]) -> int:
    """Run the engine until it is told to stop; return the exit status."""
    options = _options(arguments)
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        return _complain(f"{KEY_VARIABLE} must hold the engine's key")
    try:
        settings = SimulatedSettings.load(orjson.loads(options.settings), "settings")
    except (SettingsError, orjson.JSONDecodeError) as error:
        return _complain(str(error))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if options.rank:
            return runner.run(_follow(options))
        return runner.run(_serve(options, settings, key))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="deployments.simulator", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--model", default="simulated", help="the model's folder or name")
    parser.add_argument("--served-name", default="simulated", help="the model's id")
    parser.add_argument("--settings", default="{}", help="the settings, as a JSON object")
    parser.add_argument("--nodes", type=int, default=1, help="parts of the engine")
    parser.add_argument("--rank", type=int, default=0, help="which of them this is")
    parser.add_argument("--meet", default="", help="where they meet, as HOST:PORT")
    return parser.parse_args(arguments)


def _complain(message: str) -> int:
    print(f"simulated engine {VERSION}: {message}", file=sys.stderr, flush=True)
    return 1


def _ranks(options: argparse.Namespace) -> Ranks:
    return Ranks.parse(options.nodes, options.rank, options.meet)


async def _follow(options: argparse.Namespace) -> int:
    await join(_ranks(options))
    return _complain("the first part has ended")


async def _stop_with(one_gone: asyncio.Event, engine: Engine) -> None:
    await one_gone.wait()
    engine.change(Change(failures=InjectedFailures(request=RequestFailure.HANG)))


async def _serve(options: argparse.Namespace, settings: SimulatedSettings, key: str) -> int:
    listener = _bind(options.host, options.port)
    engine = Engine(settings, asyncio.get_running_loop())
    application = Application(engine, options.served_name, options.model, key)
    server = _server(application, settings)
    stopped = _stopped_by_signals(engine)
    if settings.failures.leave_child:
        application.child = _leave_child()
    serving: asyncio.Task[None] | None = None
    if application.wire.listens_before_ready:
        serving = asyncio.create_task(server.serve([listener]))
    # Otherwise it is bound but does not listen: connections are refused until the engine is ready.
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stopped.wait(), settings.startup_seconds)
        return 0
    if settings.failures.start is not None:
        return _complain(settings.failures.start)
    if options.nodes > 1:
        stopping = asyncio.create_task(_stop_with(await gather(_ranks(options)), engine))
        stopping.add_done_callback(lambda _: print("another part has gone", flush=True))
    application.ready = True
    # A garbage collection over everything loaded so far would pause hundreds of streams.
    gc.freeze()
    serving = serving or asyncio.create_task(server.serve([listener]))
    address = f"{options.host}:{listener.getsockname()[1]}"
    print(
        f"simulated engine {VERSION} (dialect {settings.dialect}, policy {settings.policy}, "
        f"{settings.slots} slots) is ready on {address}",
        flush=True,
    )
    await stopped.wait()
    server.should_exit = True
    await serving
    return 0


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    # As vLLM 0.32 does, so that the process that reserved the port can hold it until now.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    return listener


def _server(application: Application, settings: SimulatedSettings) -> Server:
    config = uvicorn.Config(
        application,
        loop="none",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="error",
        proxy_headers=False,
        server_header=False,
        headers=[("server", f"{OWNER}/{VERSION}")],
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=settings.shutdown_seconds,
    )
    return Server(config)


def _stopped_by_signals(engine: Engine) -> asyncio.Event:
    stopped = asyncio.Event()

    def stop() -> None:
        if engine.settings.failures.ignore_sigterm:
            print(f"simulated engine {VERSION}: SIGTERM ignored, as set", flush=True)
        else:
            stopped.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_signal_handler(signal.SIGINT, stop)
    return stopped


def _leave_child() -> int:
    child = subprocess.Popen(["sleep", str(CHILD_SECONDS)], start_new_session=True)
    return child.pid


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
