"""The JSON object in a request's body: parsed if it is short, scanned if it is long. Pure.

Both ways accept the same documents and refuse the others with the same errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson

from app import errors
from app.json_depth import MAX_DEPTH, TooDeep, check_depth
from app.json_members import LONGEST_PARSED, Members, Reparsed
from app.json_scan import (
    MOST_MEMBERS,
    InvalidJson,
    NotAnObject,
    Steps,
    TooManyMembers,
    run,
    scan,
)

LONGEST_KEPT_PARSED: Final = 4 * 1024
"""Documents of up to so many bytes stay parsed while their requests wait. Parsed they take up to
24 times as much."""


def parse_object(body: bytes) -> Mapping[str, Any]:
    """Return the members of a document at once.

    Raises:
        InvalidRequest: it is not a JSON object, is nested too deeply or has too many members.
    """
    fields = _parse(body) if len(body) <= LONGEST_PARSED else None
    if fields is None:
        return run(scan_object(memoryview(body)))
    return fields if len(body) <= LONGEST_KEPT_PARSED else Reparsed(body, fields)


def scan_object(body: memoryview) -> Steps[Members]:
    """Find the members of a document of any length, yielding every few milliseconds.

    Raises:
        InvalidRequest: as ``parse_object``.
    """
    try:
        return (yield from scan(body))
    except InvalidJson:
        raise errors.InvalidRequest(
            "We could not parse the JSON body of your request. The OpenAI API expects a JSON "
            "payload, but what was sent was not valid JSON."
        ) from None
    except NotAnObject:
        raise errors.InvalidRequest("The JSON body of a request must be an object.") from None
    except TooDeep as error:
        raise _too_deep(error.name) from None
    except TooManyMembers:
        raise errors.InvalidRequest(
            f"The JSON body of a request may have at most {MOST_MEMBERS} fields.",
            code="invalid_value",
        ) from None


def _parse(body: bytes) -> dict[str, Any] | None:
    """Return the members of a usual document; the scanner decides about any other."""
    try:
        fields = orjson.loads(body)
        check_depth(body)
    except (orjson.JSONDecodeError, TooDeep):
        return None
    if not isinstance(fields, dict) or body.count(b":") > MOST_MEMBERS:
        return None
    return fields


def _too_deep(name: str | None) -> errors.InvalidRequest:
    where = "The JSON body of a request" if name is None else f"The value of '{name[:200]}'"
    return errors.InvalidRequest(
        f"{where} is nested too deeply: at most {MAX_DEPTH} levels are accepted.",
        param=name,
        code="invalid_value",
    )
