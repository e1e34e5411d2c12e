"""Streaming chat requests from many clients at once, as cheaply as Python can send them.

Raw aiohttp instead of the OpenAI SDK: the SDK builds a model object from every chunk, and on a
machine that also runs the server that cost would be measured as the server's latency. What the
generator itself takes is measured as well (``scripts.bench.effort``).
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson

from app.protocol.sse import DONE, EventReader, parse_block

_LONGEST_PAUSE_S = 300.0
_RETRY_S = 1.0
"""How long to wait after a 429 that does not say."""
_WORDS = re.findall(
    r"\w+",
    """
    river mountain letter garden winter engine market silver window bridge forest story island
    teacher doctor number picture morning country question answer paper music summer
    """,
)


class RefusedAddress(ValueError):
    """A benchmark is not for other people's servers."""


def require_loopback(base_url: str) -> None:
    """Check that an address is this machine's own.

    Raises:
        RefusedAddress: it is not, or may not be.
    """
    host = urlsplit(base_url).hostname or ""
    with suppress(ValueError):
        if host == "localhost" or ipaddress.ip_address(host).is_loopback:
            return
    raise RefusedAddress(f"{base_url} is not a loopback address (--allow-remote permits it)")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI-compatible server, and how it is told a request's tier.

    Attributes:
        name: what the results call it.
        base_url: with the version, as the OpenAI SDK wants it.
        model: the model's name there.
        key: sent as a bearer token.
        tiers: what a request of each tier has in its body.
        body: what every request has in its body besides.
        headers: further headers of a request of each tier.
    """

    name: str
    base_url: str
    model: str
    key: str
    tiers: Mapping[str, Mapping[str, Any]]
    body: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Workload:
    """What the requests ask; the same in every run.

    Attributes:
        prompt_words: length of a prompt.
        tokens: mean length of an answer.
        spread: how far lengths lie from the mean at most, as a share of it. With equal lengths a
            batch that started together would end together for ever, in lockstep.
    """

    prompt_words: int
    tokens: int
    spread: float

    def length(self, number: int) -> int:
        """Return the ``max_tokens`` of a request."""
        share = random.Random(number).uniform(-self.spread, self.spread)
        return max(1, round(self.tokens * (1 + share)))

    def prompt(self, label: str, number: int) -> str:
        """Return a prompt that begins as no other does, so that no prefix of it is cached."""
        words = random.Random(number).choices(_WORDS, k=self.prompt_words)
        return f"{number} {label}: write about {' '.join(words)}"


@dataclass(slots=True, eq=False)
class Answer:
    """One request and what came of it. Times are of ``time.monotonic``.

    ``started`` is when it was sent for the first time: a shed request is sent again when the server
    said, and its time to the first token goes on counting. ``asked`` is its ``max_tokens``,
    ``moments`` are those of its events from the first token on.
    """

    tier: str
    started: float
    first: float = 0.0
    ended: float = 0.0
    tokens: int = 0
    asked: int = 0
    moments: list[float] = field(default_factory=list)
    queue_s: float | None = None
    served: str = ""
    sheds: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first - self.started


class Load:
    """Sends requests to one endpoint and keeps their answers.

    Attributes:
        answers: every request that has ended.
        open: those that have not.
        sheds: when which tier was answered 429.
        events: how many server-sent events were read.
        sent: how many requests were made.
    """

    def __init__(self, endpoint: Endpoint, workload: Workload, *, most: int) -> None:
        self.answers: list[Answer] = []
        self.open: list[Answer] = []
        self.sheds: list[tuple[float, str]] = []
        self.events = 0
        self.sent = 0
        self._endpoint = endpoint
        self._workload = workload
        self._most = most
        self._url = endpoint.base_url.rstrip("/") + "/chat/completions"
        self._session = aiohttp.ClientSession(
            # Redirects and proxies could lead away from the address that was checked.
            connector=aiohttp.TCPConnector(limit=0),
            trust_env=False,
            headers={
                "authorization": f"Bearer {endpoint.key}",
                "content-type": "application/json",
            },
            timeout=aiohttp.ClientTimeout(total=None, sock_read=_LONGEST_PAUSE_S),
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    @property
    def spent(self) -> bool:
        """Whether as many requests were made as may be."""
        return self.sent >= self._most

    async def ask(self, tier: str, label: str, tokens: int | None = None) -> Answer:
        """Make one request, again and again until it is not shed.

        ``tokens`` is its ``max_tokens``, if that is not the workload's to choose.
        """
        self.sent += 1
        asked = self._workload.length(self.sent) if tokens is None else tokens
        body = self._body(tier, label, self.sent, asked)
        answer = Answer(tier, time.monotonic(), asked=asked)
        self.open.append(answer)
        try:
            while (wait_s := await self._attempt(answer, body)) is not None:
                await asyncio.sleep(wait_s)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            answer.error = type(error).__name__
        finally:
            self.open.remove(answer)
        answer.ended = time.monotonic()
        self.answers.append(answer)
        return answer

    async def ask_for_ever(self, tier: str, label: str, delay_s: float) -> None:
        """Be a client that asks as soon as it has its answer."""
        await asyncio.sleep(delay_s)
        while not self.spent:
            answer = await self.ask(tier, label)
            if answer.error:
                await asyncio.sleep(_RETRY_S)

    def _body(self, tier: str, label: str, number: int, asked: int) -> bytes:
        return orjson.dumps(
            {
                "model": self._endpoint.model,
                "messages": [{"role": "user", "content": self._workload.prompt(label, number)}],
                "max_tokens": asked,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                **self._endpoint.body,
                **self._endpoint.tiers[tier],
            }
        )

    async def _attempt(self, answer: Answer, body: bytes) -> float | None:
        """Send a request once; return how long to wait if it was shed."""
        headers = self._endpoint.headers.get(answer.tier)
        async with self._session.post(
            self._url, data=body, headers=headers, allow_redirects=False
        ) as response:
            if response.status == 429:
                await response.read()
                answer.sheds += 1
                self.sheds.append((time.monotonic(), answer.tier))
                return retry_after(response.headers)
            if response.status != 200:
                answer.error = f"HTTP {response.status}"
                return None
            headers = response.headers
            answer.served = headers.get("x-service-tier", "")
            if "x-queue-time-ms" in headers:
                answer.queue_s = float(headers["x-queue-time-ms"]) / 1000
            await self._read(response, answer)
        return None

    async def _read(self, response: aiohttp.ClientResponse, answer: Answer) -> None:
        reader, last, done, chunks = EventReader(), b"", False, 0
        async for piece in response.content.iter_any():
            now = time.monotonic()
            for event in filter(None, map(parse_block, reader.blocks(piece))):
                self.events += 1
                done = event.data == DONE
                last = last if done else event.data
                if not answer.first and _has_text(event.data):
                    answer.first = now
                if answer.first:
                    chunks += 1
                    answer.moments.append(now)
        if not (done and answer.first):
            answer.error = answer.error or "incomplete stream"
            return
        usage = orjson.loads(last).get("usage") or {}
        # A server that tells no usage is taken to send a chunk for each token, and [DONE].
        answer.tokens = usage.get("completion_tokens", chunks - 1)


def _has_text(data: bytes) -> bool:
    if data == DONE:
        return False
    choices = orjson.loads(data).get("choices") or [{}]
    return bool((choices[0].get("delta") or {}).get("content"))


def retry_after(headers: Mapping[str, str]) -> float:
    """Return how long a 429 asks to wait, in seconds."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with suppress(KeyError, ValueError):
            return max(0.0, float(headers[name]) * unit_s)
    return _RETRY_S


def poisson_arrivals(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Return random arrival times at a mean rate, from 0 up to ``seconds``; always the same."""
    chance, times, now = random.Random(seed), [], 0.0
    while (now := now + chance.expovariate(rate)) < seconds:
        times.append(now)
    return times


def regular_arrivals(rate: float, seconds: float) -> list[float]:
    """Return arrival times at equal distances, from 0 up to ``seconds``."""
    return [number / rate for number in range(int(seconds * rate))]
