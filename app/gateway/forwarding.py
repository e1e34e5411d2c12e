"""Forwards an engine's answer to the client: rewrites it, counts its tokens, and records it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from app import alarms
from app.core import errors
from app.gateway.metering import Meter
from app.gateway.relay import Relay
from app.gateway.response import JSON, SSE, TEXT, Placement, Reply
from app.ledger.record import State
from app.protocol.requests import Inbound
from app.protocol.stream import StreamStamper, stamp_answer, stream_stamper
from app.protocol.transcripts import answers_text
from app.upstream.client import EngineBroke, StreamedAnswer, UnaryAnswer


class Forwarding:
    """Forwards one answer.

    Args:
        inbound: the request.
        reply: the connection to the client.
        meter: the request's record.
        slow_reader_s: a stream is aborted if its client reads nothing for this many seconds while
            a full buffer waits for it.
        free_slot: gives the request's slot back; may be called more than once.
        suspect: reports that the replica sends nothing.
    """

    def __init__(
        self,
        inbound: Inbound,
        reply: Reply,
        meter: Meter,
        *,
        slow_reader_s: float,
        free_slot: Callable[[], None],
        suspect: Callable[[], None],
    ) -> None:
        self._inbound = inbound
        self._reply = reply
        self._meter = meter
        self._slow_reader_s = slow_reader_s
        self._free_slot = free_slot
        self._suspect = suspect
        # Once the stream has begun.
        self._relay: Relay | None = None

    async def forward(self, answer: UnaryAnswer | StreamedAnswer, place: Placement) -> None:
        """Send the whole answer."""
        self._meter.answer = answer
        if isinstance(answer, UnaryAnswer):
            await self._whole(answer, place)
        else:
            with answer:
                await self._unless_slow(answer, place)

    async def _whole(self, answer: UnaryAnswer, place: Placement) -> None:
        if self._reply.started:
            # A stream was requested and has begun, but the engine has sent no stream.
            raise errors.ServerError
        body, counted = stamp_answer(answer.body, self._inbound, place.decision)
        self._meter.counted = counted
        _note_odd_usage(place, odd=counted.estimated)
        self._meter.first_byte()
        await self._meter.settle(State.COMPLETED)
        # The engine is done, so the slot is freed now and not when a slow client has read.
        self._free_slot()
        length = (b"content-length", str(len(body)).encode())
        kind = TEXT if answers_text(self._inbound) else JSON
        await self._reply.start((kind, length), place)
        await self._reply.write(body, more=False)

    async def _unless_slow(self, answer: StreamedAnswer, place: Placement) -> None:
        """Forward a stream, or abort it if its client does not read.

        The client gets no error event, because that would only queue behind the unread data.
        """
        stamper = stream_stamper(self._inbound, place.decision)
        try:
            async with asyncio.timeout(None) as patience:
                now = asyncio.get_running_loop().time
                answer.watch(
                    self._slow_reader_s,
                    lambda: patience.reschedule(now()),
                    self._engine_ended,
                )
                await self._stream(answer, place, stamper)
        except TimeoutError:
            if not patience.expired():
                raise
            # Generated tokens are billed whether or not the client has read them.
            stamper.feed(answer.arrived())
            await self._meter.settle(State.INTERRUPTED, "client_slow")

    def _engine_ended(self) -> None:
        """Give the slot back early if the client does not read and the last events have to wait.

        A client that keeps up gets them at once. Then the slot is given back with known usage.
        """
        if self._relay is not None and self._relay.writing:
            self._free_slot()

    async def _stream(
        self, answer: StreamedAnswer, place: Placement, stamper: StreamStamper
    ) -> None:
        meter, reply = self._meter, self._reply
        await meter.opened(stamper)
        if not reply.started:
            await reply.start(SSE, place)
        self._relay = Relay(answer, stamper, meter, reply)
        over, last = False, b""
        try:
            piece = await self._relay.until_last()
            if stamper.broken:
                last = piece
            else:
                if stamper.failed:
                    await meter.settle(State.INTERRUPTED, "engine_error")
                elif stamper.ended:
                    await meter.settle(State.COMPLETED)
                over = stamper.ended
                if answer.complete:
                    # The slot is freed now and not when the client has read the rest.
                    self._free_slot()
                await self._relay.write(piece, more=not over)
                while over and await answer.next_events():
                    # Keep reading to the end, so that the connection can be reused.
                    pass
        except EngineBroke as lost:
            if lost.silent:
                self._suspect()
        finally:
            _note_odd_usage(place, odd=stamper.odd_usage)
        if not over:
            last += stamper.break_off()
            await meter.settle(State.INTERRUPTED, "engine_lost")
            await reply.write(last, more=False)


def _note_odd_usage(place: Placement, *, odd: bool) -> None:
    if odd:
        replica = place.replica.replica_id
        alarms.PROCESS.raised("odd usage", f"{replica} sent impossible usage: it is estimated")
