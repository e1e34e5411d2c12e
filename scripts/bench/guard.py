"""What the guard of an engine replica adds: `wrk` at an engine itself, then through its guard.

    python -m scripts.bench.guard [--seconds 4] [--rounds 3]

Both are asked in turn within one run, as other work on the machine changes from minute to minute.
The engine is the least that speaks HTTP, so that what is measured is the guard.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import cast

import uvloop

from app.core.dialect import Route
from deployments.hosting.guard import LOOPBACK, EngineGuard
from scripts.bench.progress import steps

KEY = "benchmark"
NODE = "127.0.0.2"
ANSWER = b'{"object":"chat.completion","choices":[],"usage":{"completion_tokens":8}}'
SCRIPT = f"""
wrk.method, wrk.path = "POST", "{Route.CHAT.path}"
wrk.headers["content-type"], wrk.headers["authorization"] = "application/json", "Bearer {KEY}"
wrk.body = '{{"model":"m","messages":[{{"role":"user","content":"hello"}}],"max_tokens":8}}'
function done(summary, latency, requests)
  local bad = summary.errors.status + summary.errors.read + summary.errors.connect
  print("result", summary.requests / summary.duration * 1e6, latency:percentile(50), bad)
end
"""


class Engine(asyncio.Protocol):
    """Answers whatever ends in a brace, at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if data.endswith(b"}"):
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(ANSWER)
            self._transport.write(head + ANSWER)


def write_script(folder: Path) -> Path:
    script = folder / "wrk.lua"
    script.write_text(SCRIPT)
    return script


async def ask(url: str, connections: int, seconds: int, script: Path) -> tuple[float, float]:
    """Requests a second, and the median latency in microseconds."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "-s", str(script), url]
    wrk = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    text = (await wrk.communicate())[0].decode()
    found = re.search(r"result\s+(\S+)\s+(\S+)\s+(\S+)", text)
    if not found or float(found[3]):
        raise SystemExit(f"wrk failed:\n{text}")
    return float(found[1]), float(found[2])


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    server = await asyncio.get_running_loop().create_server(Engine, LOOPBACK, 0)
    port = server.sockets[0].getsockname()[1]
    with TemporaryDirectory() as folder:
        script = await asyncio.to_thread(write_script, Path(folder))
        guard = await EngineGuard.start(NODE, port, KEY, Path(folder), name="benchmark")
        try:
            for connections in (1, 16):
                urls = {"engine": f"http://{LOOPBACK}:{port}", "guard": guard.base_url}
                seen: dict[str, list[tuple[float, float]]] = {name: [] for name in urls}
                for _ in steps(range(options.rounds), f"{connections} connections"):
                    for name, url in urls.items():
                        seen[name].append(await ask(url, connections, options.seconds, script))
                for name, results in seen.items():
                    rate, p50 = (median(column) for column in zip(*results, strict=True))
                    print(f"{connections:3} connections, {name:6} {rate:8.0f}/s  p50 {p50:5.0f} us")
        finally:
            await guard.stop()


if __name__ == "__main__":
    uvloop.run(main())
