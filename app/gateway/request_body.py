"""Reads and parses request bodies within limits of length, time and memory.

A body of up to ``LONGEST_WHOLE`` bytes is parsed at once, unless it is an unusual one. A longer
body is kept as received in one piece of memory, and scanned in slices
(``app.protocol.json_body.scan``). Each iteration of the event loop scans one slice of one request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from mmap import MADV_DONTNEED, MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any, Final

from app import alarms
from app.config.ingress import IngressSettings
from app.core import errors
from app.core.dialect import Route
from app.gateway.body_memory import BodyMemory, HeldMemory, NoRoom
from app.protocol.json_body.members import Reparsed
from app.protocol.json_body.parse import LONGEST_WHOLE
from app.protocol.json_body.scan import Steps
from app.protocol.requests import Inbound, parse_plain_request, read_request

Scope = MutableMapping[str, Any]
Headers = Mapping[bytes, bytes]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_MIB: Final = 1024 * 1024
_COPIED: Final = 256 * 1024
"""Bytes copied at a time: 0.1 ms."""
FREED: Final = 2 * 1024 * 1024
"""Bytes freed at a time: 0.3 ms. The kernel would take 6 ms for 64 MiB."""
_TRY_AGAIN_S: Final = 2.0
"""A useful retry interval: how long other requests keep their memory is unknown."""
_PARSED_FOR_S: Final = 0.1
"""How long the parsed members of a body are kept beside its bytes. Most requests are forwarded
within that time and need not parse the body again."""
_DIGITS: Final = 18


class ClientGone(Exception):
    """The client closed its connection before its request was complete."""


class Bodies:
    """The request bodies in one ingress. Belongs to its event loop.

    Attributes:
        memory: the memory that they take.
    """

    def __init__(self) -> None:
        self.memory = BodyMemory()
        self._turn = asyncio.Lock()

    def room_for(self, tenant: str, settings: IngressSettings) -> Room:
        """Return the memory reservation for one request of a tenant."""
        return Room(self, tenant, settings)

    async def in_turns(self, steps: Steps[Inbound]) -> Inbound:
        """Run a generator. Each iteration of the event loop runs one step of one generator.

        The task that runs a step keeps the lock until the next iteration. The lock is fair: the
        task that has waited longest gets it next.
        """
        while True:
            async with self._turn:
                try:
                    next(steps)
                except StopIteration as end:
                    inbound: Inbound = end.value
                    return inbound
                await asyncio.sleep(0)

    def refuse(self, reason: NoRoom, longest: int) -> errors.ApiError:
        """Return the error for a body without memory; count it if other bodies take the memory."""
        if reason is NoRoom.TOO_LARGE:
            return errors.BodyTooLarge(longest)
        used = self.memory.used // _MIB
        alarms.PROCESS.raised(f"refused for {reason.value}", f"bodies take {used} MiB")
        return errors.no_memory(reason.value, _TRY_AGAIN_S)


def _declared_length(headers: Headers) -> int | None:
    declared = headers.get(b"content-length", b"")
    if not declared.isdigit():
        return None
    return int(declared[:_DIGITS]) if len(declared) <= _DIGITS else 10**_DIGITS


class Room:
    """The memory of one request's body: a context that holds it.

    After the context has been left, the request's fields must not be used: the fields of a long
    body are views of memory that has been freed.
    """

    def __init__(self, bodies: Bodies, tenant: str, settings: IngressSettings) -> None:
        self._bodies = bodies
        self._settings = settings
        self._held = HeldMemory(bodies.memory, tenant)
        self._limits = settings.body_limits
        self._pages: mmap | None = None

    @property
    def _longest(self) -> int:
        return self._limits.longest_for(self._held.tenant)

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.release()
        if self._pages is not None:
            # Freed in parts after the reservation is released; that is faster than another request
            # can fill as much.
            _give_back(self._pages, 0)

    async def read(self, route: Route, headers: Headers, receive: Receive) -> Inbound:
        """Read a body and return the request.

        Raises:
            BodyTooLarge: the body exceeds the limit.
            Unavailable: other bodies take the memory that it needs.
            RequestTimeout: the body did not arrive in time.
            InvalidRequest: the body is not a valid request.
            ClientGone: the client disconnected.
        """
        length = _declared_length(headers)
        if length is not None:
            self._take(length)
        body = await self._receive_all(receive, length)
        inbound = parse_plain_request(route, body) if isinstance(body, bytes) else None
        if inbound is None:
            return await self._bodies.in_turns(read_request(route, memoryview(body)))
        # Not `isinstance`, which takes 0.4 us for an abstract class.
        if type(inbound.fields) is Reparsed:
            loop = asyncio.get_running_loop()
            loop.call_later(_PARSED_FOR_S, inbound.fields.forget)
        return inbound

    def _take(self, length: int) -> None:
        reason = self._held.hold(length, self._limits)
        if reason is not None:
            raise self._bodies.refuse(reason, self._longest)

    async def _receive_all(self, receive: Receive, declared: int | None) -> bytes | memoryview:
        """Return the body: ``bytes`` of up to ``LONGEST_WHOLE``, else a view of its memory."""
        begun, length, pieces = asyncio.get_running_loop().time(), 0, list[bytes]()
        memory: memoryview | None = None
        more = True
        while more:
            piece, more = await self._receive(receive, begun, length)
            if declared is None:
                self._take(length + len(piece))
            elif length + len(piece) > declared:
                raise errors.InvalidRequest("The request body is longer than its content-length.")
            if memory is None and length + len(piece) > LONGEST_WHOLE:
                self._pages = _pages(self._longest if declared is None else declared)
                memory = memoryview(self._pages)
                start = b"".join(pieces)
                memory[: len(start)] = start
            if memory is None:
                pieces.append(piece)
            else:
                await _copy(piece, memory, length)
            length += len(piece)
        return b"".join(pieces) if memory is None else memory[:length]

    async def _receive(self, receive: Receive, begun: float, length: int) -> tuple[bytes, bool]:
        """Return the next piece, and whether more follow.

        The deadline is ``body_timeout_s`` after the begin, extended by the time that the bytes
        received so far take at ``body_min_rate_kb``.
        """
        settings = self._settings
        patience_s = settings.body_timeout_s + length / (settings.body_min_rate_kb * 1024)
        try:
            async with asyncio.timeout_at(begun + patience_s):
                message = await receive()
        except TimeoutError:
            raise errors.RequestTimeout from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        return message.get("body", b""), message.get("more_body", False)


def _pages(size: int) -> mmap:
    """Return private memory of a size. The kernel allocates its pages only as they are written.

    A growing ``bytearray`` would sometimes be copied as a whole.
    """
    return mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS)


def _give_back(pages: mmap, start: int) -> None:
    """Give memory back to the kernel, one part per iteration of the event loop."""
    pages.madvise(MADV_DONTNEED, start, min(FREED, len(pages) - start))
    if start + FREED < len(pages):
        asyncio.get_running_loop().call_soon(_give_back, pages, start + FREED)


async def _copy(piece: bytes, memory: memoryview, at: int) -> None:
    for start in range(0, len(piece), _COPIED):
        part = piece[start : start + _COPIED]
        memory[at + start : at + start + len(part)] = part
        # Let other tasks run in between, even if the next piece is there already.
        await asyncio.sleep(0)
