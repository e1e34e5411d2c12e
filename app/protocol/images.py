"""Counts the images of a request, for models whose rate card has a price for them. Pure.

Engines report the tokens of images, if anything, and not their number. So the parts of the prompt
are counted that stand for an image, wherever an engine looks for one: in messages and input items,
in their contents, in the results of tools, and in documents and other inputs of pooled routes.

A long value is not parsed, which could take seconds and much memory. It is searched for the names
or types of such parts, in any spelling of JSON. So it may have an image more where a part that is
no image has such a name inside, as in the arguments of a tool's call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
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
    Route.TRANSCRIPTIONS: (),
}
"""Where a route's prompt may have images."""
_NAMES: Final = frozenset({"image_url", "image_embeds", "image_pil"})
"""Names that an image's part has, and no other: OpenAI's, and vLLM's own."""
_TYPES: Final[Mapping[Route, str]] = {Route.MESSAGES: "image", Route.RESPONSES: "input_image"}
"""On these routes the part's type says that it is one: its payload has several names."""
_HELD: Final = ("content", "output")
"""Names of what parts are in: a message's, a tool's result, and that of Responses."""

_CHUNK: Final = 64 * 1024
"""How much is searched at a time: 0.1 ms, or five at worst."""
_LONGEST_HIT: Final = 1024
# A letter may be written as an escape, of six bytes.
_WORD: Final = rb'"((?:[a-z_]|\\u00[5-7][0-9A-Fa-f]){4,12}+)"\s{0,64}:'
_NAME: Final = re.compile(_WORD)
_TYPE: Final = re.compile(_WORD + rb'\s{0,64}"((?:[a-z_]|\\u00[5-7][0-9A-Fa-f]){4,12}+)"')


def with_images(inbound: Inbound) -> Steps[Inbound]:
    """Return a request with the number of its images, yielding every few milliseconds."""
    route, found = inbound.route, 0
    for name in _FIELDS.get(route, _POOLED) if route.takes_slot else ():
        value = inbound.fields.get(name)
        if isinstance(value, RawJson):
            found += yield from _raw_images(route, value)
        else:
            found += _images(route, value)
        yield
    return inbound._replace(images=found)


def _images(route: Route, value: object) -> int:
    """Return how many images a parsed value holds, which may be nested to any depth."""
    found, left, wanted = 0, [value], _TYPES.get(route)
    while left:
        one = left.pop()
        if type(one) is list:
            left += [item for item in one if type(item) in (list, dict)]
        elif type(one) is dict:
            is_image = bool(one.keys() & _NAMES) if wanted is None else one.get("type") == wanted
            if is_image:
                found += 1
            else:
                left += [held for name in _HELD if (held := one.get(name)) is not None]
    return found


def _raw_images(route: Route, raw: RawJson) -> Steps[int]:
    """Return how many images a raw value holds."""
    wanted, found = _TYPES.get(route), 0
    pattern = _NAME if wanted is None else _TYPE
    is_image = _names_one if wanted is None else _of_type(wanted)
    for start in range(0, len(raw), _CHUNK):
        # Those that begin in the next chunk are found there.
        chunk = bytes(raw.data[start : start + _CHUNK + _LONGEST_HIT])
        for hit in pattern.finditer(chunk):
            found += hit.start() < _CHUNK and is_image(hit)
        yield
    return found


def _names_one(hit: re.Match[bytes]) -> bool:
    return _spelled(hit[1]) in _NAMES


def _of_type(wanted: str) -> Callable[[re.Match[bytes]], bool]:
    return lambda hit: _spelled(hit[2]) == wanted and _spelled(hit[1]) == "type"


def _spelled(word: bytes) -> Any:
    return orjson.loads(b'"%b"' % word) if b"\\" in word else word.decode()
