"""The CPU time that an ingress spends on a request and on a streamed event, versions by turns.

    python scripts/bench/request_cost.py OTHER_CHECKOUT [ANOTHER …] [--rounds 8] [--loads paced]
    python scripts/bench/request_cost.py OTHER_CHECKOUT --loads paced --flames FOLDER

Each version is a checkout with its own process: the whole ingress with keys, queue, metrics and
ledger behind uvicorn, as under Ray Serve, but without Serve's layers and HAProxy. All of them send
to one mock engine over loopback. wrk and ``streams.c`` load them in turn, in short rounds. The time
is that of all threads of the ingress's process, from the kernel's scheduler (``schedstat``).

Other work on the machine makes all figures larger, so the lower quartile of the rounds is shown,
and the median of the ratios of each round to the first version. The version of this file comes
last. ``--serve`` runs one version; the command starts it in each checkout. ``--flames`` measures
nothing, and draws where the time goes instead, by py-spy.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

sys.path.insert(0, os.getcwd())

import orjson

_HERE = Path(__file__).resolve()
_ROOT = _HERE.parents[2]
_WORDS = "Tell me about the sea in twenty words please"
_READY = "ready"
_DRAWN_S = 10
_WARM_S = 1.0
"""Before the measured time of each load, so that beginning streams is not part of an event."""


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """So many connections; ``messages`` texts of ``size`` bytes, and what the answer is."""

    connections: int
    messages: int = 1
    size: int = 0
    stream: bool = False
    paced: bool = False

    def body(self) -> bytes:
        """Return the request of every connection."""
        text = "paced" if self.paced else _WORDS
        text = (text + " ") * (self.size // len(text)) or text
        fields: dict[str, Any] = {
            "model": "acme/model",
            "messages": [{"role": "user", "content": text} for _ in range(self.messages)],
            "max_tokens": 900 if self.paced else 128,
            "service_tier": "priority",
        }
        return orjson.dumps(fields | ({"stream": True} if self.stream else {}))

    def command(self, port: int, reader: Path, seconds: int) -> list[str]:
        """Return the generator's command."""
        path = "/v1/chat/completions"
        if self.stream:
            times = (str(self.connections), str(_WARM_S), str(seconds))
            return [str(reader), "127.0.0.1", str(port), path, *times]
        last_s = f"-d{_WARM_S + seconds + 0.5:.0f}s"
        script = str(_HERE.parent / "requests.lua")
        url = f"http://127.0.0.1:{port}{path}"
        return ["wrk", "-t1", f"-c{self.connections}", last_s, "-s", script, url]


LOADS = {
    "unary": Load(16),
    "130 messages": Load(8, messages=130, size=50),
    "200 KB": Load(4, messages=40, size=5000),
    "together": Load(16, stream=True),
    "paced": Load(64, stream=True, paced=True),
}


def serve(engine_port: int) -> None:
    """Run the ingress of the current folder's version until stdin is closed."""
    import uvloop

    uvloop.run(_serve(engine_port))


async def _serve(engine_port: int) -> None:
    import uvicorn

    # The simulator imports what runs inside engines.
    sys.path.insert(0, str(Path.cwd() / "deployments/engines/inside"))
    world_of = _first_module("tests.support.world", "tests.app.bill.world")
    journal = world_of.JournalSettings
    # The default settings, not those that tests choose to be quick.
    world_of.JournalSettings = lambda **_: journal()
    with TemporaryDirectory(dir="/dev/shm") as folder:
        world = world_of.World(Path(folder))
        services = getattr(world, "services", None) or world._services  # noqa: SLF001
        services.settings = world_of.IngressSettings(auth="keys")
        with contextlib.suppress(ImportError):
            importlib.import_module("app.gateway.telemetry").Telemetry(services)
        await world.start()
        status = dataclasses.replace(
            world.engines["vllm"].status, base_url=f"http://127.0.0.1:{engine_port}", slots=2048
        )
        world.engines["vllm"].status = status
        await world.set(world_of.ModelSettings(), ["vllm"])
        with contextlib.suppress(ImportError):
            importlib.import_module("app.gateway.gc_tuning").settle_in()
        api = world._api  # noqa: SLF001
        config = uvicorn.Config(
            api, host="127.0.0.1", port=0, log_config=None, access_log=False, lifespan="off"
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        key = world._keys.texts["plain"]  # noqa: SLF001
        print(_READY, port, key, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        server.should_exit = True
        await task
        await world.close()


def _first_module(*names: str) -> Any:
    for name in names[:-1]:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    return importlib.import_module(names[-1])


@dataclasses.dataclass(frozen=True, slots=True)
class Version:
    """One ingress that runs."""

    name: str
    pid: int
    port: int
    key: str

    def cpu_s(self) -> float:
        """Return the CPU seconds of all its threads so far."""
        times = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(one.read_text().split()[0]) for one in times) / 1e9

    @contextlib.contextmanager
    def loaded(self, load: Load, reader: Path, seconds: int) -> Iterator[subprocess.Popen[str]]:
        """Put a load on it, and yield the generator."""
        with NamedTemporaryFile() as body:
            body.write(load.body())
            body.flush()
            given = {"BENCH_BODY": body.name, "BENCH_KEY": self.key, "BENCH_TIER": "priority"}
            with subprocess.Popen(
                load.command(self.port, reader, seconds),
                env={**os.environ, **given},
                stdout=subprocess.PIPE,
                text=True,
            ) as generator:
                yield generator

    def measure(self, load: Load, reader: Path, seconds: int) -> float:
        """Put a load on it; return the µs of CPU per answer, or per event of a stream."""
        with self.loaded(load, reader, seconds) as generator:
            begun = self.cpu_s()
            time.sleep(_WARM_S)
            warm = self.cpu_s()
            time.sleep(seconds - 0.05)
            ended = self.cpu_s()
            said, _ = generator.communicate()
        told: dict[str, float] = orjson.loads(said.strip().splitlines()[-1])
        if load.stream:
            # The reader counts events only after its warm time.
            return (ended - warm) / (told["events"] * (seconds - 0.05) / seconds) * 1e6
        return (self.cpu_s() - begun) / told["requests"] * 1e6

    def draw(self, load: Load, reader: Path, seconds: int, file: Path) -> None:
        """Put a load on it, and draw a flame graph of Python's part of it."""
        with self.loaded(load, reader, seconds) as generator:
            time.sleep(_WARM_S)
            command = f"py-spy record --gil --pid {self.pid} --duration {seconds} --rate 250"
            # The command is the title of the picture: no path of this machine.
            words = [*command.split(), "--format", "flamegraph", "--output", file.name]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=file.parent)
            generator.communicate()


