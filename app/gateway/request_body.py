"""Reads and parses request bodies within limits of length, time and memory.

A body of up to ``LONGEST_WHOLE`` bytes is parsed at once, unless it is an unusual one. One of up to
``LONGEST_SPARSE`` bytes is parsed whole if it has few arrays and objects. Any other body is scanned
in slices (``app.protocol.json_body.scan``). Each iteration of the event loop scans one slice, or
parses one body of more than ``LONGEST_WHOLE`` bytes. A body of more than ``LONGEST_SPARSE`` bytes
is kept as received in one piece of memory.
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
from app.core.unfinished import Finished, begin
from app.gateway.body_memory import BodyMemory, HeldMemory, NoRoom
from app.gateway.deadline import Deadline
from app.protocol.content_coding import (
    CODINGS,
    Decoder,
    InvalidCoded,
    UnknownCoding,
    decoder_for,
)
from app.protocol.json_body.members import Reparsed
from app.protocol.json_body.parse import LONGEST_SPARSE, LONGEST_WHOLE
from app.protocol.json_body.scan import Steps
from app.protocol.requests import (
    Inbound,
    parse_plain_request,
    read_form_request,
    read_long_request,
)

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
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
"""UTF-8's, which some clients on Windows begin a text with."""


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

    def pages(self, size: int | None) -> memoryview:
        """Return memory for a body of this size, or of the largest; given back with the context."""
        self._pages = _pages(self._longest if size is None else size)
        return memoryview(self._pages)

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
            UnsupportedEncoding: it is compressed in a way that is not decoded.
            InvalidRequest: the body is not a valid request.
            ClientGone: the client disconnected.
        """
        decoder = _decoder(headers)
        length = _declared_length(headers)
        if length is not None:
            self.take(length)
        body = await self._receive_all(receive, length, decoder)
        if body[:3] == _BYTE_ORDER_MARK and not route.is_form:
            body = body[3:]
        if route.is_form:
            content_type = headers.get(b"content-type", b"")
            return await self._bodies.in_turns(read_form_request(route, content_type, body))
        inbound = None
        if isinstance(body, bytes) and len(body) <= LONGEST_WHOLE:
            inbound = parse_plain_request(route, body)
        if inbound is None:
            inbound = await self._bodies.in_turns(read_long_request(route, body))
        # Not `isinstance`, which takes 0.4 us for an abstract class.
        if type(inbound.fields) is Reparsed:
            loop = asyncio.get_running_loop()
            loop.call_later(_PARSED_FOR_S, inbound.fields.forget)
        return inbound

    def take(self, length: int) -> None:
        """Reserve memory for a body of this length in bytes; see ``HeldMemory.hold``.

        Raises:
            BodyTooLarge, Unavailable: as ``read``.
        """
        reason = self._held.hold(length, self._limits)
        if reason is not None:
            raise self._bodies.refuse(reason, self._longest)

    async def _receive_all(
        self, receive: Receive, declared: int | None, decoder: Decoder | None
    ) -> bytes | memoryview:
        """Return the body, decoded, as ``_Collected.whole`` does."""
        begun, length = asyncio.get_running_loop().time(), 0
        piece, more = await self._receive(receive, begun, length)
        fits = declared is not None and len(piece) <= min(declared, LONGEST_WHOLE)
        if fits and decoder is None and not more:
            # Nearly every request: there is nothing to collect.
            return piece
        collected = _Collected(self, declared if decoder is None else None)
        while True:
            length += len(piece)
            if declared is not None and length > declared:
                raise errors.InvalidRequest("The request body is longer than its content-length.")
            if decoder is None:
                await collected.add(piece)
            else:
                # What decodes to little must be bounded, too.
                self.take(length)
                await self._decode(decoder, piece, collected)
            if not more:
                break
            piece, more = await self._receive(receive, begun, length)
        if decoder is not None:
            _finish(decoder)
        return collected.whole()

    async def _decode(self, decoder: Decoder, piece: bytes, collected: _Collected) -> None:
        try:
            for part in decoder.slices(piece):
                await collected.add(part)
                # Let other tasks run after each slice.
                await asyncio.sleep(0)
        except InvalidCoded:
            raise _not_decodable(decoder) from None

    async def _receive(self, receive: Receive, begun: float, length: int) -> tuple[bytes, bool]:
        """Return the next piece, and whether more follow.

        The deadline is ``body_timeout_s`` after the begin, extended by the time that the bytes
        received so far take at ``body_min_rate_kb``.
        """
        received = begin(receive())
        if isinstance(received, Finished):
            # Nearly every body: it has arrived with the head, and needs no deadline.
            message = received.result
        else:
            settings = self._settings
            patience_s = settings.body_timeout_s + length / (settings.body_min_rate_kb * 1024)
            try:
                with Deadline(begun + patience_s):
                    message = await received
            except TimeoutError:
                raise errors.RequestTimeout from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        return message.get("body", b""), message.get("more_body", False)


class _Collected:
    """A body as it arrives: in pieces while it is short, else in one piece of memory.

    Args:
        room: where the memory comes from.
        declared: the body's length, for which memory is reserved; ``None``: it is reserved as the
            body grows.
    """

    def __init__(self, room: Room, declared: int | None) -> None:
        self._room = room
        self._declared = declared
        self._length = 0
        self._pieces: list[bytes] = []
        self._memory: memoryview | None = None

    async def add(self, piece: bytes) -> None:
        """Add a piece.

        Raises:
            BodyTooLarge, Unavailable: there is no memory for it.
        """
        length = self._length + len(piece)
        if self._declared is None:
            self._room.take(length)
        if self._memory is None and length > LONGEST_SPARSE:
            self._memory = self._room.pages(self._declared)
            start = b"".join(self._pieces)
            self._memory[: len(start)] = start
        if self._memory is None:
            self._pieces.append(piece)
        else:
            await _copy(piece, self._memory, self._length)
        self._length = length

    def whole(self) -> bytes | memoryview:
        """Return the body: ``bytes`` of up to ``LONGEST_SPARSE``, else a view of the memory."""
        return b"".join(self._pieces) if self._memory is None else self._memory[: self._length]


def _decoder(headers: Headers) -> Decoder | None:
    try:
        return decoder_for(headers.get(b"content-encoding"))
    except UnknownCoding:
        raise errors.UnsupportedEncoding(CODINGS) from None


def _finish(decoder: Decoder) -> None:
    try:
        decoder.finish()
    except InvalidCoded:
        raise _not_decodable(decoder) from None


def _not_decodable(decoder: Decoder) -> errors.InvalidRequest:
    error = errors.InvalidRequest(
        f"The request body is not valid {decoder.coding}, which its Content-Encoding names.",
        code="invalid_value",
    )
    # The rest of the body is not read.
    error.headers["connection"] = "close"
    return error


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
