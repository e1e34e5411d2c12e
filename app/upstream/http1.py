"""A minimal HTTP/1.1 client connection to engines: one request at a time, with keep-alive.

General client libraries create objects, timers and tasks for every feature of HTTP. Engines get
only one kind of request, and their answers are read for every token. So here each read from the
socket is parsed (by ``httptools``, which uvicorn uses too) and passed on as one piece.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable
from typing import ClassVar, Final, cast
from urllib.parse import urlsplit

import httptools

from app.upstream import preemptions
from app.upstream.silence import Silence

MOST_UNREAD: Final = 256 * 1024
"""Bytes of an answer that may wait for a slow client before reading from the engine is paused.
About a thousand tokens of a stream."""
MOST_HELD: Final = 64 * 1024 * 1024
"""The limit for all answers of an ingress together: 340 full buffers. Beyond it each answer may
only buffer ``LEAST_UNREAD``, the most that one read from the socket returns."""
LEAST_UNREAD: Final = 64 * 1024
"""Bytes per answer that do not count in ``MOST_HELD``. A client that keeps up has fewer."""
MOST_AT_ONCE: Final = 64 * 1024
"""Bytes of one read that are processed before other connections get their turn."""


Body = bytes | Iterable[bytes | memoryview]
"""A request's body, whole or in pieces that can be iterated more than once."""


class ConnectionLost(Exception):
    """There is no connection, or it ended before the answer did.

    Attributes:
        silent: whether this side closed it, because nothing had arrived for too long.
        stale: whether the connection was kept from an earlier request, and the engine closed it
            before it sent any part of this answer. Most likely the engine closed an idle connection
            just as it was reused.
    """

    def __init__(self, message: str, *, silent: bool = False, stale: bool = False) -> None:
        super().__init__(message)
        self.silent = silent
        self.stale = stale


class Response:
    """An answer whose head has arrived.

    Attributes:
        status: the HTTP status.
        content_type: without parameters, in lower case; empty if there is none.
        retry_after: that header; empty if there is none.
        preemptions: how often the engine has suspended the request so far; ``None`` if unknown.
        take_piece: returns the part of the body received since the last call, without waiting.
    """

    __slots__ = (
        "_connection",
        "content_type",
        "preemptions",
        "retry_after",
        "status",
        "take_piece",
    )

    def __init__(
        self,
        connection: EngineConnection,
        status: int,
        content_type: bytes,
        retry_after: bytes,
        preemptions: int | None,
    ) -> None:
        self.status = status
        self.content_type = content_type
        self.retry_after = retry_after.decode("latin-1").strip()
        self.preemptions = preemptions
        self._connection = connection
        # Not a method, because it is called for every event.
        self.take_piece = connection.take_piece

    @property
    def complete(self) -> bool:
        """Whether the whole answer has arrived, even if it has not been read yet."""
        return self._connection.complete

    def watch(
        self, slow_s: float, on_slow: Callable[[], None], on_complete: Callable[[], None]
    ) -> None:
        """Set the callbacks for a slow reader; see ``EngineConnection.watch``."""
        self._connection.watch(slow_s, on_slow, on_complete)

    def disregard(self) -> None:
        """Do not count what arrived last as a sign of life: the read timeout goes on before it."""
        self._connection.disregard()

    async def read(self) -> bytes:
        """Return the rest of the body.

        Raises:
            ConnectionLost: the connection ended before.
        """
        body = await self.next_piece()
        if not self._connection.complete:
            pieces = [body]
            while piece := await self.next_piece():
                pieces.append(piece)
            body = b"".join(pieces)
        return body

    async def next_piece(self) -> bytes:
        """Wait for more of the body; return what was received, or nothing at the end of the body.

        Raises:
            ConnectionLost: the connection ended before the body did.
        """
        connection = self._connection
        while not (piece := connection.take_piece()) and not connection.complete:
            await connection.more()
        return piece

    def more(self) -> Awaitable[None]:
        """Return what is to be awaited before the next ``take_piece``; see ``next_piece``.

        Raises:
            ConnectionLost: the connection ended before the body did.
        """
        return self._connection.more()

    def pass_on(self, take: Callable[[], bool]) -> Awaitable[None]:
        """See ``EngineConnection.pass_on``."""
        return self._connection.pass_on(take)


class Held:
    """A number of bytes. As a class attribute, each change would clear Python's method caches."""

    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = 0


