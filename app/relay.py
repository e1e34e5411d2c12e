"""The HTTP passage from the ingress to an engine's own server.

An ``EngineClient`` opens a passage to one replica. It either fails before the first byte of an
answer, as ``EngineUnreachable``, so that the request can go to another replica, or it has an
answer: whole, streamed, or an error.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

import aiohttp

from app import errors
from app.dialect import Route
from app.openai_api import stream_error
from app.snapshot import ReplicaStatus
from app.sse import Event, EventReader

_CONNECT_TIMEOUT_S = 5.0
# Below the five seconds after which uvicorn, which the engines stand on, closes an idle
# connection: the side that writes next must be the one that gives up first.
_KEEPALIVE_S = 3.0
_EVENT_STREAM = "text/event-stream"


class EngineUnreachable(Exception):
    """The engine was lost before it sent any of an answer.

    ``silent``: it had taken the request, and all the time that was waited for an answer nothing
    came from it to anybody here.
    """

    def __init__(self, *, silent: bool = False) -> None:
        super().__init__()
        self.silent = silent


class EngineFailed(Exception):
    """The engine answered, but with a fault of its own, before it sent any of an answer.

    Another replica may do better. ``error`` is what the client gets if there is none.
    """

    def __init__(self, error: errors.ServerError) -> None:
        super().__init__(error.message)
        self.error = error


class EngineBroke(Exception):
    """The engine was lost in the middle of an answer; ``silent`` as above."""

    def __init__(self, *, silent: bool = False) -> None:
        super().__init__()
        self.silent = silent


class _Pulse:
    """When something came from a replica last, to any request that is there."""

    __slots__ = ("__weakref__", "_at")

    def __init__(self) -> None:
        self.beat()

    def beat(self) -> None:
        self._at = time.monotonic()

    def missed(self, error: Exception, read_timeout_s: float) -> bool:
        """Whether a read failed because the replica as a whole was silent for so long.

        One request that stands still while others get on is its own misfortune.
        """
        silent_s = time.monotonic() - self._at
        # A little less: the two clocks began one after the other.
        return isinstance(error, aiohttp.SocketTimeoutError) and silent_s > 0.9 * read_timeout_s


@dataclass(frozen=True, slots=True)
class UnaryAnswer:
    """A whole answer with status 200."""

    body: bytes


class StreamedAnswer:
    """An answer with status 200 whose first events have come.

    Iterating yields them and then the rest, a list for each piece read from the engine, so that
    what came together leaves together.
    """

    def __init__(
        self,
        first: list[Event],
        reader: EventReader,
        response: aiohttp.ClientResponse,
        pulse: _Pulse,
        read_timeout_s: float,
    ) -> None:
        self._first = first
        self._reader = reader
        self._response = response
        self._pulse = pulse
        self._read_timeout_s = read_timeout_s

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        """Yield events as they come.

        Raises:
            EngineBroke: the connection ended before the HTTP message did.
        """
        yield self._first
        try:
            async for piece in self._response.content.iter_any():
                self._pulse.beat()
                if events := list(self._reader.feed(piece)):
                    yield events
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            silent = self._pulse.missed(error, self._read_timeout_s)
            raise EngineBroke(silent=silent) from error


class EngineClient:
    """Connections from one ingress to the engines of all its models."""

    def __init__(self) -> None:
        self._pulses: WeakValueDictionary[str, _Pulse] = WeakValueDictionary()
        self._session = aiohttp.ClientSession(
            # An engine's slots bound its connections, so the connector does not.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            # Engines compress nothing, and what they send is passed on as it is.
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
            # The engines' addresses are on this machine or in this cluster: proxies set in the
            # environment are not for them.
            trust_env=False,
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    @asynccontextmanager
    async def send(
        self,
        replica: ReplicaStatus,
        route: Route,
        body: bytes,
        *,
        request_id: str,
        read_timeout_s: float,
    ) -> AsyncIterator[UnaryAnswer | StreamedAnswer]:
        """Send a request to an engine and yield its answer.

        Only the headers named here reach the engine: none of the client's do. Leaving the block
        before the answer has ended closes the connection, upon which the engine aborts.
        ``read_timeout_s`` is the longest pause between two reads.

        Raises:
            EngineUnreachable: the engine was lost before it sent anything of an answer.
            EngineFailed: it answered with a fault of its own.
            ApiError: it refused the request.
        """
        headers = {
            "content-type": "application/json",
            "authorization": f"Bearer {replica.key}",
            "x-request-id": request_id,
        }
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=read_timeout_s
        )
        pulse = self._pulses.get(replica.replica_id)
        if pulse is None:
            pulse = self._pulses[replica.replica_id] = _Pulse()
        try:
            response = await self._session.post(
                replica.base_url + route.path, data=body, headers=headers, timeout=timeout
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise EngineUnreachable(silent=pulse.missed(error, read_timeout_s)) from error
        async with response:
            yield await _read_answer(response, route, pulse, read_timeout_s)


async def _read_answer(
    response: aiohttp.ClientResponse, route: Route, pulse: _Pulse, read_timeout_s: float
) -> UnaryAnswer | StreamedAnswer:
    try:
        if response.status != 200:
            body = await response.read()
            pulse.beat()
            raise _fault(errors.from_engine(response.status, body, route.prompt_field))
        if response.content_type != _EVENT_STREAM:
            body = await response.read()
            pulse.beat()
            return UnaryAnswer(body)
        reader, events = EventReader(), []
        async for piece in response.content.iter_any():
            if events := list(reader.feed(piece)):
                break
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise EngineUnreachable(silent=pulse.missed(error, read_timeout_s)) from error
    if not events:
        raise EngineUnreachable  # the stream ended before its first event
    pulse.beat()
    if failure := stream_error(events[0], route):
        raise _fault(failure)
    return StreamedAnswer(events, reader, response, pulse, read_timeout_s)


def _fault(error: errors.ApiError) -> Exception:
    return EngineFailed(error) if isinstance(error, errors.ServerError) else error
