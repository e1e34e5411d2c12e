"""Background tasks of one model in one ingress: renew its credits, and follow its snapshots."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from app import supervision
from app.contracts.credits import Renewal
from app.contracts.source import ModelSource, SourceAway
from app.contracts.status import ModelSnapshot
from app.flow.admission import Admission

_RENEWAL_TIMEOUT_S: Final = 1.0
"""Longest wait for a Model's answer, in seconds. Well below ``SILENCE_S``, after which credits are
lost: an unreachable Model must be detected before."""
_LISTEN_TIMEOUT_S: Final = 5.0
"""Longest wait for a wakeup, in seconds; a Model ends it after two."""
_LISTEN_AGAIN_S: Final = 1.0

_log = logging.getLogger("ray.serve")


class Renewals:
    """Keeps the admission of one model up to date, in two background tasks."""

    def __init__(
        self,
        source: ModelSource,
        application: str,
        ingress: str,
        admission: Admission,
        update: Callable[[ModelSnapshot], None],
    ) -> None:
        """``update`` applies a changed snapshot to the admission; an exception is a fault."""
        self._source = source
        self._application = application
        self._ingress = ingress
        self._admission = admission
        self._update = update
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
            demand, report = self._admission.demand(), self._admission.report()
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
            await self._admission.wait_for_renewal()

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
