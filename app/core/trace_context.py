"""W3C trace context: the headers that join a client's trace with the engine's. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

SAMPLED: Final = 0x01
"""The flag of a trace whose spans are recorded."""
RANDOM: Final = 0x02
"""The flag of a trace whose id is random; whoever continues the trace keeps it."""

# Version ff is forbidden. A later version may have more fields, which are passed on.
_PARENT: Final = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
    rb"(-[!-~]{0,200})?"
)
_KEY: Final = (
    rb"(?:[a-z0-9][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"
)
_VALUE: Final = rb"[ -+\--<>-~]{0,255}[!-+\--<>-~]"
_MEMBER: Final = re.compile(_KEY + rb"=" + _VALUE)
_MOST_MEMBERS: Final = 32
_LONGEST_STATE: Final = 512


class TraceContext(NamedTuple):
    """A valid ``traceparent`` and its ``tracestate``.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: 16 hexadecimal digits: the sender's span.
        flags: the flags; see ``SAMPLED``.
        parent: the whole ``traceparent``.
        state: the ``tracestate``; empty if there is none, or an invalid one.
    """

    trace_id: str
    span_id: str
    flags: int
    parent: bytes
    state: bytes


def parse_trace_context(headers: Mapping[bytes, bytes]) -> TraceContext | None:
    """Return the trace context of a request; ``None`` without a valid one."""
    parent = headers.get(b"traceparent")
    if parent is None or (match := _PARENT.fullmatch(parent)) is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == b"00" and more is not None:
        return None
    state = headers.get(b"tracestate", b"")
    return TraceContext(
        trace_id.decode(),
        span_id.decode(),
        int(flags, 16),
        parent,
        state if _is_state(state) else b"",
    )


def _is_state(state: bytes) -> bool:
    if not state or len(state) > _LONGEST_STATE:
        return False
    members = [member.strip(b" \t") for member in state.split(b",")]
    # Members may be empty, and keys must differ.
    given = [member for member in members if member]
    keys = {member.partition(b"=")[0] for member in given}
    return len(given) == len(keys) <= _MOST_MEMBERS and all(map(_MEMBER.fullmatch, given))


def header_lines(parent: bytes, state: bytes) -> bytes:
    """Return the lines of an HTTP/1.1 head that pass a valid context on."""
    lines = b"traceparent: %b\r\n" % parent
    return lines + b"tracestate: %b\r\n" % state if state else lines


def traceparent(trace_id: str, span_id: str, flags: int) -> bytes:
    """Return a ``traceparent`` of version 00."""
    return f"00-{trace_id}-{span_id}-{flags:02x}".encode()
