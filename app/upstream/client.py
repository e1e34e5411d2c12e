"""The HTTP client through which an ingress sends requests to the engines' own servers.

``EngineClient.send`` sends a request to one replica. Either it raises ``EngineUnreachable`` before
the first byte of an answer, so that the request can go to another replica, or it has an answer: a
whole one, a stream, or an error.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final, Self
from weakref import WeakValueDictionary

from app.contracts.status import ReplicaStatus
from app.core import errors
from app.core.dialect import Route
from app.protocol import engine_errors
from app.protocol.json_body.spliced import JSON_TYPE, Spliced
from app.protocol.requests import is_preamble, stream_error
from app.protocol.sse import comments, parse_block
from app.upstream.http1 import ConnectionLost, Response, request_head
from app.upstream.pool import Connections
from app.upstream.preemptions import EngineEvents
from app.upstream.silence import Silence

_COLON: Final = ord(":")
_EVENT_STREAM: Final = b"text/event-stream"


class EngineUnreachable(Exception):
    """The engine was lost before it sent any part of an answer.

    Attributes:
        timed_out: whether the engine accepted the request and did not answer in time.
        silent: whether, in all that time, it sent nothing to any other request of this ingress
            either.
    """

    def __init__(self, *, timed_out: bool = False, silent: bool = False) -> None:
        super().__init__()
        self.timed_out = timed_out
        self.silent = silent


class EngineFailed(Exception):
    """The engine answered with an error of its own, before any part of an answer.

    Another replica may succeed. ``error`` is what the client gets if there is no other.
    """

    def __init__(self, error: errors.ServerError) -> None:
        super().__init__(error.message)
        self.error = error


class EngineBroke(Exception):
    """The engine was lost in the middle of an answer; ``silent`` as in ``EngineUnreachable``."""

    def __init__(self, *, silent: bool = False) -> None:
        super().__init__()
        self.silent = silent


class _Pulse:
    """When a replica last sent anything, to any of this ingress's requests."""

    __slots__ = ("__weakref__", "_at")

    def __init__(self) -> None:
        self.beat()

    def beat(self) -> None:
        self._at = time.monotonic()

    def missed(self, error: ConnectionLost, read_timeout_s: float) -> bool:
        """Return whether a read timed out because the whole replica was silent for as long.

        If one request stalls while others make progress, the replica is not at fault.
        """
        return error.silent and self.silent_for(read_timeout_s)

    def silent_for(self, seconds: float) -> bool:
        """Return whether the replica has sent nothing for so long."""
        # A little less, because the two clocks did not start at the same moment.
        return time.monotonic() - self._at > 0.9 * seconds


@dataclass(frozen=True, slots=True)
class UnaryAnswer:
    """A whole answer with status 200.

    Attributes:
        body: its body.
        preemptions: how often the engine has suspended its request; ``None`` if it does not tell.
    """

    body: bytes
    preemptions: int | None = None


class StreamedAnswer:
    """An answer with status 200 whose first events have arrived.

    Read it in a ``with`` block. Leaving the block before the answer has ended closes the
    connection, and then the engine aborts the request.
    """

    def __init__(
        self,
        first: list[bytes],
        reader: EngineEvents,
        response: Response,
        pulse: _Pulse,
        read_timeout_s: float,
        release: Callable[[], None],
    ) -> None:
        self._first = first
        self._reader = reader
        self._response = response
        self._pulse = pulse
        self._read_timeout_s = read_timeout_s
        self._release = release

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    @property
    def complete(self) -> bool:
        """Whether the engine has sent the whole answer, even if it has not been read yet."""
        return self._response.complete

    @property
    def preemptions(self) -> int | None:
        """How often the engine has suspended the request so far; ``None`` if it does not tell."""
        return self._reader.preemptions

    def watch(
        self, slow_s: float, on_slow: Callable[[], None], on_complete: Callable[[], None]
    ) -> None:
        """Set the callbacks for a slow client; see ``EngineConnection.watch``."""
        self._response.watch(slow_s, on_slow, on_complete)

    def arrived(self) -> list[bytes]:
        """Return the events that have arrived since the last call, without waiting.

        They are unchanged (``EventReader.blocks``). Events that arrived together are returned
        together, so that they are also sent together. Comments are returned too. They are no sign
        of life: an engine's HTTP server also sends them while its GPU is stuck.
        """
        first, self._first = self._first, []
        piece = self._response.take_piece()
        if not piece:
            return first
        blocks = self._reader.blocks(piece)
        if piece[0] == _COLON and not _has_event(blocks):
            self._response.disregard()
        else:
            self._pulse.beat()
        return first + blocks if first else blocks

    async def next_events(self) -> list[bytes]:
        """Wait for events, and return them as ``arrived`` does; none at the end.

        Raises:
            EngineBroke: the connection ended before the HTTP message did.
        """
        while not (blocks := self.arrived()) and not self._response.complete:
            await self._unless_lost(self._response.more)
        return blocks

    async def pass_on(self, take: Callable[[], bool]) -> None:
        """Wait, and call ``take`` whenever something arrives; see ``EngineConnection.pass_on``.

        Raises:
            EngineBroke: the connection ended before the HTTP message did.
        """
        await self._unless_lost(partial(self._response.pass_on, take))

    async def _unless_lost(self, wait: Callable[[], Awaitable[None]]) -> None:
        try:
            await wait()
        except ConnectionLost as error:
            silent = self._pulse.missed(error, self._read_timeout_s)
            raise EngineBroke(silent=silent) from error


