"""Reads the JSON object in a request's body: parsed if that is fast, otherwise scanned. Pure."""

from __future__ import annotations

from typing import Any, Final

import orjson

from app.core import errors
from app.protocol.json_body.depth import MAX_DEPTH, TooDeep, is_parsed_too_deep, is_too_deep
from app.protocol.json_body.members import Members
from app.protocol.json_body.scan import (
    MOST_MEMBERS,
    InvalidJson,
    NotAnObject,
    Steps,
    TooManyMembers,
    scan,
)

LONGEST_WHOLE: Final = 128 * 1024
"""Documents of up to this many bytes are parsed whole. Parsing takes 4 ms at worst (nothing but
empty arrays) and usually 0.1 ms."""
LONGEST_SPARSE: Final = 512 * 1024
"""Documents of up to this many bytes are parsed whole if they have few arrays and objects, such as
a chat with long messages. Parsing takes 5 ms at worst (an array of short strings) and usually
0.3 ms; scanning takes three times as long."""
FEW: Final = 512
"""Most arrays and objects of a sparse document."""
_COUNTED: Final = 4 * 1024
_SEARCHED: Final = 16 * 1024
"""In documents of at least this many bytes, a hundred brackets are found faster than the values are
checked."""


def parse_plain(body: bytes) -> dict[str, Any] | None:
    """Return the members of a usual document that is parsed whole.

    Returns ``None`` for an unusual document, which ``scan_object`` has to parse.

    Raises:
        InvalidRequest: it is not JSON.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        if is_too_deep(body):
            return None
        raise _not_json() from None
    if not isinstance(fields, dict) or len(fields) > MOST_MEMBERS or not _is_shallow(fields, body):
        return None
    return fields


def is_sparse(body: bytes) -> bool:
    """Return whether a document has at most ``FEW`` brackets that open an array or object."""
    return _has_at_most(FEW, body)


def _has_at_most(most: int, body: bytes) -> bool:
    """Return whether a document has so few brackets that open an array or object.

    Brackets in strings count as well. Finding the few brackets takes a fifth of the time of
    counting them all.
    """
    left, find = most, body.find
    for bracket in (b"{", b"["):
        at = find(bracket)
        while at >= 0:
            if not left:
                return False
            left -= 1
            at = find(bracket, at + 1)
    return True


def _is_shallow(fields: dict[str, Any], body: bytes) -> bool:
    """Return whether parsed JSON has at most ``MAX_DEPTH`` levels."""
    # Few brackets need no look at the values, which takes a fifth of the time of parsing.
    if len(body) <= _COUNTED:
        few = body.count(b"{") + body.count(b"[") <= MAX_DEPTH
    else:
        few = len(body) >= _SEARCHED and _has_at_most(MAX_DEPTH, body)
    return few or not is_parsed_too_deep(fields)


def scan_object(body: memoryview) -> Steps[Members]:
    """Find the members of a document of any length, yielding every few milliseconds.

    Raises:
        InvalidRequest: it is not a JSON object, is nested too deeply or has too many members.
    """
    try:
        return (yield from scan(body))
    except InvalidJson:
        raise _not_json() from None
    except NotAnObject:
        raise errors.InvalidRequest("The JSON body of a request must be an object.") from None
    except TooDeep as error:
        raise _too_deep(error.name) from None
    except TooManyMembers:
        raise errors.InvalidRequest(
            f"The JSON body of a request may have at most {MOST_MEMBERS} fields.",
            code="invalid_value",
        ) from None


def _not_json() -> errors.InvalidRequest:
    return errors.InvalidRequest(
        "We could not parse the JSON body of your request. The OpenAI API expects a JSON "
        "payload, but what was sent was not valid JSON."
    )


def _too_deep(name: str | None) -> errors.InvalidRequest:
    where = "The JSON body of a request" if name is None else f"The value of '{name[:200]}'"
    return errors.InvalidRequest(
        f"{where} is nested too deeply: at most {MAX_DEPTH} levels are accepted.",
        param=name,
        code="invalid_value",
    )
