"""One request on its way to the ledger: what was decided, what it has used, what became of it."""

from __future__ import annotations

import time

from app.ledger.ledger import Ledger
from app.ledger.record import NOTHING_USED, Origin, State, UsageRecord, now_utc
from app.pricing import TokenUsage
from app.reply import Place


class Meter:
    """Keeps the one record of one request.

    A request that is placed gets exactly one settled record, whichever of its callers is first to
    settle it; later ones change nothing. One that is placed again, because its engine was lost
    before it sent anything, has the record of its last place.

    Attributes:
        usage: the tokens so far, as the engine counts them; ``None`` while it has told none.
    """

    def __init__(self, ledger: Ledger, origin: Origin) -> None:
        self.usage: TokenUsage | None = None
        self._ledger = ledger
        self._origin = origin
        self._began = time.monotonic()
        self._record: UsageRecord | None = None
        self._ttft_s: float | None = None
        self._is_open = False

    def place(self, place: Place) -> None:
        """Take note of where the request goes, and of the decision that everything reads from."""
        replica = place.replica
        self._record = UsageRecord.open(
            self._origin,
            place.decision,
            engine=replica.dialect.engine,
            replica=replica.replica_id,
            queue_s=place.queue_s,
        )

    async def open(self) -> None:
        """Make the record of a stream durable, before its first byte leaves."""
        assert self._record is not None, "only a placed request is answered"
        self.first_byte()
        self._is_open = True
        await self._ledger.open(self._record)

    def first_byte(self) -> None:
        """Take note of the time to the first byte."""
        self._ttft_s = time.monotonic() - self._began

    def progress(self, usage: TokenUsage | None) -> None:
        """Take note of how far a stream has got."""
        self.usage = usage
        if self._is_open and self._record is not None and usage is not None:
            self._ledger.progress(self._origin.request_id, usage)

    async def settle(self, state: State, reason: str | None = None) -> None:
        """Make it durable what became of a placed request, before the last byte leaves.

        The record is written even where the wait for it is cancelled.
        """
        if self._record is None:
            return
        settled = self._record.settle(
            state,
            self.usage or NOTHING_USED,
            ended=now_utc(),
            ttft_s=self._ttft_s,
            reason=reason,
        )
        self._record = None
        await self._ledger.settle(settled)

    def turn_away(self, state: State, reason: str) -> None:
        """Count a request that no engine has seen. Nobody waits for that."""
        waited_s = time.monotonic() - self._began
        self._ledger.count(
            UsageRecord.not_served(self._origin, state, reason, queue_s=waited_s, ended=now_utc())
        )
