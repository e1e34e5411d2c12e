"""While streams run everything is changed around them, and nobody notices."""

import asyncio
import os
import time

import pytest

from app.cli.board import Sight, make_frame
from tests.faults.clients import COMPLETE, LEFT, Clients, ask, check_bill, told
from tests.support.cluster import (
    command_line,
    engine_processes,
    eventually,
    eventually_async,
    ingress_app,
    running_ingresses,
    simulated_app,
)
from tests.support.waiting import SLOWEST

LONG = os.environ.get("FRONTLINE_FAULTS") == "long"
TOKENS_PER_S = 20
# In the long form streams outlast a HAProxy that was replaced and left to Serve's default (120 s),
# and come to their end. In the short form they go on until everything has been changed, however
# busy the machine is, and for longer than Serve's own patience with an ingress that stops (20 s);
# then their clients leave.
STREAM_S = 190 if LONG else 390
PATIENCE_S = 25
STREAMS = 6

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


def steady(replicas=2, *, tokens=8, price=2, **args):
    """The model; another number of tokens is another engine argument."""
    return simulated_app(
        "steady",
        replicas=replicas,
        slots=16,
        tokens_per_second=TOKENS_PER_S,
        context_length=8192,
        default_completion_tokens=tokens,
        settings={"rate_card": {"input": 1, "cached_input": 0.5, "output": price}},
        **args,
    )


@pytest.fixture(scope="module")
def cluster_of_two(cluster):
    """Two ingresses, and a model with two replicas."""
    cluster.deploy(ingress_app(replicas=2), steady())
    eventually(lambda: known(cluster, replicas=2), 90, "not ready")
    yield cluster
    cluster.remove("steady")
    cluster.restore_ingress()


def known(cluster, replicas, ingresses=2):
    if not cluster.serves_everywhere("steady"):
        return False
    board = cluster.board("steady")
    return len(board.snapshot.replicas) == replicas and len(board.ingresses) == ingresses


def ids(cluster):
    return {replica.replica_id for replica in cluster.snapshot("steady").replicas}


def rows(cluster):
    """The replicas as ``frontline top`` shows them."""
    [frame] = make_frame({"steady": Sight("RUNNING", cluster.board("steady"))}, {})
    return frame.replicas


async def long_streams(cluster, enough):
    """Begin streams on every ingress and every replica; returns what will become of them."""

    async def one(number):
        async with cluster.async_client() as client:
            return await ask(
                client,
                stream=True,
                enough=enough,
                model="steady",
                messages=[{"role": "user", "content": f"a long story, number {number}"}],
                max_tokens=STREAM_S * TOKENS_PER_S,
                timeout=600,
            )

    streams = []
    # HAProxy gives a new ingress its share only once it has heard of it.
    while len(streams) < STREAMS or not everywhere(cluster):
        assert len(streams) < 30, "not every ingress and every replica has a stream"
        streams.append(asyncio.create_task(one(len(streams))))
        await asyncio.sleep(0.2)
    return streams


def everywhere(cluster):
    """Whether every ingress and every replica has a stream."""
    ingresses = [one.demand.running for one in cluster.board("steady").ingresses]
    running = [sum(one.values()) for one in ingresses] + [row.running for row in rows(cluster)]
    return len(running) == 4 and min(running) > 0


async def change(clients, phases, what, done, *apps):
    """Deploy a change while clients ask, and wait until it is done."""
    phases.append((what, time.monotonic()))
    await asyncio.to_thread(clients.cluster.deploy, *apps)
    await eventually_async(done, 90)
    print(f"{what}: done after {time.monotonic() - phases[-1][1]:.1f} s")


def print_phases(clients, phases):
    """Print what clients saw from each change to the next."""
    ends = [began for _, began in phases[1:]] + [float("inf")]
    for (what, began), end in zip(phases, ends, strict=True):
        print(f"{what}: {told([one for one in clients.answers if began <= one.began < end])}")


