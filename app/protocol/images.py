"""Counts the images of a request, for models whose rate card has a price for them. Pure.

Engines report the tokens of images, if anything, and not their number. So the parts of the prompt
are counted that stand for an image, wherever an engine looks for one: in messages and input items,
in their contents, in the results of tools, and in documents and other inputs of pooled routes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import orjson

from app.core.dialect import Route
from app.protocol.json_body.raw import RawJson
from app.protocol.json_body.scan import Steps
from app.protocol.requests import Inbound

_POOLED: Final = (
    "messages", "input", "query", "queries", "documents", "text_1", "text_2", "data_1", "data_2",
    "items",
)  # fmt: skip
_FIELDS: Final[Mapping[Route, tuple[str, ...]]] = {
    Route.CHAT: ("messages",),
    Route.COMPLETIONS: (),
    Route.RESPONSES: ("input",),
    Route.MESSAGES: ("messages",),
}
"""Where a route's prompt may have images."""
_NAMES: Final = ("image_url", "image_embeds", "image_pil")
"""Names that only an image's part has; the first is OpenAI's, and the others are vLLM's."""
_TYPES: Final = frozenset({"image", "input_image", "image_url", "image_embeds", "image_pil"})
"""Types of an image's part: Anthropic's, that of Responses, and those of chat completions."""
_HELD: Final = ("content", "output")
"""Names of what parts are in: a message's, a tool's result, and that of Responses."""

_CHUNK: Final = 256 * 1024
"""How much is searched at a time: less than a millisecond."""
_SHORTEST: Final = 1024
"""Base64 that is shorter than this is kept."""
_PAYLOAD: Final = re.compile(rb'(?<=[",])[A-Za-z0-9+/=_-]{1024,}+')
_REST: Final = re.compile(rb"[A-Za-z0-9+/=_-]*+")
_OPEN_END: Final = re.compile(rb'[",][A-Za-z0-9+/=_-]*+\Z')


def with_images(inbound: Inbound) -> Steps[Inbound]:
    """Return a request with the number of its images, yielding every few milliseconds."""
    found = 0
    for name in _FIELDS.get(inbound.route, _POOLED) if inbound.route.takes_slot else ():
        value = inbound.fields.get(name)
        if isinstance(value, RawJson):
            value = yield from _parsed(value)
        found += _images(value)
        yield
    return replace(inbound, images=found)


def _images(value: object) -> int:
    """Return how many images a value holds, which may be nested to any depth."""
    found, left = 0, [value]
    while left:
        one = left.pop()
        if type(one) is list:
            left += one
        elif type(one) is dict:
            if _is_image(one):
                found += 1
            else:
                left += [held for name in _HELD if (held := one.get(name)) is not None]
    return found


def _is_image(part: Mapping[str, Any]) -> bool:
    kind = part.get("type")
    # Engines also take a part without a type.
    named = kind is None and any(part.get(name) is not None for name in _NAMES)
    return named or (isinstance(kind, str) and kind in _TYPES)


def _parsed(raw: RawJson) -> Steps[object]:
    """Parse a raw value without its base64, which is nearly all of a long one.

    A payload follows a quote or the comma of a data URL. Where one stands, a zero is left, which is
    as valid in a string as it is for a number of a thousand digits.
    """
    kept: list[bytes] = []
    carried, inside = b"", False
    for start in range(0, len(raw), _CHUNK):
        chunk = carried + bytes(raw.data[start : start + _CHUNK])
        carried = b""
        if inside:
            chunk = _REST.sub(b"", chunk, count=1)
        if chunk:
            end = _OPEN_END.search(chunk)
            inside = end is not None and len(end.group()) > _SHORTEST
            if end is not None and not inside:
                # The beginning of a payload, or a short string.
                chunk, carried = chunk[: end.start()], end.group()
        kept.append(_PAYLOAD.sub(b"0", chunk))
        yield
    try:
        return orjson.loads(b"".join((*kept, carried)))
    except orjson.JSONDecodeError:
        # The engine refuses it.
        return None
