"""``frontline plan --replay``: what the autoscaling policy would have done with recorded traffic.

The records are those of ``frontline usage --format records-json``. Each request is played as it was
recorded: it arrives, waits and runs at the same times, whatever the policy decides. So the result
shows what the policy asks for and why, and how long the recorded load would have exceeded it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from typing import Any, Final

import orjson

from app.cli.plan import ModelPlan, PoolPlan
from app.core.tiers import Tier
from app.scaling.report import PoolReport, ScalingReport, TierReport
from app.scaling.scaler import ReplicaBounds, Scaler

_MOST_STEPS: Final = 100_000
_ARRIVE, _START, _END = range(3)


class BadRecords(ValueError):
    """A file is not an export of usage records; the message names the line and the field."""


@dataclass(frozen=True, slots=True)
class Change:
    """A decision that changed a number of replicas: when, and the policy's line."""

    at: datetime
    why: str


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of one model.

    Attributes:
        model: its id.
        requests: how many records it has.
        seconds: from the first arrival to the last end.
        replica_hours: by pool.
        most: the most replicas at once, by pool.
        short_s: how long more requests ran than the replicas that were ready have slots.
        changes: every change, in order.
        assumed: slots that were counted for each replica of a pool with ``slots: auto``, by pool.
    """

    model: str
    requests: int
    seconds: float
    replica_hours: Mapping[str, float]
    most: Mapping[str, int]
    short_s: float
    changes: Sequence[Change]
    assumed: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Request:
    model: str
    tier: Tier
    arrived: float
    started: float | None
    ended: float


def read_records(lines: Iterable[bytes]) -> list[_Request]:
    """Return the requests of an export; records that are still open are left out.

    Raises:
        BadRecords: a line is no record.
    """
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = orjson.loads(line)
            if fields["ended"] is None:
                continue
            requests.append(_request(fields))
        except orjson.JSONDecodeError:
            raise BadRecords(f"line {number} is not JSON (records-json)") from None
        except KeyError as error:
            raise BadRecords(f"line {number} has no field {error}") from None
        except (TypeError, ValueError) as error:
            raise BadRecords(f"line {number} is not a usage record: {error}") from None
    return sorted(requests, key=lambda one: one.arrived)


def _request(fields: Mapping[str, Any]) -> _Request:
    arrived, ended = (_seconds(fields[name]) for name in ("arrived", "ended"))
    served = fields["served_tier"]
    tier = Tier(served or fields["requested_tier"] or Tier.DEFAULT)
    started = arrived + float(fields["queue_s"]) if served else None
    return _Request(str(fields["model"]), tier, arrived, started, max(ended, started or ended))


def _seconds(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def replay(model: ModelPlan, requests: Sequence[_Request], start_s: float) -> Replay | None:
    """Return what the policy would have done; ``None`` if no record is of this model.

    Args:
        model: its pools and settings, by the config file.
        requests: of all models, by arrival.
        start_s: how long a replica takes to start, in seconds, which no record tells.
    """
    own = [one for one in requests if one.model == model.id]
    return _Player(model, own, start_s).play() if own else None


class _Player:
    """Plays one model's records to the policy, step by step."""

    def __init__(self, model: ModelPlan, requests: Sequence[_Request], start_s: float) -> None:
        self._model, self._requests, self._start_s = model, requests, start_s
        self._begin = requests[0].arrived
        self._end = max(one.ended for one in requests)
        self._step_s = max(1.0, (self._end - self._begin) / _MOST_STEPS)
        self._targets = {pool.name: pool.replicas.least for pool in model.pools}
        self._ready = dict(self._targets)
        self._orders: deque[tuple[float, str, int]] = deque()
        self._waiting: dict[Tier, dict[int, float]] = {tier: {} for tier in Tier}
        self._running = dict.fromkeys(Tier, 0)
        self._counts = {tier: [0.0, 0.0, 0.0] for tier in Tier}
        order = count()
        self._events = [(one.arrived, _ARRIVE, next(order), one) for one in requests]
        heapq.heapify(self._events)

    def play(self) -> Replay:
        scaler, changes, short_s = Scaler(), [], 0.0
        hours = dict.fromkeys(self._targets, 0.0)
        most = dict(self._targets)
        bounds = {pool.name: pool.replicas for pool in self._model.pools}
        now = self._begin
        while now < self._end:
            now += self._step_s
            self._pass(now)
            decision = scaler.decide(
                self._report(now),
                {n: ReplicaBounds(self._targets[n], b.least, b.most) for n, b in bounds.items()},
                now,
            )
            if dict(decision.replicas) != self._targets:
                changes.append(Change(datetime.fromtimestamp(now, UTC), decision.why))
            self._order(decision.replicas, now)
            for name, replicas in self._targets.items():
                hours[name] += replicas * self._step_s / 3600
                most[name] = max(most[name], replicas)
            slots = sum(pool.slots * self._ready[pool.name] for pool in self._model.pools)
            short_s += self._step_s * (sum(self._running.values()) > slots)
        assumed = {pool.name: pool.slots for pool in self._model.pools if pool.slots_auto}
        return Replay(self._model.id, len(self._requests), self._end - self._begin, hours, most,
                      short_s, changes, assumed)  # fmt: skip

    def _pass(self, now: float) -> None:
        while self._events and self._events[0][0] <= now:
            at, kind, order, one = heapq.heappop(self._events)
            counts, waiting = self._counts[one.tier], self._waiting[one.tier]
            if kind == _ARRIVE:
                counts[0] += 1
                waiting[order] = at
                later = (one.ended, _END) if one.started is None else (one.started, _START)
                heapq.heappush(self._events, (*later, order, one))
            elif kind == _START:
                del waiting[order]
                self._running[one.tier] += 1
                heapq.heappush(self._events, (one.ended, _END, order, one))
            elif one.started is None:
                del waiting[order]
            else:
                self._running[one.tier] -= 1
                counts[1] += 1
                counts[2] += one.ended - one.started
        while self._orders and self._orders[0][0] <= now:
            _, name, replicas = self._orders.popleft()
            self._ready[name] = min(self._targets[name], self._ready[name] + replicas)

    def _order(self, replicas: Mapping[str, int], now: float) -> None:
        for name, wanted in replicas.items():
            if (more := wanted - self._targets[name]) > 0:
                self._orders.append((now + self._start_s, name, more))
            self._targets[name] = wanted
            self._ready[name] = min(self._ready[name], wanted)

    def _report(self, now: float) -> ScalingReport:
        tiers = {}
        for tier, waiting in self._waiting.items():
            oldest = now - min(waiting.values()) if waiting else 0.0
            tiers[tier] = TierReport(len(waiting), self._running[tier], oldest, *self._counts[tier])
        pools = {pool.name: self._pool(pool) for pool in self._model.pools}
        headroom = self._model.queue.headroom_share(preempts=False)
        return ScalingReport(tiers, pools, headroom, self._model.scaling)

    def _pool(self, pool: PoolPlan) -> PoolReport:
        honours = float(pool.priority.startswith("delivered"))
        return PoolReport(pool.slots, self._ready[pool.name], honours, start_s=self._start_s)


