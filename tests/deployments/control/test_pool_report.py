"""What autoscaling learns of a pool, above all its slots where each engine has its own."""

import pytest

from app.config.model import MOST_AUTO_SLOTS, PoolSettings
from app.contracts.status import ReplicaStatus
from app.core.dialect import Dialect, Route
from app.core.tiers import PriorityMode
from deployments.control.pool_report import report_pool
from deployments.engines.base import LOW_FIRST

pytestmark = pytest.mark.unit

DIALECT = Dialect(
    engine="test",
    priority_values=LOW_FIRST,
    priority_routes=frozenset({Route.CHAT}),
    preempts=True,
)


def pool(slots):
    given = {"name": "p", "engine": "vllm", "model": "m", "slots": slots, "cost_per_hour": 3}
    return PoolSettings.load(given, "pool")


def replica(slots, start_s=7.0):
    return ReplicaStatus(f"r{slots}", "p", "http://e", "key", slots, "1", 4096, DIALECT,
                         start_s=start_s)  # fmt: skip


def slots(of, ready, seen):
    return report_pool(pool(of), PriorityMode.AUTO, ready, seen).slots


def test_slots_are_those_of_the_settings_or_of_the_replicas():
    replicas = [replica(8), replica(12)]
    assert slots(64, replicas, replicas[0]) == 64
    assert slots("auto", replicas, replicas[0]) == 10, "replicas can differ"
    assert slots("auto", [], replica(12)) == 12, "as it was, while none is ready"
    assert slots("auto", [], None) == MOST_AUTO_SLOTS, "the first replica tells"


def test_the_rest_is_what_a_replica_has_proved():
    before = report_pool(pool("auto"), PriorityMode.AUTO, [], None)
    assert (before.ready, before.honours, before.preempts, before.start_s) == (0, 1, 0, 0)
    found = report_pool(pool("auto"), PriorityMode.AUTO, [replica(8)], replica(8))
    assert (found.ready, found.honours, found.preempts) == (1, 1, 1)
    assert (found.start_s, found.cost) == (7, 3)
    queue = report_pool(pool("auto"), PriorityMode.QUEUE, [replica(8)], replica(8))
    assert (queue.honours, queue.preempts) == (1, 0)
