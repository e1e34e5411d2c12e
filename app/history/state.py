"""The state of a model as the board shows it, as JSON values. Pure; no key and no address."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from app.contracts.news import ScalingDecision
from app.contracts.slo import TierAttainment
from app.contracts.speeds import Speeds
from app.contracts.stats import ModelBoard
from app.contracts.status import ModelSnapshot, ReplicaStatus
from app.contracts.traffic import TierTraffic, Traffic
from app.core.tiers import Tier
from app.history.point import Point, downgrades_of, sheds_of


def state_of(
    board: ModelBoard,
    total: Traffic,
    point: Point,
    decisions: Iterable[ScalingDecision],
    began: float,
    speeds: Speeds,
) -> dict[str, Any]:
    """Return a model as it is now.

    Args:
        board: the model, its queue at every ingress, and its objectives.
        total: the traffic of all ingresses since these started, those that have gone included.
        point: the latest point of its history.
        decisions: the decisions of the autoscaling policy that are remembered, oldest first.
        began: when the Model was started and its history began, in Unix seconds.
        speeds: how fast requests were served lately.
    """
    snapshot = board.snapshot
    return {
        "id": snapshot.id,
        "state": snapshot.state.value,
        "began": round(began, 3),
        "ingresses": len(board.ingresses),
        "service_tiers": [tier.value for tier in snapshot.service_tiers],
        "missing": dict(snapshot.missing),
        "starts": [asdict(start) for start in snapshot.starts.values()],
        "replicas": _replicas(snapshot, point),
        "totals": {tier.value: _total(total.tiers.get(tier)) for tier in Tier},
        "slo": {tier.value: _attainment(one) for tier, one in board.slo.items()},
        "speeds": speeds.to_fields(),
        "sheds": dict(sheds_of(total)),
        "downgrades": dict(downgrades_of(total)),
        "decisions": [
            {
                "at": round(one.at, 3),
                "why": one.why,
                "pools": {n: [*p] for n, p in one.pools.items()},
            }
            for one in decisions
        ],
    }


def _replicas(snapshot: ModelSnapshot, point: Point) -> list[dict[str, Any]]:
    ready = {status.replica_id: status for status in snapshot.replicas}
    return [
        {
            "name": name,
            "running": one.running,
            "suspended": one.suspended,
            "slots": one.slots,
            **_about(ready.get(name)),
        }
        for name, one in point.replicas.items()
    ]


def _about(status: ReplicaStatus | None) -> dict[str, Any]:
    """Return what is known of a replica; nothing of one that drains, or stands for several."""
    if status is None:
        return {"pool": "", "engine": "", "version": "", "priority": False, "preempts": False}
    return {
        "pool": status.pool,
        "engine": status.dialect.engine,
        "version": status.engine_version,
        "priority": status.dialect.native_priority,
        "preempts": status.preempts,
    }


def _attainment(one: TierAttainment) -> dict[str, Any]:
    return {
        "ttft_ms": one.ttft_ms,
        "objective": one.objective,
        "recent": [one.recent.met, one.recent.missed],
        "recent_s": round(one.recent_s),
        "kept": one.kept,
        "total": [one.total.met, one.total.missed],
    }


def _total(traffic: TierTraffic | None) -> dict[str, Any]:
    traffic = traffic or TierTraffic()
    return {
        "requests": traffic.duration.count,
        "prompt_tokens": traffic.prompt_tokens,
        "completion_tokens": traffic.completion_tokens,
        "cost": format(traffic.cost, "f"),
        "ttft_p50_s": traffic.ttft.quantile(0.5),
        "ttft_p99_s": traffic.ttft.quantile(0.99),
        "ttft_counts": traffic.ttft.counts,
    }
