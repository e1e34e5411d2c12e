"""A hash of a prompt's beginning, by which requests find the replica that has it cached. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final
from zlib import crc32

import orjson

from app.dialect import Route
from app.json_depth import TooDeep
from app.json_members import LONGEST_PARSED
from app.json_scan import InvalidJson, first_items
from app.raw_json import RawJson

_CHARACTERS: Final = 256
_MOST_ITEMS: Final = 8
"""How many messages are searched for the first of the user's. Usually it is the first or second;
a few shaped to be slow take 2 ms."""
_LONGEST_ESCAPE: Final = 12
"""Bytes of the longest way to write one character: two ``\\u`` escapes."""
# What a cut can leave of an escape, or of the first of two that are one character.
_TORN: Final = re.compile(rb"(?:\\u[dD][89abAB][0-9a-fA-F]{2})?(?:\\(?:u[0-9a-fA-F]{0,3})?)?\Z")


def prompt_prefix(route: Route, fields: Mapping[str, Any]) -> int | None:
    """Return a hash of the prompt's beginning, which stays as a conversation grows.

    For messages that is everything up to the first of the user's. A prompt that is kept as bytes
    has the same hash as a parsed one, if these messages are short enough to be parsed.
    """
    prompt = fields.get(route.prompt_field)
    if isinstance(prompt, str):
        start: Any = prompt[:_CHARACTERS]
    elif isinstance(prompt, RawJson):
        start = _raw_start(route, prompt)
    elif isinstance(prompt, list) and route is not Route.EMBEDDINGS:
        start = _leading(prompt) or prompt[:1]
    else:
        return None
    if start is None:
        return None
    instructions = fields.get("instructions")
    if isinstance(instructions, RawJson):
        instructions = crc32(instructions.data[:LONGEST_PARSED])
    return crc32(orjson.dumps([instructions, start]))


def _leading(items: Iterable[Any]) -> list[Any] | None:
    """Return the messages up to the first of the user's, if that is among the first ones."""
    leading = []
    for item in items:
        leading.append(item)
        if isinstance(item, dict) and item.get("role") == "user":
            return leading
        if len(leading) == _MOST_ITEMS:
            break
    return None


def _raw_start(route: Route, raw: RawJson) -> Any:
    if raw.startswith(b'"'):
        return _first_characters(raw)
    if not raw.startswith(b"[") or route is Route.EMBEDDINGS:
        return None
    try:
        leading = _leading(first_items(raw))
    except (InvalidJson, TooDeep):
        # The engine says what is wrong with it.
        return None
    return crc32(raw.data[:LONGEST_PARSED]) if leading is None else leading


def _first_characters(raw: RawJson) -> str | None:
    cut = bytes(raw.data[1 : 1 + _CHARACTERS * _LONGEST_ESCAPE])
    text = cut.decode("utf-8", "ignore").encode()
    try:
        found: str = orjson.loads(b'"%b"' % _TORN.sub(b"", text, count=1))
    except orjson.JSONDecodeError:
        return None
    return found[:_CHARACTERS]
