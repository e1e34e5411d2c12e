"""What clients without the key can do to an engine's own server, and what to its guard.

    python -m scripts.bench.guard_attacks [--pool FILE APPLICATION POOL]

The engine's server is uvicorn around the middleware that asks for the key (`inside/`), which is
what vLLM and SGLang are to whoever lacks it; with --pool it is that pool's engine. Each attack goes
to the server itself and to its guard in turn; the attacker runs on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import yaml

from app.config.model import PoolSettings
from deployments.engines.registry import adapter_named
from deployments.hosting.guard import LOOPBACK, EngineGuard
from deployments.hosting.launch import environment, make_launch
from deployments.hosting.ports import reserve_port
from deployments.process.supervisor import EngineProcess
from scripts.bench.progress import steps

KEY = "benchmark"
NODE = "127.0.0.2"
INSIDE = Path(__file__).parents[2] / "deployments/engines/inside"
HALF_HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
CONNECTIONS = 500
HELD_S = 12
MOST_BYTES = 256 << 20
TOKEN_S = 0.01


@dataclass
class Target:
    """A server under attack, and the processes that pay for it."""

    name: str
    url: httpx.URL
    processes: dict[str, psutil.Process]
    model: str

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.url.host, self.url.port)

    def used(self, what: str) -> dict[str, float]:
        if what == "cpu":
            return {name: sum(p.cpu_times()[:2]) for name, p in self.processes.items()}
        return {name: p.memory_info().rss / (1 << 20) for name, p in self.processes.items()}


async def without_the_key(target: Target) -> str:
    async with httpx.AsyncClient(base_url=target.url, trust_env=False) as client:
        answers = [
            (await client.request(method, path)).status_code
            for method in ("GET", "POST", "OPTIONS", "HEAD", "PUT")
            for path in ("/health", "/metrics", "/v1/completions", "/invocations", "/nothing")
        ]
        upgrade = {
            "connection": "upgrade",
            "upgrade": "websocket",
            "sec-websocket-version": "13",
            "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
        }
        answers.append((await client.get("/v1/realtime", headers=upgrade)).status_code)
    return f"answers {sorted(set(answers))} on {len(answers)} routes"


async def with_the_key(target: Target) -> str:
    headers = {"authorization": f"Bearer {KEY}"}
    asked = ["GET /metrics", "GET /openapi.json", "POST /invocations", "POST /tokenize"]
    async with httpx.AsyncClient(base_url=target.url, headers=headers, trust_env=False) as client:
        answers = {
            one: (await client.request(*one.split(), **_json(one))).status_code for one in asked
        }
    return ", ".join(f"{one} {status}" for one, status in answers.items())


def _json(line: str) -> dict[str, Any]:
    return {"json": {}} if line.startswith("POST") else {}


async def half_heads(target: Target) -> str:
    before = target.used("rss")
    held = [await target.connect() for _ in range(CONNECTIONS)]
    for _, writer in held:
        writer.write(HALF_HEAD)
    ends = [asyncio.create_task(reader.read()) for reader, _ in held]
    _, still = await asyncio.wait(ends, timeout=HELD_S)
    grown = {name: used - before[name] for name, used in target.used("rss").items()}
    for _, writer in held:
        writer.transport.abort()
    await asyncio.gather(*ends, return_exceptions=True)
    return f"{len(still)} of {CONNECTIONS} still open after {HELD_S} s; {_megabytes(grown)}"


async def endless_head(target: Target) -> str:
    return await _pump(target, HALF_HEAD, b"x-a: " + b"a" * 65_000 + b"\r\n")


async def endless_body(target: Target) -> str:
    head = HALF_HEAD + b"content-length: 999999999999\r\n\r\n"
    return await _pump(target, head, b"a" * 65_536)


async def _pump(target: Target, first: bytes, more: bytes) -> str:
    """Send for three seconds, or until it is cut off."""
    rss, cpu, sent = target.used("rss"), target.used("cpu"), 0
    _, writer = await target.connect()
    writer.write(first)
    deadline = time.monotonic() + 3
    try:
        while sent < MOST_BYTES and time.monotonic() < deadline:
            writer.write(more)
            await asyncio.wait_for(writer.drain(), 1)
            sent += len(more)
    except (ConnectionError, TimeoutError):
        pass
    await asyncio.sleep(0.2)
    grown = {name: used - rss[name] for name, used in target.used("rss").items()}
    spent = {name: used - cpu[name] for name, used in target.used("cpu").items()}
    cpu_words = ", ".join(f"{name} {value:.2f} s" for name, value in spent.items())
    writer.transport.abort()
    return f"{sent / (1 << 20):.1f} MB taken; {_megabytes(grown)}; CPU {cpu_words}"


async def flood(target: Target) -> str:
    """Requests without the key from 32 connections, while a stream runs."""
    quiet = await _longest_pause(target, 4)
    before = target.used("cpu")
    command = ["wrk", "-t1", "-c32", "-d4", str(target.url)]
    wrk = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    busy, (out, _) = await asyncio.gather(_longest_pause(target, 4), wrk.communicate())
    found = re.search(r"(\d+) requests in", out.decode())
    refused = int(found[1]) if found else 0
    spent = {name: (used - before[name]) * 1e6 for name, used in target.used("cpu").items()}
    cpu = ", ".join(f"{name} {value / max(refused, 1):.0f} us" for name, value in spent.items())
    return (
        f"{refused} refused; CPU for each: {cpu}; p99 pause in a stream "
        f"{quiet * 1000:.0f} ms before, {busy * 1000:.0f} ms meanwhile"
    )


async def _longest_pause(target: Target, seconds: float) -> float:
    """Return the 99th percentile of the pauses between the tokens of a stream."""
    body = {"model": target.model, "prompt": "a", "stream": True, "max_tokens": 2000}
    body["ignore_eos"] = True
    pauses: list[float] = []
    deadline = time.monotonic() + seconds
    headers = {"authorization": f"Bearer {KEY}"}
    async with (
        httpx.AsyncClient(base_url=target.url, headers=headers, timeout=30, trust_env=False) as one,
        one.stream("POST", "/v1/completions", json=body) as answer,
    ):
        last = 0.0
        async for _ in answer.aiter_raw():
            now = time.monotonic()
            pauses += [now - last] if last else []
            last = now
            if now > deadline:
                break
    return sorted(pauses)[int(len(pauses) * 0.99)] if pauses else 0.0


def _megabytes(grown: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:+.0f} MB" for name, value in grown.items())


ATTACKS: tuple[Callable[[Target], Awaitable[str]], ...] = (
    without_the_key,
    with_the_key,
    half_heads,
    endless_head,
    endless_body,
    flood,
)


def bare() -> Any:
    """The least that streams, behind the middleware that asks for the key."""
    sys.path.insert(0, str(INSIDE))
    from frontline_guard import Guard

    async def stream(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            chunk = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}
            await send(chunk)
            await asyncio.sleep(TOKEN_S)
            if scope["path"] != "/v1/completions":
                break
        await send({"type": "http.response.body"})

    return Guard(stream)


@asynccontextmanager
async def engine(named: list[str] | None, logs: Path) -> AsyncIterator[tuple[int, str]]:
    """Run a pool's engine, or uvicorn alone; yield its port and its model's name."""
    with reserve_port(LOOPBACK) as port:
        if named:
            pool = _pool(*named)
            adapter = adapter_named(pool.engine)
            launch = make_launch("m", pool, host=LOOPBACK, port=port.port, key=KEY)
            command = adapter.command(launch)
            variables = dict(os.environ) | environment(adapter, launch, pool)
        else:
            command = [sys.executable, "-m", "uvicorn", "--factory", f"{__spec__.name}:bare"]
            command += ["--port", str(port.port), "--log-level", "warning"]
            variables = dict(os.environ) | {"FRONTLINE_ENGINE_KEY": KEY}
        process = await EngineProcess.start(command, variables, logs, name="engine")
        try:
            await _until_it_listens(process, port.port)
            yield port.port, "m"
        finally:
            await process.stop(5.0)


async def _until_it_listens(process: EngineProcess, port: int) -> None:
    for _ in range(1200):
        try:
            async with httpx.AsyncClient(trust_env=False) as client:
                headers = {"authorization": f"Bearer {KEY}"}
                url = f"http://{LOOPBACK}:{port}/health"
                if (await client.get(url, headers=headers)).status_code == 200:
                    return
        except httpx.HTTPError:
            pass
        if not process.alive:
            raise SystemExit(process.tail())
        await asyncio.sleep(0.2)
    raise SystemExit("the engine did not start")


def _pool(file: str, application: str, name: str) -> PoolSettings:
    apps = yaml.safe_load(Path(file).read_text())["applications"]
    [app] = (one for one in apps if one["name"] == application)
    [pool] = (one for one in app["args"]["pools"] if one["name"] == name)
    return PoolSettings.load(pool, "pool")


def _listening(host: str, port: int) -> psutil.Process:
    for one in psutil.net_connections("tcp"):
        if one.status == psutil.CONN_LISTEN and tuple(one.laddr) == (host, port) and one.pid:
            return psutil.Process(one.pid)
    raise SystemExit(f"nothing listens at {host}:{port}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", nargs=3, metavar=("FILE", "APPLICATION", "POOL"))
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        async with engine(options.pool, Path(folder)) as (port, model):
            server = _listening(LOOPBACK, port)
            guard = await EngineGuard.start(NODE, port, KEY, Path(folder), name="benchmark")
            try:
                url = httpx.URL(guard.base_url)
                own = httpx.URL(f"http://{LOOPBACK}:{port}")
                haproxy = _listening(NODE, url.port or 0)
                print(f"guard: {haproxy.memory_info().rss / (1 << 20):.0f} MB resident")
                targets = (
                    Target("server", own, {"server": server}, model),
                    Target("guard", url, {"server": server, "guard": haproxy}, model),
                )
                await attack_all(targets)
            finally:
                await guard.stop()


async def attack_all(targets: Sequence[Target]) -> None:
    """Print what each attack does to each target."""
    for attack, target in steps([*product(ATTACKS, targets)], "attacks"):
        print(f"{attack.__name__:16} {target.name:7} {await attack(target)}", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
