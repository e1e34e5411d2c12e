"""A hash of what requests share, used to route them to the replica that has it cached. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final
from zlib import crc32

import orjson

from app.core.dialect import Route
from app.protocol.json_body.depth import TooDeep
from app.protocol.json_body.members import LONGEST_PARSED
from app.protocol.json_body.raw import RawJson
from app.protocol.json_body.scan import InvalidJson, first_items

_CHARACTERS: Final = 256
_MOST_ITEMS: Final = 8
"""How many messages are searched for the first user message. Usually it is the first or second. A
few messages of the worst shape take 2 ms."""
_LONGEST_NAME: Final = 512
"""Characters of a client's own name for a prefix. OpenAI's ``prompt_cache_key`` is shorter."""
_LONGEST_CHARACTER: Final = 12
"""Bytes of the longest encoding of one character: two ``\\u`` escapes."""


def prompt_prefix(route: Route, fields: Mapping[str, Any]) -> int | None:
    """Return a hash of the prompt's prefix that stays the same as a conversation grows.

    For messages the prefix is everything up to the first user message. A prompt that is kept as
    bytes has the same hash as a parsed one, if these messages are short enough to be parsed.
    """
    prompt = fields.get(route.prompt_field)
    if isinstance(prompt, str):
        start: Any = prompt[:_CHARACTERS]
    elif isinstance(prompt, RawJson):
        start = _raw_start(route, prompt)
    elif isinstance(prompt, list) and route.generates:
        start = _leading(prompt) or prompt[:1]
    else:
        return None
    if start is None:
        return None
    instructions = _system(fields) if route.is_anthropic else fields.get("instructions")
    if isinstance(instructions, RawJson):
        instructions = crc32(instructions.data[:LONGEST_PARSED])
    return crc32(orjson.dumps([instructions, start]))


def _system(fields: Mapping[str, Any]) -> Any:
    """Return the system prompt of a messages request, without what differs by request in it.

    Claude Code begins it with a block that holds a hash of the request. Engines leave it out.
    """
    system = fields.get("system")
    if not isinstance(system, list):
        return system
    return [block for block in system if not _is_billing_header(block)]


def _is_billing_header(block: object) -> bool:
    text = block.get("text") if isinstance(block, dict) else None
    return isinstance(text, str) and text.startswith("x-anthropic-billing-header")


def named_prefix(fields: Mapping[str, Any], name: str) -> int | None:
    """Return a hash of the text with which a client names what its requests share, if there is one.

    ``name`` is the field: ``prompt_cache_key`` or ``user``. Other values than text are the engine's
    to refuse.
    """
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, RawJson):
        return crc32(value.data[:LONGEST_PARSED]) if value.startswith(b'"') else None
    if not isinstance(value, str) or not value:
        return None
    return crc32(orjson.dumps([name, value[:_LONGEST_NAME]]))


def _leading(items: Iterable[Any]) -> list[Any] | None:
    """Return the messages up to the first user message, if it is among the first eight."""
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
    if not raw.startswith(b"[") or not route.generates:
        return None
    try:
        leading = _leading(first_items(raw))
    except (InvalidJson, TooDeep):
        # The engine reports the error.
        return None
    return crc32(raw.data[:LONGEST_PARSED]) if leading is None else leading


def _first_characters(raw: RawJson) -> str | None:
    text = bytes(raw.data[1 : min(1 + _CHARACTERS * _LONGEST_CHARACTER, len(raw) - 1)])
    # The cut may be inside a character, or inside a surrogate pair.
    for end in range(len(text), max(len(text) - _LONGEST_CHARACTER, -1), -1):
        try:
            found: str = orjson.loads(b'"%b"' % text[:end])
        except orjson.JSONDecodeError:
            continue
        return found[:_CHARACTERS]
    return None
