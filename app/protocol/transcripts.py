"""Transcripts of recordings in the formats that clients want, with their tier and cost. Pure."""

from __future__ import annotations

from typing import Any, Final

import orjson

from app.core.dialect import Route
from app.core.tier_decision import TierDecision
from app.protocol.recording import FORMAT
from app.protocol.requests import Inbound, stamp
from app.protocol.usage import Counted, recording_used, told_seconds, usage_fields

_TEXTS: Final = ("text", "srt", "vtt")


def answers_text(inbound: Inbound) -> bool:
    """Return whether a request's whole answer is plain text instead of JSON."""
    return inbound.route is Route.TRANSCRIPTIONS and inbound.fields.get(FORMAT) in _TEXTS


def stamp_transcript(
    body: bytes, inbound: Inbound, decision: TierDecision
) -> tuple[bytes, Counted]:
    """Return the client's body for an engine's transcript, and what is billed for it.

    Raises:
        ValueError, KeyError: it is no transcript.
    """
    answer = orjson.loads(body)
    text = answer["text"]
    if not isinstance(text, str):
        raise ValueError("a transcript has a text")
    seconds = told_seconds(answer)
    counted = recording_used(seconds or inbound.recording_s, estimated=seconds is None)
    wanted = inbound.fields[FORMAT]
    if wanted == "text":
        return text.encode() + b"\n", counted
    if wanted in _TEXTS:
        return _subtitles(answer["segments"] or [], web=wanted == "vtt").encode(), counted
    answer["usage"] = usage_fields(counted, Route.TRANSCRIPTIONS)
    stamp(answer, decision, counted.usage)
    return orjson.dumps(answer), counted


def _subtitles(segments: list[dict[str, Any]], *, web: bool) -> str:
    """Return segments as WebVTT, or as SubRip."""
    lines, number = ["WEBVTT", ""] if web else [], 0
    for segment in segments:
        start, end = (_moment(float(segment[name]), web=web) for name in ("start", "end"))
        # An empty line would end it.
        words = " ".join(str(segment["text"]).split())
        if not words:
            continue
        number += 1
        # In WebVTT this arrow may not be in a text.
        words = words.replace("-->", "->") if web else words
        lines += [] if web else [str(number)]
        lines += [f"{start} --> {end}", words, ""]
    return "\n".join([*lines, ""]) if lines else ""


def _moment(seconds: float, *, web: bool) -> str:
    whole = max(round(seconds * 1000), 0)
    minutes, milliseconds = divmod(whole, 60_000)
    hours, minutes = divmod(minutes, 60)
    mark = "." if web else ","
    return f"{hours:02}:{minutes:02}:{milliseconds // 1000:02}{mark}{milliseconds % 1000:03}"
