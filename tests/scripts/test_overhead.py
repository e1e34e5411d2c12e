"""The overhead benchmark: what its mock engine says, and what it makes of what was measured."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from contextlib import asynccontextmanager

import pytest

from app.protocol.sse import EventReader, parse_block
from app.upstream.pool import Connections
from deployments.engines.base import Launch
from deployments.engines.registry import adapter_named
from deployments.replica import LocalEngine
from scripts.bench import mock_engine, overhead_report
from scripts.bench.drive import Sample
from scripts.bench.overhead_report import BARE, FLOOR, FRONTLINE, Checked, goals_of, rows_of

pytestmark = pytest.mark.unit


@asynccontextmanager
async def served(key=None):
    routes = mock_engine.side_routes("mock")
    server = await asyncio.get_running_loop().create_server(
        lambda: mock_engine.Connection(routes, key), "127.0.0.1", 0
    )
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def engine(key=None):
    connections = Connections()
    async with served(key) as url:

        async def post(key, **fields):
            body = json.dumps({"model": "mock", "messages": [], **fields}).encode()
            head = (
                b"POST /v1/chat/completions HTTP/1.1\r\nauthorization: Bearer %b\r\n"
                b"content-length: %d\r\n\r\n" % (key, len(body))
            )
            connection = await connections.take(url)
            response = await connection.send(head, body, 5.0)
            answer = response.status, await response.read()
            connections.give_back(url, connection)
            return answer

        try:
            yield post
        finally:
            connections.close()


def data(wire):
    return [event.data for block in EventReader().blocks(wire) if (event := parse_block(block))]


async def test_the_mock_engine_answers_as_it_is_asked():
    async with engine() as post:
        status, body = await post(b"none")
        assert (status, json.loads(body)["usage"]["prompt_tokens"]) == (200, 42)

        _, wire = await post(b"none", stream=True, max_tokens=5)
        *chunks, done = data(wire)
        assert (len(chunks), done) == (6, b"[DONE]")
        assert not any("usage" in json.loads(chunk) for chunk in chunks)

        options = {"include_usage": True, "continuous_usage_stats": True}
        _, wire = await post(b"none", stream=True, max_tokens=5, stream_options=options)
        told = [json.loads(chunk)["usage"]["completion_tokens"] for chunk in data(wire)[:-1]]
        assert told == [0, 1, 2, 3, 4, 5, 5]


async def test_the_mock_engine_paces_and_wants_its_key():
    async with engine(b"secret") as post:
        assert (await post(b"none"))[0] == 401
        loop = asyncio.get_running_loop()
        began = loop.time()
        prompt = [{"role": "user", "content": "paced"}]
        status, wire = await post(b"secret", stream=True, max_tokens=10, messages=prompt)
        assert (status, len(data(wire))) == (200, 12)
        assert loop.time() - began >= 11 * mock_engine.PACE_S * 0.99


async def test_the_adapter_of_the_simulated_engine_reads_the_mock_engines_facts():
    # The overhead benchmark puts the mock engine where a pool starts a simulated engine.
    launch = Launch("mock", "mock", "127.0.0.1", 0, 8, "secret", sys.executable)
    async with served(b"secret") as url:
        facts = await adapter_named("simulated").inspect(launch, LocalEngine(url, "secret"))
    assert (facts.version, facts.dialect.preempts) == (mock_engine.VERSION, False)
    assert facts.dialect.native_priority


def unary(gateway, requests, cpu_s):
    told = {"requests": requests, "seconds": 2.0, "p50_s": 0.01, "p99_s": 0.02, "errors": 0}
    return Sample("unary 16", gateway, told, cpu_s, requests, 0, 100.0)


def paced(gateway, gap_s, busy=0.5):
    told = {"streams": 0, "events": 100, "every_event": 200, "seconds": 1.0, "gap_p99_s": gap_s}
    told |= {"first_p50_s": 0.0, "first_p99_s": 0.0, "broken": 0}
    cpu_s = {"ingress": 0.002, "HAProxy": 0.002, "passthrough": 0.004, "gateway": 0.002}
    return Sample("paced 256", gateway, told, cpu_s, 0, 200, 100.0, busy)


def test_rows_are_medians_and_goals_are_ratios():
    samples = [
        unary(FRONTLINE, n, {"ingress": n * 5e-4, "HAProxy": n * 1e-4, "controller": 9.0})
        for n in (1000, 1800, 9000)
    ]
    samples += [unary(BARE, n, {"passthrough": 1.0}) for n in (2000, 2000, 100)]
    samples += [paced(FLOOR, 0.012), paced(FRONTLINE, 0.030), paced(BARE, 0.02, busy=0.7)]
    samples += [paced("smg", 0.01)]
    rows = {(row.gateway, row.load): row for row in rows_of(samples)}
    mine = rows[FRONTLINE, "unary 16"]
    assert mine.per_s == 900
    assert mine.cpu_s == pytest.approx(6e-4) and mine.own_cpu_s == pytest.approx(5e-4)
    assert rows[FRONTLINE, "paced 256"].added_s == pytest.approx(0.018)
    # The core of the one was so busy that its events came together.
    assert not rows[FRONTLINE, "paced 256"].merged and rows[BARE, "paced 256"].merged
    assert not mine.merged, "its load is not paced"
    assert math.isnan(rows[BARE, "unary 16"].gap_p99_s)

    verdicts = {goal.what: goal.met for goal in goals_of(list(rows.values()), [])}
    assert verdicts["unary 16: at least 0.85 x bare Serve"] is True
    assert verdicts["unary 16: at least 10 x litellm"] is None, "it was not measured"
    assert verdicts["paced 256: ingress CPU of an event, us: at most 20"] is True
    assert verdicts["paced 256: CPU of an event: at most 1.6 x smg"] is False
    assert verdicts["paced 256: CPU of an event: at most 0.8 x bare Serve"] is True
    markdown = overhead_report.markdown(list(rows.values()), [])
    assert "| unary 16 | Frontline | 900 |" in markdown
    assert [line.split(" | ")[1] for line in markdown.splitlines() if "*" in line] == [BARE]


@pytest.mark.parametrize(("megabytes", "met"), [(0.001, True), (20.0, False)])
def test_memory_is_flat_or_not(megabytes, met):
    points = [(n * 20_000, 100 + n * megabytes) for n in range(1, 11)]
    [goal] = [goal for goal in goals_of([], points) if goal.what.startswith("memory")]
    assert goal.met is met


def test_a_run_is_sound_only_if_nothing_is_missing():
    assert Checked(10, 12, 13, 0, 0).sound
    assert not Checked(10, 9, 13, 0, 0).sound, "an answer without its record"
    assert not Checked(10, 12, 13, 1, 0).sound, "a record of another tier"
    assert not Checked(10, 12, 13, 0, 1).sound, "an answer without its tier"
