"""The usage record of one request: its decision, its usage and its outcome, for the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, Protocol

from app import alarms
from app.core.pricing import TokenUsage
from app.core.tiers import Tier
from app.gateway.response import Placement
from app.ledger.ledger import Ledger, Opening
from app.ledger.record import NOTHING_USED, Origin, State, UsageRecord, now_utc
from app.observe.observers import NO_CONTEXT, Context, Ended, Observers
from app.protocol.usage import Counted

_LOOK_S: Final = 0.25
_LOOK_EVENTS: Final = 64
_NOTHING: Final = Counted(NOTHING_USED)


class Metered(Protocol):
    """A stream that reports its usage."""

    def counted(self) -> Counted:
        """Return the tokens so far."""
        ...


class Answer(Protocol):
    """An engine's answer."""

    @property
    def preemptions(self) -> int | None:
        """How often the engine has suspended the request so far; ``None`` if it does not tell."""
        ...


class Meter:
    """Keeps the record of one request.

    A placed request gets exactly one settled record. The first call that settles it counts; later
    ones change nothing. If a request is placed again, because its engine was lost before it sent
    anything, the record is that of the last placement.

    Attributes:
        answer: the engine's answer; ``None`` before it has begun.

    Args:
        current: returns the ledger in force. A request keeps using the ledger in which its room
            was reserved, because only that ledger waits for the request before it is closed.
        origin: the request's identity, for its record.
        observers: are told once the request has ended.
        context: what the request brought along, for observers.
    """

    def __init__(
        self,
        current: Callable[[], Ledger],
        origin: Origin,
        observers: Observers | None = None,
        context: Context = NO_CONTEXT,
    ) -> None:
        self.answer: Answer | None = None
        self._counted: Counted | None = None
        self._stream: Metered | None = None
        self._current = current
        self._ledger = current()
        self._origin = origin
        self._observers = observers or Observers()
        self._context = context
        self._began = time.monotonic()
        # Where the request is, until its record is settled.
        self._place: Placement | None = None
        self._ended = False
        # The tier of the record; `None` before a placement.
        self._billed: Tier | None = None
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
    def placed(self) -> bool:
        """Whether the request was sent to an engine, and its record is not settled yet."""
        return self._place is not None

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
        """Take note of a placement: its replica, and the decision used for all else, are billed."""
        self._place, self._opening, self._billed = place, None, place.decision.served

    def open(self) -> None:
        """Start to write the opening record of a stream, while the engine works on the request.

        The disk needs the same time either way, so both run in parallel.
        """
        place = self._place
        assert place is not None, "only a placed request is answered"
        record = UsageRecord.open(
            self._origin,
            place.decision,
            engine=place.replica.dialect.engine,
            replica=place.replica.replica_id,
            queue_s=place.queue_s,
        )
        self._opening = self._ledger.open(record)

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

        The usage is read only every 250 ms or 64 events, and when the ledger is to write it. That
        loses nothing: how much usage a killed ingress loses depends on how often the ledger writes
        it, which is less often.
        """
        self._unlooked += events
        now = time.monotonic()
        if now < self._look_at and self._unlooked < _LOOK_EVENTS:
            return
        self._unlooked, self._look_at = 0, now + _LOOK_S
        if self._place is not None and (counted := self.counted) is not None:
            due = self._ledger.progress(self._origin.request_id, *counted)
            if now < due < self._look_at:
                self._look_at = due

    async def settle(self, state: State, reason: str | None = None, *, status: int = 200) -> None:
        """Make the outcome of a placed request durable; call it before the last byte.

        The record is written even if waiting for it is cancelled. ``status`` is the HTTP status of
        the answer.
        """
        if self._place is None:
            return
        preemptions = None if self.answer is None else self.answer.preemptions
        settled = self._settled(state, reason, self.counted or _NOTHING, self._ttft_s, preemptions)
        self._tell(settled, status)
        await self._ledger.settle(settled)

    def check_echo(self, echoed: Tier | None) -> None:
        """Raise an alarm if a client was told another tier than it is billed for.

        That never happens: both are read from one decision. The alarm's metric shows that it holds.
        """
        if echoed is not None and echoed is not self._billed:
            text = f"{self._origin.request_id} was told {echoed} and is billed for {self._billed}"
            alarms.PROCESS.raised("billed otherwise than echoed", text)

    def write_off(self, reason: str, status: int) -> None:
        """Record that a placed request is not answered, because the disk refused its record.

        The request is not billed, whatever the engine has computed. The call does not wait.
        """
        if self._place is None:
            return
        settled = self._settled(State.FAILED, reason, _NOTHING)
        self._tell(settled, status)
        self._ledger.write_off(settled)

    def turn_away(self, state: State, reason: str, status: int) -> None:
        """Count a request that no engine has received. The call does not wait."""
        record = self._not_served(state, reason)
        self._tell(record, status)
        self._current().count(record)

    def abandon(self, reason: str, status: int) -> None:
        """Tell observers of a request that ended before an engine received it.

        Nothing happens if its end is known already.
        """
        if not self._ended:
            self._tell(self._not_served(State.ABANDONED, reason), status)

    def _settled(
        self,
        state: State,
        reason: str | None,
        counted: Counted,
        ttft_s: float | None = None,
        preemptions: int | None = None,
    ) -> UsageRecord:
        """Return the record of a placed request, which is final from now on."""
        place, self._place = self._place, None
        assert place is not None, "only a placed request is settled"
        return UsageRecord.settled(
            self._origin,
            place.decision,
            state,
            counted.usage,
            engine=place.replica.dialect.engine,
            replica=place.replica.replica_id,
            queue_s=place.queue_s,
            ended=now_utc(),
            ttft_s=ttft_s,
            reason=reason,
            estimated=counted.estimated,
            preemptions=preemptions,
        )

    def _not_served(self, state: State, reason: str) -> UsageRecord:
        waited_s = time.monotonic() - self._began
        return UsageRecord.not_served(
            self._origin, state, reason, queue_s=waited_s, ended=now_utc()
        )

    def _tell(self, record: UsageRecord, status: int) -> None:
        self._ended = True
        self._observers.ended(Ended(record, status, self._context))
