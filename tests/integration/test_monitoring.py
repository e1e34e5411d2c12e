"""A real Prometheus scrapes a running Frontline: what is asked for is there, and alerts fire."""

import asyncio
import json
import signal
from contextlib import suppress

import openai
import pytest
import ray
import yaml

from scripts.monitoring.dashboard import ROWS
from scripts.monitoring.rules import Windows, alerts, recording, rules_file
from scripts.monitoring.scrape import prometheus as prometheus_config
from tests.support import promql
from tests.support.cluster import (
    command_line,
    engine_processes,
    eventually,
    pooled_app,
    simulated_app,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

# Ray exports every ten seconds, and its agent may take seconds to show a busy cluster's metrics.
QUICK = Windows(scale=0.001, least_s=60)
EXPORTED_S = 300
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


@pytest.fixture(scope="module")
def world(frontline, tmp_path_factory):
    """Frontline with engines of all dialects, and a Prometheus with short windows beside it."""
    promql.tool("prometheus")
    frontline.deploy(watched_app(), narrow_app(), simulated_app("lost", replicas=2))
    frontline.wait_ready("watched", "narrow", "lost", timeout_s=120)
    folder = tmp_path_factory.mktemp("prometheus")
    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in ray.nodes()]
    (folder / "targets.json").write_text(json.dumps([{"targets": targets}]))
    (folder / "rules.yml").write_text(yaml.safe_dump(rules_file(QUICK)))
    config = prometheus_config(str(folder / "targets.json"))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with promql.running(folder / "prometheus.yml") as prometheus:
        yield frontline, prometheus
    frontline.remove("watched", "narrow", "lost")


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


def kill_engines(app):
    killed = 0
    for process in engine_processes():
        if f"test/{app}" in command_line(process):
            process.send_signal(signal.SIGKILL)
            killed += 1
    return killed


def test_alerts_fire_for_the_faults_they_are_for(world):
    frontline, prometheus = world

    def fires(name, **labels):
        firing = prometheus.firing().get(name, {})
        return labels.items() <= firing.items() and bool(firing)

    assert not fires("FrontlinePriorityShed") and not fires("FrontlineEngineRestarting")
    assert kill_engines("lost") == 2
    client = frontline.client()
    with client.chat.completions.create(
        model="narrow", messages=MESSAGES, stream=True, max_tokens=60
    ) as running:
        next(iter(running))
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(
                model="narrow", messages=MESSAGES, service_tier="priority"
            )
    eventually(lambda: fires("FrontlinePriorityShed", model="test/narrow"), EXPORTED_S)
    eventually(lambda: fires("FrontlineEngineRestarting", model="test/lost"), EXPORTED_S)
    assert not fires("FrontlineBilledNotEchoed") and not fires("FrontlineAbsent")
