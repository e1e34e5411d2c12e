"""Tells every observer of each request that has ended: metrics, logs, traces.

Observers run on the event loop, after the record was settled and before the last byte leaves. They
only take note: whatever costs time or may wait is done later, elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, TypeVar

from app import alarms
from app.ledger.record import UsageRecord
from app.observe.request_trace import RequestTrace

_T = TypeVar("_T")


CLIENT_GONE: Final = "client_gone"
"""The reason of a request whose client closed the connection before the end of its answer."""
CLIENT_GONE_STATUS: Final = 499
"""The status of such a request, for observers: what nginx logs."""
INTERNAL_ERROR: Final = "internal_error"
"""The reason of a request that failed by a fault of the ingress."""


class Context(NamedTuple):
    """What a request brings along that has no effect on its answer.

    Attributes:
        client_request_id: the header ``x-request-id`` as received, unchecked; empty without one.
        trace: its trace; ``None`` without one.
    """

    client_request_id: bytes = b""
    trace: RequestTrace | None = None


NO_CONTEXT: Final = Context()
"""The context of a request that brings nothing along."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A request to a known model that has ended.

    Attributes:
        record: its usage record, as the ledger has it. The ledger has none of a request that was
            abandoned.
        status: the HTTP status of its answer. A stream that was cut off has 200.
        context: what the request brought along.
    """

    record: UsageRecord
    status: int
    context: Context = NO_CONTEXT


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that ended before its model was known. The ledger has no record of it.

    Attributes:
        request_id: its unique id.
        route: the path below ``/v1/``.
        tenant: the tenant of its key; empty without a key, or with one that does not work.
        status: the HTTP status of its answer.
        reason: OpenAI's error code, or its type; or ``client_gone`` or ``internal_error``.
        key_id: the public part of its key, or empty.
        duration_s: from its arrival to its end, in seconds.
        context: what the request brought along.
    """

    request_id: str
    route: str
    tenant: str
    status: int
    reason: str
    key_id: str = ""
    duration_s: float = 0.0
    context: Context = NO_CONTEXT


class Observer(Protocol):
    """Is told of every request."""

    def ended(self, request: Ended) -> None:
        """Take note of a request to a known model."""
        ...

    def refused(self, request: Refused) -> None:
        """Take note of a request that was refused before its model was known."""
        ...


class Observers:
    """The observers of an ingress. One that fails is alarmed, and disturbs nobody else."""

    def __init__(self, *observers: Observer) -> None:
        self._observers: list[Observer] = list(observers)

    def add(self, observer: Observer) -> None:
        """Tell ``observer`` too, from now on."""
        self._observers.append(observer)

    def ended(self, request: Ended) -> None:
        """Tell all of a request to a known model."""
        for observer in self._observers:
            _tell(observer.ended, request)

    def refused(self, request: Refused) -> None:
        """Tell all of a request that was refused before its model was known."""
        for observer in self._observers:
            _tell(observer.refused, request)


def _tell(take_note: Callable[[_T], None], request: _T) -> None:
    try:
        take_note(request)
    except Exception as error:
        alarms.PROCESS.raised("observer", "a request was not taken note of", error)
