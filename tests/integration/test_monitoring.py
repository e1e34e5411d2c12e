"""A real Prometheus scrapes a running Frontline: what is asked for is there, and alerts fire."""

import asyncio
import json
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx
import openai
import pytest
import ray
import yaml

from deployments.hosting.telemetry import READ_EVERY_S
from scripts.monitoring.dashboard import ROWS
from scripts.monitoring.rules import Windows, alerts, recording, rules_file
from scripts.monitoring.scrape import prometheus as prometheus_config
from tests.support import promql
from tests.support.cluster import (
    command_line,
    engine_processes,
    eventually,
    ledger_url,
    pooled_app,
    simulated_app,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

# Ray exports every ten seconds, and its agent may take seconds to show a busy cluster's metrics.
QUICK = Windows(scale=0.001, least_s=60)
EXPORTED_S = 120
DIALECTS = {name: {"dialect": name, "slots": 4} for name in ("vllm", "sglang", "tensorrt_llm")}
SLO = {tier: {"ttft_ms": 60_000} for tier in ("priority", "default", "flex")}
MESSAGES = [{"role": "user", "content": "Say something."}]


def watched_app():
    app = pooled_app("watched", DIALECTS, {"slo": SLO})
    app["deployments"][1] |= {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}}
    del app["deployments"][1]["num_replicas"]
    return app | {"autoscaling_policy": {"policy_function": "app.autoscaling:priority_aware"}}


def narrow_app():
    """One slot for all, and no queue: whoever comes second is turned away."""
    queue = {"headroom": 0} | {
        tier: {"max_waiting": 0, "reserved": 0} for tier in ("priority", "default", "flex")
    }
    return simulated_app(
        "narrow", settings={"queue": queue}, slots=1, tokens_per_second=2, preemption=False
    )


def asleep_app():
    """No replica until somebody asks, and then none for minutes."""
    bounds = {"min_replicas": 0, "max_replicas": 1, "initial_replicas": 0}
    app = pooled_app("asleep", {"pool": {"autoscaling": bounds, "startup_seconds": 600}})
    return app | {"autoscaling_policy": {"policy_function": "app.autoscaling:priority_aware"}}


def faulty_apps():
    yield narrow_app()
    yield simulated_app("lost", replicas=2)
    yield simulated_app(
        "late", settings={"slo": {"default": {"ttft_ms": 1}}}, first_token_seconds=0.1
    )
    failures = {"request": "truncate", "after_tokens": 2}
    yield simulated_app("broken", failures=failures)
    yield asleep_app()


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """The file that names what Prometheus scrapes."""
    return tmp_path_factory.mktemp("prometheus") / "targets.json"


@pytest.fixture(scope="module")
def world(frontline, targets):
    """Frontline with engines of all dialects, and a Prometheus with short windows beside it."""
    promql.tool("prometheus")
    apps = [watched_app(), *faulty_apps()]
    frontline.deploy(*apps)
    frontline.wait_ready(*(app["name"] for app in apps), timeout_s=120)
    folder = targets.parent
    ports = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]
    targets.write_text(json.dumps([{"targets": ports}]))
    (folder / "rules.yml").write_text(yaml.safe_dump(rules_file(QUICK)))
    config = prometheus_config(str(targets))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with promql.running(folder / "prometheus.yml") as prometheus:
        yield frontline, prometheus
    frontline.remove(*(app["name"] for app in apps))


async def load(frontline):
    """Send a little of everything."""
    async with frontline.async_client() as client:

        async def stream(tier):
            answer = await client.chat.completions.create(
                model="watched", messages=MESSAGES, service_tier=tier, stream=True, max_tokens=4
            )
            async for _ in answer:
                pass

        tiers = ("priority", "default", "flex") * 8
        await asyncio.gather(*map(stream, tiers))
        with suppress(openai.NotFoundError):
            await client.chat.completions.create(model="nowhere", messages=MESSAGES)


def expressions():
    yield from (expr for row in ROWS for panel in row.panels for expr in panel.queries.values())
    yield from (rule["expr"] for rule in recording(QUICK))
    yield from (alert.expr for alert in alerts(QUICK))


def test_every_selector_of_every_panel_and_alert_matches_a_series(world):
    frontline, prometheus = world
    asyncio.run(load(frontline))
    missing = {one for expr in expressions() for one in promql.selectors(expr)}
    # An error of a request has not happened yet.
    missing = {one for one in missing if 'error_type!=""' not in one}
    assert len(missing) > 60

    def all_there():
        nonlocal missing
        missing = {one for one in missing if not prometheus.query(f"count({one})")}
        return not missing

    with suppress(AssertionError):
        eventually(all_there, EXPORTED_S)
    took = prometheus.query("scrape_duration_seconds"), prometheus.query("up")
    assert missing == set(), took
    # What was sent is what is seen, and every panel's query is valid.
    served = 'sum by (served_tier) (ray_frontline_requests_total{model="test/watched"})'
    series = prometheus.query(served)
    counts = {one["metric"]["served_tier"]: float(one["value"][1]) for one in series}
    assert counts == {"priority": 8, "default": 8, "flex": 8}
    for row in ROWS:
        for panel in row.panels:
            for expr in panel.queries.values():
                prometheus.query(expr.replace("$model", ".*").replace("$__rate_interval", "30s"))