class EngineClient:
    """Connections from one ingress to the engines of all its models."""

    def __init__(self) -> None:
        self._pulses: WeakValueDictionary[str, _Pulse] = WeakValueDictionary()
        self._connections = Connections()

    async def close(self) -> None:
        """Close the idle connections."""
        self._connections.close()

    def is_silent(self, replica_id: str, seconds: float) -> bool:
        """Return whether a replica has sent nothing to any running request for so long."""
        pulse = self._pulses.get(replica_id)
        return pulse is not None and pulse.silent_for(seconds)

    async def send(
        self,
        replica: ReplicaStatus,
        route: Route,
        body: bytes | Spliced,
        *,
        request_id: str,
        trace: bytes = b"",
        read_timeout_s: float,
        silence: Silence | None = None,
        headers: bytes = b"",
    ) -> UnaryAnswer | StreamedAnswer:
        """Send a request to an engine and return its answer.

        The engine gets only the headers set here, ``headers``, which are lines of a request's head,
        and of the client's at most its trace context: ``trace`` has the lines that pass it on.
        ``read_timeout_s`` is the longest pause between two reads, in seconds. ``silence`` watches
        shorter pauses, from
        the sending on; what its ``handle`` raises is raised here.

        Raises:
            EngineUnreachable: the engine was lost before it sent any part of an answer.
            EngineFailed: the engine answered with an error of its own.
            ApiError: the engine rejected the request.
        """
        url = replica.base_url
        kind = body.content_type if isinstance(body, Spliced) else JSON_TYPE
        own = b"content-type: %b\r\nx-request-id: %b\r\ncontent-length: %d\r\n" % (
            kind, request_id.encode(), len(body),
        )  # fmt: skip
        head = _head(route, url, replica.key) + headers + own + trace + b"\r\n"
        pulse = self._pulses.get(replica.replica_id)
        if pulse is None:
            pulse = self._pulses[replica.replica_id] = _Pulse()
        try:
            connection, response = await self._connections.send(
                url, head, body, read_timeout_s, silence
            )
        except ConnectionLost as error:
            raise _unreachable(error, pulse, read_timeout_s) from error

        def release() -> None:
            self._connections.give_back(url, connection)

        streamed = None
        try:
            if response.status != 200 or response.content_type != _EVENT_STREAM:
                return await _read_whole(response, route, pulse)
            first, reader = await _read_first(response, route, pulse, silence)
            streamed = StreamedAnswer(first, reader, response, pulse, read_timeout_s, release)
            return streamed
        except ConnectionLost as error:
            raise _unreachable(error, pulse, read_timeout_s) from error
        finally:
            if streamed is None:
                release()


@lru_cache(1024)
def _head(route: Route, base_url: str, key: str) -> bytes:
    """Return the part of the request head that is the same for all requests to a route."""
    return request_head("POST", route.path, base_url, key)


async def _read_whole(response: Response, route: Route, pulse: _Pulse) -> UnaryAnswer:
    body = await response.read()
    pulse.beat()
    if response.status != 200:
        error = engine_errors.from_engine(
            response.status, body, route.prompt_field, response.retry_after
        )
        raise _fault(error)
    return UnaryAnswer(body, response.preemptions)


def _has_event(blocks: list[bytes]) -> bool:
    return any(parse_block(block) for block in blocks)


async def _read_first(
    response: Response, route: Route, pulse: _Pulse, silence: Silence | None
) -> tuple[list[bytes], EngineEvents]:
    """Return the first events of a stream. Raises the error that a stream begins with, if any."""
    reader = EngineEvents(response.preemptions)
    begun: list[bytes] = []
    while piece := await response.next_piece():
        blocks = reader.blocks(piece)
        # Parsed one by one, up to the first that tells: many may have arrived together.
        events = (event for block in blocks if (event := parse_block(block)))
        event = next(events, None)
        if event is not None or begun:
            pulse.beat()
            begun += blocks
            while event is not None and is_preamble(event, route):
                event = next(events, None)
            if event is None:
                continue
            if failure := stream_error(event, route):
                raise _fault(failure)
            return begun, reader
        if blocks:
            response.disregard()
            if silence is not None:
                await silence.pass_on(b"".join(map(comments, blocks)))
    raise EngineUnreachable  # the stream ended before its first event


def _unreachable(error: ConnectionLost, pulse: _Pulse, read_timeout_s: float) -> EngineUnreachable:
    silent = pulse.missed(error, read_timeout_s)
    return EngineUnreachable(timed_out=error.silent, silent=silent)


def _fault(error: errors.ApiError) -> Exception:
    return EngineFailed(error) if isinstance(error, errors.ServerError) else error
