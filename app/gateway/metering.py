"""The usage record of one request: its decision, its usage and its outcome, for the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, Protocol

from app.core.pricing import TokenUsage
from app.gateway.response import Placement
from app.ledger.ledger import Ledger, Opening
from app.ledger.record import NOTHING_USED, Origin, State, UsageRecord, now_utc
from app.protocol.usage import Counted

_LOOK_S: Final = 0.05
_LOOK_EVENTS: Final = 64
_NOTHING: Final = Counted(NOTHING_USED)


class Metered(Protocol):
    """A stream that reports its usage."""

    def counted(self) -> Counted:
        """Return the tokens so far."""
        ...


class Meter:
    """Keeps the record of one request.

    A placed request gets exactly one settled record. The first call that settles it counts; later
    ones change nothing. If a request is placed again, because its engine was lost before it sent
    anything, the record is that of the last placement.

    Args:
        current: returns the ledger in force. A request keeps using the ledger in which its room
            was reserved, because only that ledger waits for the request before it is closed.
        origin: the request's identity, for its record.
    """

    def __init__(self, current: Callable[[], Ledger], origin: Origin) -> None:
        self._counted: Counted | None = None
        self._stream: Metered | None = None
        self._current = current
        self._ledger = current()
        self._origin = origin
        self._began = time.monotonic()
        self._record: UsageRecord | None = None
        self._opening: Opening | None = None
        self._ttft_s: float | None = None
        self._unlooked = 0
        self._look_at = 0.0

    @property
    def counted(self) -> Counted | None:
        """The tokens so far; ``None`` before the answer begins."""
        return self._counted if self._stream is None else self._stream.counted()

    @counted.setter
    def counted(self, counted: Counted | None) -> None:
        self._counted = counted

    @property
    def usage(self) -> TokenUsage | None:
        """The tokens so far, without the flag of estimates; ``None`` before the answer begins."""
        return None if (counted := self.counted) is None else counted.usage

    def reserved(self) -> AbstractContextManager[None]:
        """Return a context that reserves room for the request's record. Enter it before placing.

        Raises, when entered:
            JournalFull: the journal has no room.
        """
        self._ledger = self._current()
        return self._ledger.reserved()

    def place(self, place: Placement) -> None:
        """Create the record of a placement: the replica, and the decision used for all else."""
        replica = place.replica
        self._opening = None
        self._record = UsageRecord.open(
            self._origin,
            place.decision,
            engine=replica.dialect.engine,
            replica=replica.replica_id,
            queue_s=place.queue_s,
        )

    def open(self) -> None:
        """Start to write the opening record of a stream, while the engine works on the request.

        The disk needs the same time either way, so both run in parallel.
        """
        assert self._record is not None, "only a placed request is answered"
        self._opening = self._ledger.open(self._record)

    async def durable(self) -> None:
        """Wait until the opening record of a stream is durable; call it before the first byte.

        Raises:
            DiskRefuses: the record is not durable. The caller must send nothing and call
                ``write_off``.
        """
        if self._opening is None:
            self.open()
        assert self._opening is not None
        await self._opening

    async def opened(self, stream: Metered) -> None:
        """Do the same when the first event has come, whose usage is read from the stream."""
        await self.durable()
        self.first_byte()
        self._stream = stream

    def first_byte(self) -> None:
        """Record the time to the first byte."""
        self._ttft_s = time.monotonic() - self._began

    def progress(self, events: int) -> None:
        """Record that a stream has sent this many more events.

        The usage is read only every 50 ms or 64 events. That loses nothing: how much usage a killed
        ingress loses depends on how often the ledger writes it, which is less often.
        """
        self._unlooked += events
        now = time.monotonic()
        if now < self._look_at and self._unlooked < _LOOK_EVENTS:
            return
        self._unlooked, self._look_at = 0, now + _LOOK_S
        if self._record is not None and (counted := self.counted) is not None:
            self._ledger.progress(self._origin.request_id, *counted)

    async def settle(self, state: State, reason: str | None = None) -> None:
        """Make the outcome of a placed request durable; call it before the last byte.

        The record is written even if waiting for it is cancelled.
        """
        if self._record is None:
            return
        counted = self.counted or _NOTHING
        settled = self._record.settle(
            state,
            counted.usage,
            ended=now_utc(),
            ttft_s=self._ttft_s,
            reason=reason,
            estimated=counted.estimated,
        )
        self._record = None
        await self._ledger.settle(settled)

    def write_off(self, reason: str) -> None:
        """Record that a placed request is not answered, because the disk refused its record.

        The request is not billed, whatever the engine has computed. The call does not wait.
        """
        if self._record is None:
            return
        settled = self._record.settle(State.FAILED, NOTHING_USED, ended=now_utc(), reason=reason)
        self._record = None
        self._ledger.write_off(settled)

    def turn_away(self, state: State, reason: str) -> None:
        """Count a request that no engine has received. The call does not wait."""
        waited_s = time.monotonic() - self._began
        self._current().count(
            UsageRecord.not_served(self._origin, state, reason, queue_s=waited_s, ended=now_utc())
        )