async def test_nothing_that_is_changed_cuts_a_stream(cluster_of_two):
    cluster, began, enough = cluster_of_two, time.monotonic(), asyncio.Event()
    streams = await long_streams(cluster, enough)
    before = ids(cluster)
    clients, phases = Clients(cluster, "steady", count=4, most_tokens=20), []
    async with clients.asking():
        await change(
            clients,
            phases,
            "ingress 2 to 1",
            lambda: running_ingresses() == 1,
            ingress_app(replicas=1),
        )
        await change(clients, phases, "a new price", lambda: price(cluster) == 3, steady(price=3))
        await change(clients, phases, "a model added", lambda: True, simulated_app("other"))
        await change(
            clients, phases, "replicas 2 to 1", lambda: len(ids(cluster)) == 1, steady(1, price=3)
        )
        await drained_only(cluster, before - ids(cluster))
        await change(
            clients,
            phases,
            "other engine arguments",
            lambda: ids(cluster) and not ids(cluster) & before,
            steady(1, tokens=9, price=3),
        )
        await eventually_async(lambda: cluster.entry("other"))
        phases.append(("that model removed", time.monotonic()))
        await asyncio.to_thread(cluster.remove, "other")
        await change(
            clients,
            phases,
            "ingress 1 to 2",
            lambda: running_ingresses() == 2,
            ingress_app(replicas=2),
        )
        print(f"all of it {time.monotonic() - began:.1f} s after the streams began")
        ended = [stream.result().outcome for stream in streams if stream.done()]
        assert not ended, f"streams that ended before all was changed: {ended}"
        await asyncio.sleep(max(0.0, phases[0][1] + PATIENCE_S - time.monotonic()))
        if not LONG:
            enough.set()
        seen = await asyncio.gather(*streams)
    print(f"{len(streams)} streams of {max(one.seconds for one in seen):.0f} s: {told(seen)}")
    print_phases(clients, phases)
    assert {one.outcome for one in seen} == {COMPLETE if LONG else LEFT}
    assert {one.tokens for one in seen} == {STREAM_S * TOKENS_PER_S if LONG else 0}
    assert max(one.gap_s for one in seen) < SLOWEST * 10, "a stream stood still"
    assert not clients.failures()
    print(await asyncio.to_thread(check_bill, cluster, [*seen, *clients.answers]))
    # What has drained is gone, and nothing else.
    await eventually_async(lambda: len(servers()) == 1, 30)


def price(cluster):
    return float(cluster.entry("steady")["metadata"]["pricing"]["default"]["output_tokens"])


def servers():
    words = [command_line(process) for process in engine_processes()]
    return [one for one in words if "test/steady" in one and "reaper" not in str(one)]


async def drained_only(cluster, draining):
    """A replica that stops gets nothing more, and is shown as long as it has something."""
    [gone] = draining

    def shown():
        return {row.replica_id: row for row in rows(cluster)}.get(gone)

    row = await eventually_async(lambda: (one := shown()) and one.draining and one)
    assert row.running > 0 and row.slots == row.credits == 0
    await asyncio.sleep(1)
    later = shown()
    assert later is not None, "its streams have ended"
    assert 0 < later.running <= row.running


async def test_a_rolling_update_is_seen_by_nobody(cluster_of_two):
    cluster = cluster_of_two
    await asyncio.to_thread(cluster.deploy, ingress_app(replicas=2), steady(1))
    await eventually_async(lambda: known(cluster, replicas=1), 60)
    clients, phases = Clients(cluster, "steady", count=12), []
    async with clients.asking():
        await asyncio.sleep(1)
        before = ids(cluster)
        await change(
            clients,
            phases,
            "other engine arguments",
            lambda: ids(cluster) and not ids(cluster) & before,
            steady(1, tokens=10),
        )
        await asyncio.sleep(1)
    print_phases(clients, phases)
    assert not clients.failures()
    print(await asyncio.to_thread(check_bill, cluster, clients.answers))
