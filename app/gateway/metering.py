"""One request on its way to the ledger: what was decided, what it has used, what became of it."""

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
    """A stream that tells its usage."""

    def counted(self) -> Counted:
        """Return the tokens so far."""
        ...


class Meter:
    """Keeps the one record of one request.

    A request that is placed gets exactly one settled record, whichever of its callers is first to
    settle it; later ones change nothing. One that is placed again, because its engine was lost
    before it sent anything, has the record of its last place.

    ``current`` returns the ledger that is in force. A request keeps to the one that was in force
    when room was reserved for it: only there is it waited for before that ledger is closed.
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
        """The tokens so far; ``None`` while nothing of an answer is there."""
        return self._counted if self._stream is None else self._stream.counted()

    @counted.setter
    def counted(self, counted: Counted | None) -> None:
        self._counted = counted

    @property
    def usage(self) -> TokenUsage | None:
        """The same, without whether they are an estimate."""
        return None if (counted := self.counted) is None else counted.usage

    def reserved(self) -> AbstractContextManager[None]:
        """Keep room for the request's record in a block; to be entered before it is placed.

        Raises, when entered:
            JournalFull: there is no room.
        """
        self._ledger = self._current()
        return self._ledger.reserved()

    def place(self, place: Placement) -> None:
        """Take note of where the request goes, and of the decision that everything reads from."""
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
        """Begin to write down that a stream begins, while its engine is asked.

        The disk takes its time whether or not the engine works meanwhile.
        """
        assert self._record is not None, "only a placed request is answered"
        self._opening = self._ledger.open(self._record)

    async def opened(self, stream: Metered) -> None:
        """Return once the record of a stream is durable, before its first byte leaves.

        From then on the stream tells the usage.

        Raises:
            DiskRefuses: it is not, so nothing may leave; ``write_off`` is to be called.
        """
        if self._opening is None:
            self.open()
        assert self._opening is not None
        await self._opening
        self.first_byte()
        self._stream = stream

    def first_byte(self) -> None:
        """Take note of the time to the first byte."""
        self._ttft_s = time.monotonic() - self._began

    def progress(self, events: int) -> None:
        """Take note that a stream has got so many events further.

        The usage is read only now and then: what an ingress that is killed can lose of it is
        bounded by what the ledger writes down, and that is less often.
        """
        self._unlooked += events
        now = time.monotonic()
        if now < self._look_at and self._unlooked < _LOOK_EVENTS:
            return
        self._unlooked, self._look_at = 0, now + _LOOK_S
        if self._record is not None and (counted := self.counted) is not None:
            self._ledger.progress(self._origin.request_id, *counted)

    async def settle(self, state: State, reason: str | None = None) -> None:
        """Make it durable what became of a placed request, before the last byte leaves.

        The record is written even where the wait for it is cancelled.
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
        """Note that a placed request is not answered because the disk refused its record.

        It costs nothing, whatever the engine has done for it. Nobody waits for that.
        """
        if self._record is None:
            return
        settled = self._record.settle(State.FAILED, NOTHING_USED, ended=now_utc(), reason=reason)
        self._record = None
        self._ledger.write_off(settled)

    def turn_away(self, state: State, reason: str) -> None:
        """Count a request that no engine has seen. Nobody waits for that."""
        waited_s = time.monotonic() - self._began
        self._current().count(
            UsageRecord.not_served(self._origin, state, reason, queue_s=waited_s, ended=now_utc())
        )
