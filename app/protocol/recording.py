"""Requests to transcribe a recording: their form, and how long the recording is. Pure.

Engines tell how many seconds a recording has: in the ``usage`` of JSON, and as the ``duration`` of
verbose JSON. So an engine is always asked for one of the two, and other formats are made of it
(``app.protocol.transcripts``).
"""

from __future__ import annotations

import math
import secrets
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

from app.core import errors
from app.core.pricing import TOKENS_PER_SECOND
from app.protocol.form import File, Form, write_form
from app.protocol.json_body.spliced import Spliced
from app.protocol.token_estimate import Estimate

FILE: Final = "file"
FORMAT: Final = "response_format"
DIARIZED: Final = "diarized_json"
_ENGINE_FORMATS: Final = {
    "json": "json",
    "text": "json",
    "verbose_json": "verbose_json",
    "srt": "verbose_json",
    "vtt": "verbose_json",
    DIARIZED: DIARIZED,
}
"""What an engine is asked for, by what the client wants."""
_STREAMED: Final = ("json", "text")
_FLAGS: Final = ("stream", "fail_fast", "require_tier")
_WORDS: Final = {"true": True, "1": True, "false": False, "0": False}
_OWN: Final = frozenset({"model", FORMAT, "stream", "stream_include_usage"})
"""Fields that are set here. A stream's usage has tokens and no seconds."""
_WITHHELD: Final = _OWN | {"stream_continuous_usage_stats", "prompt_cache_key"}

CHUNK_S: Final = 30
"""Engines cut recordings into parts of this length, in seconds, each of which is a sequence."""
_BYTES_PER_SECOND: Final = 8000
"""64 kbit/s, between compressed speech and music; for files other than WAV."""
_SLOWEST: Final = 4000
_FASTEST: Final = 64 * 192_000
"""Bytes a second of a WAV file that is believed."""
_UNCOMPRESSED: Final = (1, 3, 0xFFFE)
"""Encodings of WAV: integers, floats, and either."""
_WAV_CHUNKS: Final = 64
"""How many chunks of a WAV file may come before its samples."""


def fields_of(form: Form) -> dict[str, Any]:
    """Return the fields of a form as those of a JSON request: flags and numbers are no texts.

    Raises:
        InvalidRequest: the format of the answer is unknown, or cannot be streamed.
    """
    fields: dict[str, Any] = {**form.last_texts}
    for name in _FLAGS:
        if name in fields:
            # Anything else is refused as no boolean.
            fields[name] = _WORDS.get(fields[name].strip().lower(), fields[name])
    if "start_within" in fields:
        fields["start_within"] = _number(fields["start_within"])
    wanted = fields.setdefault(FORMAT, "json")
    if wanted not in _ENGINE_FORMATS:
        known = ", ".join(f"'{name}'" for name in _ENGINE_FORMATS)
        raise errors.InvalidRequest(
            f"Invalid value for '{FORMAT}': expected one of {known}.",
            param=FORMAT,
            code="invalid_value",
        )
    if fields.get("stream") is True and wanted not in _STREAMED:
        raise errors.InvalidRequest(
            f"A stream has no '{FORMAT}' but 'json'.", param=FORMAT, code="unsupported_value"
        )
    return fields


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def engine_form(
    form: Form, model: str, withheld: frozenset[str], fields: Mapping[str, Any]
) -> Spliced:
    """Return the form for an engine, without the fields in ``withheld``."""
    boundary = b"frontline-" + secrets.token_hex(16).encode()
    return write_form(form, _texts(form, model, withheld, fields), FILE, boundary)


def _texts(
    form: Form, model: str, withheld: frozenset[str], fields: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    yield "model", model
    yield FORMAT, _ENGINE_FORMATS[fields[FORMAT]]
    if fields.get("stream") is True:
        yield "stream", "true"
    for name, values in form.texts.items():
        if name not in withheld and name not in _WITHHELD:
            # Only a list's values count all.
            for value in values if name.endswith("[]") else values[-1:]:
                yield name, value


def estimate_recording(file: File) -> tuple[int, Estimate]:
    """Return roughly how many seconds a recording has, at least 1, and what that takes."""
    seconds = _seconds_of_wav(file.head, len(file)) or -(-len(file) // _BYTES_PER_SECOND)
    tokens = seconds * TOKENS_PER_SECOND
    return seconds, Estimate(tokens, tokens + 1, -(-seconds // CHUNK_S))


def _seconds_of_wav(head: bytes, length: int) -> int | None:
    """Return the begun seconds of a WAV file, by its head; ``None`` if it is none."""
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    at, rate = 12, 0
    for _ in range(_WAV_CHUNKS):
        if at + 8 > len(head):
            return None
        kind, size = cast("tuple[bytes, int]", struct.unpack("<4sI", head[at : at + 8]))
        at += 8
        if kind == b"fmt " and size >= 16 and at + 16 <= len(head):
            encoding, _, samples, told, block, _ = struct.unpack("<HHIIHH", head[at : at + 16])
            # Players go by the samples, where they are not compressed.
            rate = samples * block if encoding in _UNCOMPRESSED else told
        elif kind == b"data":
            if not _SLOWEST <= rate <= _FASTEST:
                return None
            # Written before its length was known, a file says 0. Decoders then read to its end.
            sampled = min(size or length, length - at)
            return max(math.ceil(sampled / rate), 1)
        at += size + size % 2
    return None
