"""The board over a real deployment of two ingresses: it says what the benchmark, the bill and the
metrics say, and goes on while ingresses are replaced."""

import asyncio
import itertools
import re
from bisect import bisect_left
from collections import Counter
from decimal import Decimal
from functools import partial

import httpx
import pytest

from app.contracts.traffic import TTFT_BOUNDS_S
from scripts.bench.load import Endpoint, Load, Workload
from scripts.bench.summary import percentile
from scripts.bench.targets import FRONTLINE_TIERS
from scripts.bench.trial import Plan, run_trial
from tests.support.cluster import (
    PLAIN,
    eventually_async,
    ingress_app,
    ingress_processes,
    running_ingresses,
    simulated_app,
)
from tests.support.scrape import sums
from tests.support.viewer import looking
from tests.support.waiting import PATIENCE_S, SLOWEST

pytestmark = pytest.mark.integration

APP = "seen"
MODEL = f"test/{APP}"
SLOTS = 4
SLO = {"priority": {"ttft_ms": 10_000}, "default": {"ttft_ms": 20}}
WORKLOAD = Workload(prompt_words=12, tokens=24, spread=0.5)
PLAN = Plan(
    clients=12, idle_requests=10, alone_s=2.0, together_s=4.0, rate=5.0, share=0.0, regular=True,
    most=10_000,
)  # fmt: skip


@pytest.fixture(scope="module")
def two(frontline):
    """Two ingresses, and a model that sheds flex as soon as its slots are taken."""
    queue = {"flex": {"max_waiting": 0}, "default": {"max_waiting": 100}}
    frontline.deploy(
        ingress_app(replicas=2),
        simulated_app(
            APP, settings={"queue": queue, "slo": SLO}, slots=SLOTS, tokens_per_second=100
        ),
    )
    frontline.wait_ready(APP)
    yield frontline
    frontline.remove(APP)
    frontline.restore_ingress()


BROWSER = {"accept": "text/html"}
# A tier by a word that there is not here.
TIERS = {**FRONTLINE_TIERS, "scale": {"service_tier": "scale"}}
# What clients asked for, by the tier that served it.
MEMBERS = {"priority": {"priority"}, "default": {"default", "scale"}}


def endpoint(two):
    return Endpoint("frontline", two.base_url, APP, "none", TIERS)


def bill(two):
    return [record for record in two.records(model=MODEL)]


def requests(state):
    return sum(one["requests"] for one in state.get("totals", {}).values())


async def settled(two, viewer):
    """Wait until board and bill have the same requests, and return the board's state."""

    def agree():
        records = [r for r in bill(two) if r["state"] != "open"]
        served = sum(r["served_tier"] is not None for r in records)
        shed = sum(r["state"] == "shed" for r in records)
        state = viewer.latest(APP)
        return requests(state) == served and sum(state["sheds"].values()) == shed and state

    await eventually_async(lambda: running_ingresses() == 2, 60)
    return await eventually_async(agree, 30)


def ticked(viewer, count):
    return len(viewer.ticks) > count


async def send(two, tier, count):
    load = Load(endpoint(two), WORKLOAD, most=count)
    try:
        await asyncio.gather(*(load.ask(tier, "test") for _ in range(count)))
    finally:
        await load.close()
    assert not [answer.error for answer in load.answers if answer.error]


def bucket(seconds):
    return bisect_left(TTFT_BOUNDS_S, seconds)


async def meanwhile(load, tier):
    while True:
        await load.ask(tier, tier, tokens=2)
        await asyncio.sleep(0.05)


def metrics(labels, name):
    """Sum a metric over both ingresses, by the values of labels.

    Zeros are left out, and requests that no engine received: sheds are compared by reason.
    """
    found = Counter()
    for key, value in sums(f"ray_frontline_{name}", labels, model=MODEL).items():
        found[key[0] if len(key) == 1 else key] += round(value, 9)
    return {key: value for key, value in found.items() if key and value}


def agrees_with_metrics(state):
    """Whether Ray has exported what the board shows; it does so every ten seconds."""
    totals = {tier: one for tier, one in state["totals"].items() if one["requests"]}
    wanted = {
        ("sheds_total", ("reason",)): state["sheds"],
        ("downgrades_total", ("reason",)): state["downgrades"],
        ("requests_total", ("served_tier",)): {
            tier: one["requests"] for tier, one in totals.items()
        },
        ("cost_usd_total", ("tier",)): {
            tier: pytest.approx(float(one["cost"])) for tier, one in totals.items()
        },
        ("slo_requests_total", ("tier", "met")): {
            (tier, met): count
            for tier, one in state["slo"].items()
            for met, count in zip(("true", "false"), one["total"], strict=True)
            if count
        },
    }
    differing = {
        name: (found, shown)
        for (name, labels), shown in wanted.items()
        if (found := metrics(labels, name)) != shown
    }
    print(f"board and metrics differ: {differing}")
    return not differing


