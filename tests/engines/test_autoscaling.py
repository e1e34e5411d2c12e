"""Real vLLM on the CPU, scaled by actual load (1 -> 2 -> 1) while streams run."""

import asyncio
import json
import os
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from app.cli.board import Sight, make_frame
from tests.faults.clients import COMPLETE, Answer, Clients, check_bill, told
from tests.support.cluster import actors_titled, eventually_async, ingress_app
from tests.support.waiting import PATIENCE_S

LONG = os.environ.get("FRONTLINE_FAULTS") == "long"
CONFIG = Path(__file__).parents[2] / "configs" / "autoscaling.yaml"
# Priority gets what it uses and the headroom, and no more: a slot that was enough a moment ago is
# not kept for what may come. Otherwise the second engine would stay for minutes.
QUICK = {
    "scale_down_after_s": 5,
    "smoothing_s": 10,
    "priority_wait_probability": 0.9,
    "priority_memory_s": 0,
}
# Three streams on two engines of two slots each: whichever is stopped has one at least. It takes
# some ten seconds.
STREAMS = 3
TOKENS = 200

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def scaled_app(most=2, **engine_args):
    """The model of configs/autoscaling.yaml, with two slots an engine and less patience."""
    apps = yaml.safe_load(CONFIG.read_text())["applications"]
    [app] = (app for app in apps if app["name"] == "smollm2")
    app["name"] = "scaled"
    app["args"] |= {"id": "test/scaled", "aliases": ["scaled"]}
    app["args"]["pools"][0]["slots"] = 2
    app["args"]["pools"][0]["engine_args"] |= engine_args
    model, pool = app["deployments"]
    model["user_config"]["scaling"] = QUICK
    pool["autoscaling_config"] |= {"min_replicas": 1, "max_replicas": most}
    return app


@pytest.fixture(scope="module")
def scaled(cluster):
    cluster.deploy(ingress_app(), scaled_app())
    cluster.wait_ready("scaled", timeout_s=300)
    yield cluster
    cluster.remove("scaled")


@dataclass
class Stream:
    """What one stream came to: its tokens one by one, and what its usage says there were."""

    request_id: str = ""
    tokens: int = 0
    usage: int = 0
    done: bool = False
    ended: float = 0.0


async def read_stream(client, number):
    """Read a stream to its end; each token is told by its logprob, however many a chunk has."""
    stream = Stream()
    body = {
        "model": "scaled",
        "messages": [{"role": "user", "content": f"Tell me a long story, number {number}."}],
        "service_tier": "flex",
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "max_tokens": TOKENS,
        "ignore_eos": True,
    }
    async with client.stream("POST", "/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                stream.done = True
            elif line.startswith(":"):
                assert line == ": keep-alive"  # a busy machine is slow to begin
            elif line:
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                stream.request_id = chunk["id"].removeprefix("chatcmpl-")
                stream.usage = (chunk.get("usage") or {}).get("completion_tokens", 0)
                for choice in chunk["choices"]:
                    stream.tokens += len((choice.get("logprobs") or {}).get("content") or ())
    stream.ended = time.monotonic()
    return stream


@asynccontextmanager
async def streaming(cluster):
    """Have so many streams at any time, at flex, for which no engine is started or kept."""
    streams, stop = [], asyncio.Event()

    async def keep_streaming(client, number):
        while not stop.is_set():
            streams.append(await read_stream(client, number))

    async with (
        httpx.AsyncClient(base_url=cluster.base_url, timeout=PATIENCE_S) as client,
        asyncio.TaskGroup() as tasks,
    ):
        for number in range(STREAMS):
            tasks.create_task(keep_streaming(client, number))
        try:
            yield streams
        finally:
            stop.set()


def rows(cluster):
    """The replicas as ``frontline top`` shows them, by name."""
    [frame] = make_frame({"scaled": Sight("RUNNING", cluster.board("scaled"))}, {})
    return {row.replica_id: row for row in frame.replicas}


def draining(cluster):
    return [row for row in rows(cluster).values() if row.draining]


async def test_a_real_engine_comes_and_goes_with_the_load_and_cuts_no_stream(scaled):
    stop, engines = asyncio.Event(), set()

    async def keep_asking(client):
        while not stop.is_set():
            answer = await client.chat.completions.create(
                model="scaled",
                messages=[{"role": "user", "content": "Tell me a story."}],
                service_tier="priority",
                max_tokens=32,
            )
            assert answer.service_tier == "priority" and answer.usage.completion_tokens
            # The engine that starts needs the machine too.
            await asyncio.sleep(0.5)

    def ready():
        replicas = scaled.snapshot("scaled").replicas
        engines.update(replica.replica_id for replica in replicas)
        return len(replicas)

    async with scaled.async_client() as client, asyncio.TaskGroup() as clients:
        for _ in range(2):
            clients.create_task(keep_asking(client))
        try:
            await eventually_async(lambda: ready() == 2, 240)
        finally:
            stop.set()
    start_s = max(replica.start_s for replica in scaled.snapshot("scaled").replicas)
    assert start_s > 2, "a real engine takes its time"
    async with streaming(scaled) as streams:
        # It stays for as long as one takes to start, then it is stopped.
        [stopped] = await eventually_async(lambda: draining(scaled), 60 + 3 * start_s)
        told_to_stop = time.monotonic()
        assert stopped.running > 0 and stopped.slots == stopped.credits == 0
    assert ready() == 1 and len(engines) == 2
    longest_s = max(stream.ended for stream in streams) - told_to_stop
    print(f"{len(streams)} streams; the last ended {longest_s:.0f} s after {stopped} had to stop")
    await asyncio.to_thread(check_whole, scaled, streams)
    await eventually_async(lambda: not draining(scaled))
    # Its process has stopped the engine, and ended.
    await eventually_async(lambda: len(actors_titled("ray::ServeReplica:scaled:vllm")) == 1, 30)


def check_whole(cluster, streams):
    """Assert that each stream had every token, its usage and its end, and has one record."""
    assert all(stream.done for stream in streams)
    assert {stream.tokens for stream in streams} == {TOKENS}
    assert {stream.usage for stream in streams} == {TOKENS}
    answers = [
        Answer(0.0, True, COMPLETE, stream.request_id, stream.usage, 0.0, 0.0, 0.0)
        for stream in streams
    ]
    print(check_bill(cluster, answers))


@pytest.mark.skipif(not LONG, reason="an engine more to start: FRONTLINE_FAULTS=long")
async def test_a_rolling_update_of_a_real_engine_is_seen_by_nobody(scaled):
    scaled.deploy(scaled_app(most=1))
    await eventually_async(lambda: len(ids(scaled)) == 1, 60)
    before, clients = ids(scaled), Clients(scaled, "scaled", count=3, most_tokens=20)
    async with clients.asking():
        await asyncio.to_thread(scaled.deploy, scaled_app(most=1, max_model_len=2048))
        await eventually_async(lambda: ids(scaled) and not ids(scaled) & before, 240)
        await eventually_async(lambda: not draining(scaled), 60)
    print(told(clients.answers))
    assert set(clients.outcomes()) == {COMPLETE}
    print(await asyncio.to_thread(check_bill, scaled, clients.answers))


def ids(cluster):
    return {replica.replica_id for replica in cluster.snapshot("scaled").replicas}