@contextlib.contextmanager
def running(root: Path, engine_port: int, core: int) -> Iterator[Version]:
    """Run a version."""
    command = ["taskset", "-c", str(core), sys.executable, str(_HERE), "--serve", str(engine_port)]
    unset = ("PYTHONPATH",)
    process = subprocess.Popen(
        command,
        cwd=root,
        env={name: value for name, value in os.environ.items() if name not in unset},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(_READY):
                _, port, key = line.split()
                yield Version(root.name, process.pid, int(port), key)
                return
        raise RuntimeError(f"{root} does not start")
    finally:
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()


def main() -> None:
    """Measure versions by turns, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("roots", nargs="*", type=Path, help="other checkouts")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--flames", type=Path, metavar="FOLDER", help="draw flame graphs into it")
    parser.add_argument("--serve", type=int, metavar="ENGINE_PORT")
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.serve)
        return
    from scripts.bench import gateways
    from scripts.bench.drive import build_streams, require_wrk

    require_wrk()
    # What it has started is to end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    names = options.loads.split(",")
    if options.flames:
        # py-spy stops the process for every sample, and that keeps io_uring's thread busy.
        os.environ["UV_USE_IO_URING"] = "0"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        reader = build_streams(Path(os.environ["FRONTLINE_HOME"]) / "bench")
        engine = stack.enter_context(gateways.mock_engine(folder))
        versions = [
            stack.enter_context(running(root.resolve(), engine.port, 0))
            for root in (*options.roots, _ROOT)
        ]
        # The generators inherit this.
        os.sched_setaffinity(0, {1})
        for process in engine.processes()["engine"]:
            process.cpu_affinity([1])
        if options.flames:
            _draw(versions, names, reader, options.flames)
        else:
            _compare(versions, names, reader, options.rounds, options.seconds)


def _draw(versions: list[Version], names: list[str], reader: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for version in versions:
            file = folder / f"flame-{name.replace(' ', '-')}-{version.name}.svg"
            version.draw(LOADS[name], reader, _DRAWN_S, file)
            print(file)


def _compare(
    versions: list[Version], names: list[str], reader: Path, rounds: int, seconds: int
) -> None:
    costs: dict[str, list[list[float]]] = {name: [[] for _ in versions] for name in names}
    for number in range(rounds):
        for name in names:
            turn = number % len(versions)
            order = list(range(len(versions)))
            for place in order[turn:] + order[:turn]:
                cost = versions[place].measure(LOADS[name], reader, seconds)
                costs[name][place].append(cost)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    print("µs of CPU: lower quartile (median of the ratios to the first)")
    print("| load |", " | ".join(version.name for version in versions), "|")
    for name, measured in costs.items():
        cells = []
        for mine in measured:
            low = statistics.quantiles(mine, n=4)[0] if len(mine) > 1 else mine[0]
            ratio = statistics.median(b / a for a, b in zip(measured[0], mine, strict=True))
            cells.append(f"{low:,.1f} ({ratio:.2f} x)")
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