def model_page_agrees(two, state):
    """Whether the model's page shows what the board shows, whichever ingress answers."""
    counts = [one["requests"] for one in state["totals"].values()]
    wanted = [f"{count:,} request{'' if count == 1 else 's'}" for count in counts]
    for _ in range(4):
        page = httpx.get(
            f"{two.root}/models/{APP}", headers=BROWSER, verify=PLAIN, timeout=PATIENCE_S
        ).text
        found = re.findall(r"[\d,]+ requests?(?=</p>)", page)
        if found != wanted:
            print(f"the page says {found}, and the board {wanted}")
            return False
    return True


@pytest.mark.timeout(300)
async def test_it_says_what_the_benchmark_the_bill_and_the_metrics_say(two):
    flex = Load(endpoint(two), WORKLOAD, most=10_000)
    with looking(two.root) as viewer:
        tasks = [asyncio.ensure_future(meanwhile(flex, tier)) for tier in ("flex", "scale")]
        trial = await run_trial(endpoint(two), WORKLOAD, PLAN, print)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await flex.close()
        state = await settled(two, viewer)
    for tier in ("priority", "default"):
        waits = [r["ttft_s"] for r in bill(two) if r["served_tier"] == tier and r["ttft_s"]]
        answers = [a for a in trial.answers + flex.answers if a.tier in MEMBERS[tier]]
        seen = [answer.ttft for answer in answers if not answer.error]
        for share, name in ((0.5, "ttft_p50_s"), (0.99, "ttft_p99_s")):
            exact, shown = percentile(waits, share), state["totals"][tier][name]
            assert abs(bucket(exact) - bucket(shown)) <= 1, (tier, name, exact, shown)
            # A client sees the proxy as well, tokens rather than the first byte, and its own delay.
            assert bucket(percentile(seen, share)) >= bucket(shown) - 1, (tier, name)
    assert state["downgrades"]["no_such_tier"] > 5 and trial.sheds == []
    assert state["slo"]["priority"]["kept"] is True, "a second for each was enough"
    assert state["slo"]["default"]["total"][1] > 0, "default has waited"
    await eventually_async(partial(agrees_with_metrics, state), 60)
    await eventually_async(partial(model_page_agrees, two, state), 30)
    assert flex.sheds, "flex was to be shed"
    # One more may have been on its way when its client was stopped.
    assert sum(state["sheds"].values()) - len(flex.sheds) in (0, 1)
    for tier, total in state["totals"].items():
        records = [r for r in bill(two) if r["served_tier"] == tier]
        assert Decimal(total["cost"]) == sum(Decimal(r["cost"]) for r in records)
        assert total["completion_tokens"] == sum(r["completion_tokens"] for r in records)
    answered = [a for a in trial.answers + flex.answers if not a.error]
    tokens = sum(total["completion_tokens"] for total in state["totals"].values())
    # Clients that were stopped in the middle are billed for what was generated.
    assert 0 <= tokens - sum(a.tokens for a in answered) <= (PLAN.clients + 2) * 40
    [replica] = state["replicas"]
    assert replica["slots"] == SLOTS
    assert max(sum(one[1][1][:1]) for one in viewer.points[APP]) > 0, "default was seen to wait"


@pytest.mark.timeout(240)
async def test_it_goes_on_while_every_ingress_is_replaced(two):
    await eventually_async(lambda: running_ingresses() == 2, 60)
    with looking(two.root) as viewer:
        await send(two, "priority", 10)
        before = await settled(two, viewer)
        # One of them answers the viewer.
        for old in ingress_processes():
            connections, ticks = viewer.connections, len(viewer.ticks)
            old.kill()
            await asyncio.to_thread(old.wait, 30)
            await eventually_async(lambda: running_ingresses() == 2, 60)
            await eventually_async(partial(ticked, viewer, ticks + 2), 30)
            assert viewer.connections >= connections
        assert viewer.connections > 1, "one of them has answered the viewer"
        await send(two, "default", 10)
        after = await settled(two, viewer)
    assert requests(after) == requests(before) + 10
    seen = [requests(state) for state in viewer.states[APP]]
    assert seen == sorted(seen), "no total falls"
    times = [point[0] for point in viewer.points[APP]]
    assert times == sorted(set(times))
    gaps = [late - early for early, late in itertools.pairwise(times)]
    assert max(gaps) < SLOWEST * 5, "the Model has recorded all the while"
