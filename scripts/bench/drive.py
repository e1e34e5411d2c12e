"""Loads for gateways, from generators that are not Python, and what a gateway spends under them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import orjson
import psutil

_HERE = Path(__file__).parent
_PROMPT = "Tell me about the sea in twenty words please"
_TIMEOUT_S = 60.0
_EARLIER_S = 0.05
"""Before the generator ends its streams, which gateways notice and record."""

Roles = Mapping[str, list[psutil.Process]]


class Missing(RuntimeError):
    """A program that the benchmark needs is not installed."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """Something that requests can be sent through, and how.

    Attributes:
        name: what the results call it.
        port: where it listens, on 127.0.0.1.
        path: of its chat completions.
        model: the model's name there.
        key: sent as a bearer token.
        headers: further request headers.
        tier: the ``service_tier`` that every request asks for and every answer must carry.
        processes: its processes, by what they do; those in ``spent`` serve requests.
        spent: the roles whose work is a request's cost.
    """

    name: str
    port: int
    processes: Callable[[], Roles]
    spent: tuple[str, ...]
    path: str = "/v1/chat/completions"
    model: str = "mock"
    key: str = "none"
    headers: tuple[str, ...] = ()
    tier: str | None = None

    def body(self, *, stream: bool, tokens: int = 128, prompt: str = _PROMPT) -> bytes:
        """Return a request's body."""
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
        }
        if stream:
            fields["stream"] = True
        if self.tier is not None:
            fields["service_tier"] = self.tier
        return orjson.dumps(fields)

    def environment(self, body: Path) -> dict[str, str]:
        """Return what the generators read a request from."""
        given = {"BENCH_KEY": self.key, "BENCH_HEADERS": "\n".join(self.headers)}
        if self.tier is not None:
            given["BENCH_TIER"] = self.tier
        return {**os.environ, **given, "BENCH_BODY": str(body)}


@dataclass(frozen=True, slots=True)
class Sample:
    """One load on one gateway.

    Attributes:
        load: which load.
        gateway: its name.
        told: what the generator counted.
        cpu_s: processor seconds by role, in all.
        answers: whole answers, unary ones or streams.
        events: server-sent events in the time whose processor seconds were taken.
        memory_mb: resident memory of the roles that serve requests, together.
        busy: the share of a core that these roles used.
    """

    load: str
    gateway: str
    told: Mapping[str, float]
    cpu_s: Mapping[str, float]
    answers: int
    events: int
    memory_mb: float
    busy: float = math.nan


def require_wrk() -> None:
    """Check that wrk is there.

    Raises:
        Missing: it is not.
    """
    if shutil.which("wrk") is None:
        raise Missing("wrk is missing: apt-get install wrk")


def build_streams(folder: Path) -> Path:
    """Compile the stream reader where that has not been done, and return it.

    Raises:
        Missing: there is no C compiler.
    """
    source = _HERE / "streams.c"
    target = folder / f"streams-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    if not target.exists():
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise Missing("a C compiler is missing: apt-get install gcc libc6-dev")
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([compiler, "-O2", "-o", f"{target}.new", str(source)], check=True)
        os.replace(f"{target}.new", target)
    return target


@dataclass(frozen=True, slots=True)
class Unary:
    """Requests over so many connections at once, each sent when the answer before it has come."""

    connections: int
    seconds: int
    prompt: str = _PROMPT

    @property
    def name(self) -> str:
        return f"{'unary' if self.prompt == _PROMPT else '1 MB'} {self.connections}"

    def drive(self, gateway: Gateway, streams: Path) -> dict[str, float]:
        """Load a gateway, and return what was counted."""
        command = [
            *("wrk", "-t1", f"-c{self.connections}", f"-d{self.seconds:.0f}s"),
            *("--timeout", f"{_TIMEOUT_S:.0f}s", "-s", str(_HERE / "requests.lua")),
            f"http://127.0.0.1:{gateway.port}{gateway.path}",
        ]
        return _told(command, gateway, gateway.body(stream=False, prompt=self.prompt))


