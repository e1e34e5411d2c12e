"""Asks a running engine whether it still preempts, and what it has suspended.

An engine proves at its start that it preempts. It may stop: Frontline's scheduler for vLLM goes on
in vLLM's own order if its decision fails. The status then says so, and the queue places nothing
more over running requests and keeps headroom again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

from app import alarms, supervision
from app.contracts.status import ReplicaStatus
from app.upstream.http1 import ConnectionLost
from deployments.engines.base import PreemptionReport

LOOK_S: Final = 2.0
"""Pause between two questions, in seconds. An engine answers between two steps."""
TIMEOUT_S: Final = 30.0
"""The longest wait for an answer, in seconds. A step with a long prompt may take that long."""

Ask = Callable[[], Awaitable[PreemptionReport | None]]


def apply(status: ReplicaStatus, report: PreemptionReport) -> ReplicaStatus:
    """Return a replica's status after a report of its engine. Pure.

    An engine that did not prove at its start that it preempts never does.
    """
    preempts = status.preempts and report.preempts
    return replace(
        status,
        dialect=replace(status.dialect, preempts=preempts)
        if preempts is not status.preempts
        else status.dialect,
        preempted=report.counts,
    )


class PreemptionWatch:
    """Keeps the status of one replica up to date.

    Attributes:
        status: the status, as of the last report.
    """

    def __init__(self, status: ReplicaStatus, ask: Ask) -> None:
        self.status = status
        self._ask = ask

    async def run(self) -> None:
        """Ask again and again. Without an answer the last one stays, and the failure is counted."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    await self.look()
            except (ConnectionLost, TimeoutError) as error:
                supervision.PROCESS.failed("preemption watch", error, about=str(self.status))

    async def look(self) -> None:
        """Ask once."""
        report = await self._ask()
        if report is None:
            return
        before, self.status = self.status, apply(self.status, report)
        if before.preempts and not self.status.preempts:
            text = f"{self.status} suspends nobody any more: {report.why_not or 'no reason given'}"
            alarms.PROCESS.raised("preemption lost", text)