def to_text(replays: Sequence[Replay], most_changes: int = 40) -> str:
    """Return replays as text: a summary of each model, and its first changes."""
    lines = []
    for one in replays:
        lines.append(f"{one.model}: {one.requests:,} requests in {one.seconds / 3600:.1f} h")
        for pool, hours in one.replica_hours.items():
            mean = hours * 3600 / max(one.seconds, 1.0)
            lines.append(
                f"  {pool}: {hours:.1f} replica-hours, {mean:.2f} replicas on average, "
                f"{one.most[pool]} at most"
            )
        for pool, slots in one.assumed.items():
            lines.append(f"  {pool} has slots: auto: {slots} counted for each replica, the most")
        lines.append(f"  more ran than there were slots for {one.short_s:.0f} s")
        for change in one.changes[:most_changes]:
            lines.append(f"  {change.at:%Y-%m-%d %H:%M:%S}  {change.why}")
        if len(one.changes) > most_changes:
            lines.append(f"  and {len(one.changes) - most_changes} more changes (--json has all)")
    return "\n".join(lines)


def to_json(replays: Sequence[Replay]) -> list[dict[str, Any]]:
    """Return replays as plain values."""
    return [
        {
            "model": one.model,
            "requests": one.requests,
            "seconds": one.seconds,
            "replica_hours": dict(one.replica_hours),
            "most": dict(one.most),
            "short_s": one.short_s,
            "assumed_slots": dict(one.assumed),
            "changes": [{"at": c.at.isoformat(), "why": c.why} for c in one.changes],
        }
        for one in replays
    ]