@dataclass(frozen=True, slots=True)
class Streams:
    """Streams over so many connections at once, each with a token every ``pace_ms``; 0: at once."""

    connections: int
    seconds: int
    pace_ms: int = 0

    @property
    def warm_s(self) -> float:
        """How long nothing is counted at first: so beginning a paced stream is not part of it."""
        return 3.0 if self.pace_ms else 0.0

    @property
    def name(self) -> str:
        if not self.pace_ms:
            return f"streams {self.connections}"
        rate = "" if self.pace_ms == 10 else f" at {1000 // self.pace_ms}/s"
        return f"paced {self.connections}{rate}"

    def drive(self, gateway: Gateway, streams: Path) -> dict[str, float]:
        """Load a gateway, and return what was counted."""
        # Paced streams outlast the measurement, which is of streams, not of beginning them.
        paced = f"paced at {self.pace_ms} ms"
        prompt, tokens = (paced, 900) if self.pace_ms else (_PROMPT, 128)
        command = [
            *(str(streams), "127.0.0.1", str(gateway.port), gateway.path),
            *(str(self.connections), str(self.warm_s), str(self.seconds)),
        ]
        return _told(command, gateway, gateway.body(stream=True, tokens=tokens, prompt=prompt))


def pin(processes: Iterable[psutil.Process], core: int) -> None:
    """Have every thread of some processes run on one core, and what they start, too."""
    for process in processes:
        try:
            threads = [thread.id for thread in process.threads()]
        except psutil.Error:
            continue
        for thread in threads:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(thread, {core})


def measure(
    load: Unary | Streams, gateway: Gateway, streams: Path, *, pinned: bool = False
) -> Sample:
    """Put a load on a gateway; ``pinned``: on a core of its own."""
    roles = gateway.processes()
    if pinned:
        pin((process for role in gateway.spent for process in roles.get(role, ())), 0)
        others = (those for role, those in roles.items() if role not in gateway.spent)
        pin((process for those in others for process in those), 1)
    if isinstance(load, Streams) and load.pace_ms:
        told, cpu_s, loaded_s, events = _paced(load, gateway, streams, roles)
    else:
        began, before = time.monotonic(), _spent(roles)
        told = load.drive(gateway, streams)
        loaded_s, events = time.monotonic() - began, int(told.get("every_event", 0))
        # What an answer leaves to be done, such as moving its record, is part of its cost.
        time.sleep(0.5)
        cpu_s = _since(before, roles)
    return Sample(
        load=load.name,
        gateway=gateway.name,
        told=told,
        cpu_s=cpu_s,
        busy=sum(cpu_s.get(role, 0.0) for role in gateway.spent) / loaded_s,
        answers=int(told.get("requests", told.get("streams", 0))),
        events=events,
        memory_mb=sum(_resident_mb(roles.get(role, [])) for role in gateway.spent),
    )


def _paced(
    load: Streams, gateway: Gateway, streams: Path, roles: Roles
) -> tuple[dict[str, float], dict[str, float], float, int]:
    """Return what was counted, the CPU seconds, how long they were taken, and the events in that.

    Streams begin before and end after that time, so neither is part of what an event costs.
    """
    with ThreadPoolExecutor(1) as pool:
        driven = pool.submit(load.drive, gateway, streams)
        time.sleep(load.warm_s)
        began, before = time.monotonic(), _spent(roles)
        time.sleep(load.seconds - _EARLIER_S)
        cpu_s, taken_s = _since(before, roles), time.monotonic() - began
        told = driven.result()
    return told, cpu_s, taken_s, round(told["events"] / told["seconds"] * taken_s)


def _spent(roles: Roles) -> dict[str, float]:
    return {role: _cpu_s(processes) for role, processes in roles.items()}


def _since(before: Mapping[str, float], roles: Roles) -> dict[str, float]:
    return {role: _cpu_s(processes) - before[role] for role, processes in roles.items()}


def _told(command: list[str], gateway: Gateway, body: bytes) -> dict[str, float]:
    with NamedTemporaryFile() as file:
        file.write(body)
        file.flush()
        environment = gateway.environment(Path(file.name))
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=3 * _TIMEOUT_S
        )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-500:] or done.stdout[-500:]}")
    told: dict[str, float] = json.loads(lines[-1])
    return told


def _cpu_s(processes: list[psutil.Process]) -> float:
    used = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        used += times.user + times.system
    return used


def _resident_mb(processes: list[psutil.Process]) -> float:
    resident = 0
    for process in processes:
        try:
            resident += process.memory_info().rss
        except psutil.Error:
            continue
    return resident / 1e6