NEVER = {"FrontlineBilledNotEchoed", "FrontlineJournalGrows"}
"""The first is a bug, and the second takes thousands of requests: promtool tests them."""
STOPPED_S = READ_EVERY_S + 1
"""So long engines stand still before their end, so that their replicas wait for answers by then:
one for the metrics and one of the preemption watch. Both are lost, with an alarm and a failure."""


def kill_engines(app):
    engines = [one for one in engine_processes() if f"test/{app}" in command_line(one)]
    for process in engines:
        process.send_signal(signal.SIGSTOP)
    time.sleep(STOPPED_S)
    for process in engines:
        process.send_signal(signal.SIGKILL)
    return len(engines)


def shed_priority(frontline):
    """Fill the only slot of a model without a queue, and ask for it as priority."""
    client = frontline.client()
    with client.chat.completions.create(
        model="narrow", messages=MESSAGES, stream=True, max_tokens=60
    ) as running:
        next(iter(running))
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(
                model="narrow", messages=MESSAGES, service_tier="priority"
            )


async def go_wrong(frontline, stop):
    """Until ``stop``: streams that are late, lowered or broken off, and one that wakes a model."""
    async with frontline.async_client() as client, asyncio.TaskGroup() as tasks:

        async def stream(model, tier="default"):
            answer = await client.chat.completions.create(
                model=model, messages=MESSAGES, service_tier=tier, stream=True, max_tokens=8
            )
            async for _ in answer:
                pass

        async def wake():
            while True:
                with suppress(openai.APIError):
                    await stream("asleep")
                await asyncio.sleep(1)

        waking = tasks.create_task(wake())
        while not stop.is_set():
            await stream("late")
            await stream("fcfs", "priority")
            await asyncio.to_thread(break_off, frontline)
            await asyncio.sleep(1)
        waking.cancel()


def break_off(frontline):
    """Send a message whose stream ends before its engine has counted the tokens."""
    asked = {"model": "broken", "messages": MESSAGES, "max_tokens": 8, "stream": True}
    with frontline.http() as http, suppress(httpx.HTTPError):
        http.post("/v1/messages", json=asked)


@contextmanager
def faults(frontline, prometheus):
    """Let everything go wrong that there is an alert for; yields a check that it goes on."""
    assert kill_engines("lost") == 2
    shed_priority(frontline)
    folder = Path(ledger_url().removeprefix("sqlite:///")).parent
    damaged = folder / "journal" / "of-a-dead-ingress.damaged"
    damaged.mkdir()
    stop = threading.Event()
    with (
        closing(sqlite3.connect(folder / "usage.db", isolation_level=None)) as database,
        ThreadPoolExecutor(1) as aside,
    ):
        going = aside.submit(asyncio.run, go_wrong(frontline, stop))
        try:
            # While the database is away, nobody looks at the journals of others.
            found = 'ray_frontline_journals_stuck{state="set_aside"} == 1'
            eventually(lambda: prometheus.query(found), 60)
            database.execute("BEGIN EXCLUSIVE")
            yield lambda: going.done() and going.result()
            database.execute("ROLLBACK")
        finally:
            stop.set()
            damaged.rmdir()
            going.result()


def test_alerts_fire_for_the_faults_they_are_for(world):
    frontline, prometheus = world
    expected = {alert.name for alert in alerts(QUICK)} - NEVER - {"FrontlineAbsent"}
    assert not prometheus.firing().keys() & {"FrontlinePriorityShed", "FrontlineEngineRestarting"}
    began = time.monotonic()

    def until_now():
        # Some have ended before the last fault is there.
        return prometheus.fired(time.monotonic() - began)

    def all_fired():
        check()
        return expected <= until_now().keys()

    with faults(frontline, prometheus) as check, suppress(AssertionError):
        eventually(all_fired, EXPORTED_S)
    fired = until_now()
    # A busy machine may leave Ray's agent no time to show any metrics for a while.
    assert fired.keys() - {"FrontlineAbsent"} == expected
    assert fired["FrontlinePriorityShed"]["model"] == "test/narrow"
    assert fired["FrontlineEngineRestarting"]["model"] == "test/lost"
    assert fired["FrontlinePriorityDowngraded"]["reason"] == "no_replica_honours_priority"
    assert fired["FrontlineSloBurnsFast"]["model"] == "test/late"
    assert fired["FrontlineUsageEstimated"]["model"] == "test/broken"
    assert fired["FrontlineNoEngine"]["model"] == "test/asleep"


def test_an_alert_fires_where_nothing_is_scraped(world, targets):
    _, prometheus = world
    targets.write_text("[]")
    eventually(lambda: "FrontlineAbsent" in prometheus.firing(), EXPORTED_S)
