"""Clients that ask without a pause, and remember what each of them saw."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from tests.support.cluster import Deployment
from tests.support.waiting import SLOWEST

COMPLETE = "complete"
CUT = "cut, with an error event"
TRUNCATED = "cut, without a word"
REFUSED = "no connection"
LATE = "no answer in time"
LEFT = "left by the client"
TIERS = ("priority", "default", "flex")


@dataclass
class Answer:
    """What one request has come to.

    ``outcome`` is one of the names above, or an error's status and code; times are in seconds,
    ``first_s`` is that to the first byte of a stream, ``gap_s`` the longest wait for the next one.
    ``pieces`` counts the chunks of a stream that had text. ``client`` is the number of the client
    that asked, and ``error`` is what the connection's end was, where that is the outcome.
    """

    began: float
    stream: bool
    outcome: str = ""
    request_id: str = ""
    tokens: int = 0
    pieces: int = 0
    first_s: float = 0.0
    seconds: float = 0.0
    gap_s: float = 0.0
    client: int = 0
    error: str = ""


class Truncated(Exception):
    """A stream ended without its end."""


async def ask(
    client: openai.AsyncOpenAI, *, stream: bool, enough: asyncio.Event | None = None, **request: Any
) -> Answer:
    """Send one request and say what has become of it; a stream is left once there is enough."""
    answer = Answer(time.monotonic(), stream)
    try:
        if stream:
            await _read_stream(client, request, answer, enough or asyncio.Event())
        else:
            await _read(client, request, answer)
    except openai.APIStatusError as error:
        # One without a code is not Frontline's, but of what stands before it.
        answer.outcome = " ".join(filter(None, (str(error.status_code), error.code)))
    except openai.APITimeoutError:
        answer.outcome = LATE
    except (Truncated, openai.APIConnectionError, httpx.TransportError) as error:
        answer.outcome = TRUNCATED if answer.first_s else REFUSED
        answer.error = repr(error.__cause__ or error)
    except openai.APIError:
        answer.outcome = CUT
    answer.seconds = time.monotonic() - answer.began
    return answer


async def _read(client: openai.AsyncOpenAI, request: dict[str, Any], answer: Answer) -> None:
    completion = await client.chat.completions.create(**request)
    answer.request_id = completion.id.removeprefix("chatcmpl-")
    answer.tokens = completion.usage.completion_tokens
    answer.outcome = COMPLETE


async def _read_stream(
    client: openai.AsyncOpenAI, request: dict[str, Any], answer: Answer, enough: asyncio.Event
) -> None:
    before = answer.began
    async with await client.chat.completions.create(stream=True, **request) as chunks:
        async for chunk in chunks:
            now = time.monotonic()
            if answer.first_s:
                answer.gap_s = max(answer.gap_s, now - before)
            else:
                answer.first_s = now - answer.began
            before = now
            answer.request_id = chunk.id.removeprefix("chatcmpl-")
            answer.pieces += bool(chunk.choices[0].delta.content)
            if chunk.choices[0].finish_reason:
                answer.outcome, answer.tokens = COMPLETE, chunk.usage.completion_tokens
            elif enough.is_set():
                answer.outcome = LEFT
                return
    if answer.outcome != COMPLETE:
        raise Truncated


@dataclass
class Clients:
    """So many clients of one model, every other request of whom is a stream."""

    cluster: Deployment
    model: str
    count: int = 8
    most_tokens: int = 40
    answers: list[Answer] = field(default_factory=list)

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[Clients]:
        """Ask until the block ends, and then wait for what is under way."""
        ended = asyncio.Event()
        tasks = [asyncio.create_task(self._one(n, ended)) for n in range(self.count)]
        try:
            yield self
        finally:
            ended.set()
            await asyncio.gather(*tasks)

    async def _one(self, first: int, ended: asyncio.Event) -> None:
        async with self.cluster.async_client() as client:
            number = first
            while not ended.is_set():
                number += self.count
                answer = await ask(
                    client,
                    stream=(number // self.count) % 2 == 0,
                    model=self.model,
                    messages=[{"role": "user", "content": f"question {number}"}],
                    max_tokens=1 + 7 * number % self.most_tokens,
                    service_tier=TIERS[number % len(TIERS)],
                )
                answer.client = first
                self.answers.append(answer)
                # Not as fast as it can: what is asked for is that nobody sees anything.
                await asyncio.sleep(0.05 if answer.outcome == COMPLETE else 0.2)

    def outcomes(self, since: float = 0.0) -> Counter[str]:
        """What has become of the requests that began after a time."""
        return Counter(answer.outcome for answer in self.answers if answer.began >= since)

    def failures(self) -> list[str]:
        """What has become of the requests without a whole answer, in words."""
        return [
            f"client {one.client}: {one.outcome} after {one.seconds:.1f} s {one.error}"
            for one in self.answers
            if one.outcome != COMPLETE
        ]

    def served(self, since: float) -> bool:
        """Whether every client has got an answer that it asked for after a time."""
        again = {one.client for one in self.complete() if one.began >= since}
        return len(again) == self.count

    def complete(self) -> list[Answer]:
        """The answers that have come to their end."""
        return [answer for answer in self.answers if answer.outcome == COMPLETE]


def told(answers: Sequence[Answer]) -> str:
    """What clients saw, in one line."""
    outcomes = Counter(answer.outcome for answer in answers)
    complete = sorted(answer.seconds for answer in answers if answer.outcome == COMPLETE)
    streams = [answer for answer in answers if answer.stream and answer.first_s]
    line = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    if complete:
        middle, slowest = complete[len(complete) // 2], complete[-1]
        line += f"; answers {middle:.2f} s (slowest {slowest:.1f} s)"
    if streams:
        line += f"; longest pause in a stream {max(one.gap_s for one in streams):.2f} s"
    return line


def check_bill(cluster: Deployment, answers: Sequence[Answer], timeout_s: float = 20) -> str:
    """Assert that each answer has exactly one record, which says that it was completed, and each
    stream that was cut exactly one that says that it was not; but for one that broke off without a
    word. Blocks until the records are there.
    """
    wanted = {answer.request_id: answer for answer in answers if answer.request_id}
    deadline = time.monotonic() + SLOWEST * timeout_s
    while True:
        records = [one for one in cluster.records() if one["request_id"] in wanted]
        if len(records) >= len(wanted):
            break
        assert time.monotonic() < deadline, f"{len(wanted) - len(records)} answers on no bill"
        time.sleep(0.3)
    assert len(records) == len(wanted), "an answer is on the bill twice"
    wrong = [one for one in records if not _agrees(one, wanted[one["request_id"]])]
    assert not wrong, json.dumps(wrong[:3], default=str)
    return f"{len(records)} records, one each"


def _agrees(record: dict[str, Any], answer: Answer) -> bool:
    if answer.outcome == TRUNCATED and record["state"] == "completed":
        # The ingress died between the record, which comes first, and the last bytes. What it had
        # recorded is at least what the client had.
        return record["completion_tokens"] >= answer.pieces
    if answer.outcome != COMPLETE:
        return record["state"] in ("interrupted", "failed")
    return record["state"] == "completed" and record["completion_tokens"] == answer.tokens
