"""Background tasks of one model in one ingress: renew its credits, and follow its snapshots."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from app import supervision
from app.contracts.credits import Renewal
from app.contracts.source import ModelSource, SourceAway
from app.contracts.stats import QueueReport
from app.contracts.status import ModelSnapshot
from app.contracts.traffic import Traffic
from app.flow.admission import Admission

_RENEWAL_TIMEOUT_S: Final = 1.0
"""Longest wait for a Model's answer, in seconds. Well below ``SILENCE_S``, after which credits are
lost: an unreachable Model must be detected before."""
_LISTEN_TIMEOUT_S: Final = 5.0
"""Longest wait for a wakeup, in seconds; a Model ends it after two."""
_LISTEN_AGAIN_S: Final = 1.0

_log = logging.getLogger("ray.serve")


class TrafficReports:
    """What to report of the traffic of one model: nothing while the Model has the latest counts.

    Args:
        traffic: returns the counts of a model by its id, as they are now.
    """

    def __init__(self, traffic: Callable[[str], Traffic]) -> None:
        self._traffic = traffic
        # The life of the Model, and how many requests the counts that it has are of.
        self._known: tuple[str, int] | None = None

    def due(self, model: str) -> Traffic | None:
        """Return a copy of the counts; ``None`` if the Model has them already."""
        traffic = self._traffic(model)
        if self._known is not None and self._known[1] == traffic.requests:
            return None
        # A copy, because it is sent from another thread.
        return Traffic.of([traffic])

    def received(self, life: str, traffic: Traffic | None) -> None:
        """Record that the Model has answered a report with these counts."""
        if traffic is not None:
            self._known = (life, traffic.requests)
        elif self._known is not None and self._known[0] != life:
            self._known = None


class Renewals:
    """Keeps the admission of one model up to date, in two background tasks."""

    def __init__(
        self,
        source: ModelSource,
        application: str,
        ingress: str,
        admission: Admission,
        update: Callable[[ModelSnapshot], None],
        traffic: Callable[[str], Traffic],
    ) -> None:
        """``update`` applies a changed snapshot to the admission; an exception is a fault.

        ``traffic`` returns the counts of a model by its id.
        """
        self._source = source
        self._application = application
        self._ingress = ingress
        self._admission = admission
        self._update = update
        self._traffic = TrafficReports(traffic)
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    def start(self) -> None:
        """Start both tasks on the running event loop."""
        self._tasks = (
            supervision.keep_running("credit renewal", self._renew, about=self._application),
            supervision.keep_running("wakeup listener", self._listen, about=self._application),
        )

    async def stop(self) -> None:
        """End both tasks, and return once they have ended."""
        await supervision.stop(*self._tasks)

    def cancel(self) -> None:
        """End both tasks, without waiting for them."""
        for task in self._tasks:
            task.cancel()

    async def _renew(self) -> None:
        """Renew credits until cancelled. After a restart it requests the whole snapshot again."""
        known, away = "", False
        while True:
            demand, report = self._admission.demand(), self._report()
            try:
                async with asyncio.timeout(_RENEWAL_TIMEOUT_S):
                    renewal = await self._source.renew(self._application, demand, report, known)
            except (SourceAway, TimeoutError) as error:
                # The Model actor is down or starting. Its last snapshot applies until it is back.
                self._admission.renewal_failed(demand)
                if not away:
                    _log.info(
                        "cannot renew credits of %s: %s",
                        self._application,
                        str(error) or "no answer",
                    )
                away = True
            else:
                away = False
                self._take(renewal)
                # Set only now: a snapshot that could not be applied must be sent again.
                known = renewal.version
                traffic = None if report is None else report.traffic
                self._traffic.received(renewal.grant.life, traffic)
            await self._admission.wait_for_renewal()

    def _report(self) -> QueueReport | None:
        """Return the report that is due, with the traffic that the Model does not know."""
        report = self._admission.report()
        if report is None or not self._admission.known:
            return report
        return replace(report, traffic=self._traffic.due(self._admission.snapshot.id))

    def _take(self, renewal: Renewal) -> None:
        """Apply a Model's answer. The grant is applied even if the snapshot cannot be."""
        try:
            if renewal.snapshot is not None:
                self._update(renewal.snapshot)
        finally:
            self._admission.receive(renewal.grant)

    async def _listen(self) -> None:
        """Renew when the Model asks for it. Regular renewals do not depend on this."""
        while True:
            try:
                async with asyncio.timeout(_LISTEN_TIMEOUT_S):
                    woken = await self._source.wait_for_wakeup(self._application, self._ingress)
            except (SourceAway, TimeoutError) as error:
                _log.debug("cannot wait for wakeups of %s: %s", self._application, error)
                await asyncio.sleep(_LISTEN_AGAIN_S)
            else:
                if woken:
                    self._admission.renew_now()