class EngineConnection(asyncio.Protocol):
    """One connection to an engine, for one request at a time.

    Attributes:
        held: the bytes that wait for their readers on all connections together, without the first
            ``LEAST_UNREAD`` of each connection.
        complete: whether the whole answer has arrived.
        due: whether something is to be done because nothing has arrived for a while; ``more``
            returns it to whoever waits for the answer.
        kept: whether the connection has served an earlier request.
        idle_since: when it was given back, by the event loop's clock, in seconds.
    """

    held: ClassVar[Held] = Held()

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._unread = self._counted = 0
        self._slow: asyncio.TimerHandle | None = None
        self._pieces: list[bytes] = []
        # The parser calls this for each chunk of a stream.
        self.on_body = self._pieces.append
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._take: Callable[[], bool] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._look_at = self._read_timeout_s = math.inf
        self._received_at = self._alive_at = 0.0
        self._may_write = True
        self._silence: Silence | None = None
        self.due = False
        self.kept = False
        self.idle_since = 0.0
        self._begin()

    def _begin(self) -> None:
        self._drop()
        self._paused = False
        self._sending = False
        self.unwatch()
        self._content_type = self._retry_after = b""
        self._preemptions: int | None = None
        self.complete = self._head_came = self._keeps_alive = self._lost = False
        self._silent = self._answered = False

    @property
    def reusable(self) -> bool:
        """Whether another request can be sent over this connection."""
        transport = self._transport
        return (
            self._keeps_alive
            and not self._lost
            and not self._sending
            and not self._pieces
            and transport is not None
            and not transport.is_closing()
        )

    async def send(
        self, head: bytes, body: Body, read_timeout_s: float, silence: Silence | None = None
    ) -> Response:
        """Send a request; return its answer once the head of the answer has arrived.

        A body in pieces is written as fast as the engine reads it, until an answer arrives.

        Raises:
            ConnectionLost: the connection ended first, or nothing arrived for ``read_timeout_s``
                seconds.
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            raise ConnectionLost("closed", stale=self.kept)
        self._begin()
        now = self._received_at = self._alive_at = self._loop.time()
        self._read_timeout_s, self._silence = read_timeout_s, silence
        at = now + read_timeout_s
        self._look_by(at if silence is None else min(at, silence.look(now, now)))
        if isinstance(body, bytes):
            # asyncio's own loop never gets rid of an empty piece, from Python 3.12 on.
            transport.writelines((head, body) if body else (head,))
        else:
            transport.write(head)
            await self._write(transport, body)
        while not self._head_came:
            await self.more()
        content_type = self._content_type.partition(b";")[0].strip().lower()
        status = self._parser.get_status_code()
        return Response(self, status, content_type, self._retry_after, self._preemptions)

    async def _write(
        self, transport: asyncio.Transport, pieces: Iterable[bytes | memoryview]
    ) -> None:
        self._sending = True
        for piece in pieces:
            while not self._head_came and not self._may_write:
                await self.news()
            if self._head_came:
                # The engine rejected the request and may not read the rest: `reusable` is false.
                return
            if self._lost:
                raise self._end()
            transport.write(piece)
            # Let other requests run, even if the engine reads as fast as this writes.
            await asyncio.sleep(0)
        self._sending = False

    def take_piece(self) -> bytes:
        """Return the part of the body received since the last call; empty if there is none."""
        pieces = self._pieces
        if not pieces:
            return b""
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if self._counted:
            self._drop()
        else:
            pieces.clear()
            self._unread = 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return piece

    def disregard(self) -> None:
        """See ``Response.disregard``."""
        self._received_at = self._alive_at

    def more(self) -> Awaitable[None]:
        """Return an awaitable: for more of the answer, or for what is due without it.

        Raises:
            ConnectionLost: the connection has ended.
        """
        return self._handle_silence() if self.due else self.news()

    def pass_on(self, take: Callable[[], bool]) -> Awaitable[None]:
        """Call ``take`` for each read of the answer; return an awaitable, as ``more`` does.

        This spares waking the task that waits, which takes several times what most reads do. The
        awaitable is done when that task has to go on: ``take`` has returned true or raised, the
        read was a large one or the last, or something is due without a read.

        Raises:
            ConnectionLost: the connection has ended.
        """
        if self.due:
            return self._handle_silence()
        news = self.news()
        self._take = take
        return news

    async def _handle_silence(self) -> None:
        """Do what is due because nothing has arrived for a while."""
        self.due = False
        if self._silence is not None:
            await self._silence.handle()

    def close(self) -> None:
        """Close the connection. The engine then aborts the request, if one is running."""
        self.unwatch()
        self._drop()
        self._shut()

    def watch(
        self, slow_s: float, on_slow: Callable[[], None], on_complete: Callable[[], None]
    ) -> None:
        """Set the callbacks for an answer whose reader may be slow.

        Args:
            slow_s: how long the buffer may stay full without a read, in seconds.
            on_slow: called after that time, if the answer is not complete.
            on_complete: called when the whole answer has arrived, read or not; not called if it had
                arrived before.
        """
        self._slow_s, self._on_slow, self._on_complete = slow_s, on_slow, on_complete
        if self._paused:
            self._slow = self._loop.call_later(slow_s, on_slow)

    def unwatch(self) -> None:
        """Drop the callbacks, because they refer to the whole request, including its body."""
        self._slow_s = math.inf
        self._on_slow = self._on_complete = _nothing
        self._silence, self.due, self._take = None, False, None

    def _drop(self) -> None:
        """Discard the bytes that wait to be read."""
        self._pieces.clear()
        self.held.size -= self._counted
        self._unread = self._counted = 0
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def _count(self) -> None:
        """Count the unread bytes beyond ``LEAST_UNREAD``; pause reading if they are too many."""
        over = self._unread - LEAST_UNREAD
        self.held.size += over - self._counted
        self._counted = over
        if self._unread > MOST_UNREAD or self.held.size > MOST_HELD:
            self._pause()

    def _pause(self) -> None:
        assert self._transport is not None, "it has just received something"
        self._paused = True
        self._transport.pause_reading()
        if not self.complete and self._slow_s < math.inf:
            self._slow = self._loop.call_later(self._slow_s, self._on_slow)

    def _shut(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self._transport.close()

    def news(self) -> asyncio.Future[None]:
        """Return a future that is done when more of the answer has arrived.

        Raises:
            ConnectionLost: the connection has ended.
        """
        if self._lost:
            raise self._end()
        self._take = None
        self._waiter = self._loop.create_future()
        return self._waiter

    def _end(self) -> ConnectionLost:
        stale = self.kept and not (self._silent or self._answered)
        return ConnectionLost("the connection ended", silent=self._silent, stale=stale)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _look(self) -> None:
        """Check whether nothing has arrived for too long. One timer serves many reads."""
        self._timer = None
        if self.complete or self._lost:
            return
        now = self._loop.time()
        at = self._received_at + self._read_timeout_s
        if at <= now and not self._paused:
            self._silent = True
            self._fail()
            return
        if at <= now:
            # The client does not read; the engine is not at fault.
            at = now + self._read_timeout_s
        if self._silence is not None:
            at = min(at, self._silence.look(self._received_at, now))
            if self._silence.due:
                self.due = True
                self._wake()
        self._look_by(at)

    def _look_by(self, at: float) -> None:
        """Have ``_look`` called at a time, or earlier: a timer that is set is not put off."""
        if self._timer is not None and self._look_at > at:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._look_at = at
            self._timer = self._loop.call_at(at, self._look)

    def _fail(self) -> None:
        self._lost = True
        self._shut()
        self._wake()

    # Callbacks of the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._alive_at = self._received_at
        self._received_at = self._loop.time()
        self._answered = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail()
            return
        self._unread += len(data)
        if self._unread > LEAST_UNREAD and not self._paused:
            self._count()
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        try:
            if self._take is None or self.complete or len(data) > MOST_AT_ONCE or self._take():
                waiter.set_result(None)
        except Exception as error:
            # It is raised where the answer is awaited.
            waiter.set_exception(error)

    def pause_writing(self) -> None:
        self._may_write = False

    def resume_writing(self) -> None:
        self._may_write = True
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        self._shut()
        self._wake()

    # Callbacks of the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(name) == 12 and name.lower() == b"content-type":
            self._content_type = value
        elif len(name) == 11 and name.lower() == b"retry-after":
            self._retry_after = value
        elif len(name) == len(preemptions.HEADER) and name.lower() == preemptions.HEADER:
            self._preemptions = preemptions.read_count(value)

    def on_headers_complete(self) -> None:
        self._head_came = self._parser.get_status_code() >= 200

    def on_message_complete(self) -> None:
        # An interim answer (1xx) is a separate message.
        self.complete = self._head_came
        self._keeps_alive = self.complete and bool(self._parser.should_keep_alive())
        if self.complete and self._on_complete is not _nothing:
            # Not called within the parser, where an exception of the callback would be a parser
            # error.
            self._loop.call_soon(self._on_complete)


def _nothing() -> None:
    pass


def request_head(method: str, path: str, base_url: str, key: str | None) -> bytes:
    """Return the beginning of a request's head; ``key`` is a bearer token."""
    head = f"{method} {path} HTTP/1.1\r\nhost: {urlsplit(base_url).netloc}\r\n"
    return (head if key is None else f"{head}authorization: Bearer {key}\r\n").encode()
