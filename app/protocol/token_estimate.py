"""Estimates the tokens and sequences of a request before an engine has processed it. Pure.

Limits are charged with the estimate until the answer has ended; then the real usage replaces it.
Only fields that engines read count, per route:

| route | answer | sequences |
|---|---|---|
| chat completions | the larger of ``max_completion_tokens`` and ``max_tokens`` | ``n`` |
| completions | ``max_tokens`` | prompts x the larger of ``n`` and ``best_of`` |
| responses | ``max_output_tokens`` | 1 |
| embeddings, classify, pooling | none | inputs |
| rerank | none | documents |
| score | none | the longer one of its arrays |
| messages | ``max_tokens`` | 1 |
| count_tokens, tokenize, detokenize | none; the prompt is not charged either | 1 |

The larger of two fields is an upper bound, whichever field an engine prefers. Engines parse
requests with Pydantic, which also accepts numbers written as text or as floats, so these count as
well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from app.core.dialect import Route
from app.protocol.json_body.depth import blank_escapes
from app.protocol.json_body.raw import RawJson

_BYTES_PER_TOKEN: Final = 4
_USUAL_ANSWER: Final = 256
_SMALL: Final = 8192
"""Bodies up to this length are not searched for media, which could change little."""
_MOST: Final = 10**9
"""Larger counts are clamped to this: no engine accepts them."""

_SEARCHED: Final = 4 * 1024 * 1024
"""How much of a raw member is searched; a few milliseconds. The rest counts as its worst case."""
_UNESCAPED: Final = 512 * 1024
"""How much of it is searched for escapes, which takes ten times as long; 5 ms at worst."""
_MOST_HITS: Final = 2048
"""How many occurrences of ``data`` in a raw member are checked; a few milliseconds. Media after
them count as text."""
_NEAR: Final = 32
_URL_NAME: Final = re.compile(rb'url"\s*:\s*"\Z')
_DATA_NAME: Final = re.compile(rb'data"\s*:\s*"')
_LONGEST_NUMBER: Final = 64

_ANSWER_FIELDS: Final = {
    Route.CHAT: ("max_completion_tokens", "max_tokens"),
    Route.COMPLETIONS: ("max_tokens",),
    Route.RESPONSES: ("max_output_tokens",),
    Route.MESSAGES: ("max_tokens",),
}
_INPUTS_FIELDS: Final = {
    Route.EMBEDDINGS: ("input",),
    Route.CLASSIFY: ("input",),
    Route.POOLING: ("input",),
    Route.RERANK: ("documents",),
    Route.SCORE: ("text_1", "text_2", "queries", "documents", "items", "data_1", "data_2"),
}
_COPIES_FIELDS: Final = {Route.CHAT: ("n",), Route.COMPLETIONS: ("n", "best_of")}

IMAGE_TOKENS: Final = 1105
"""Most tokens of one image: OpenAI's count for 2048 x 4096 pixels in high detail
(85 + 6 tiles x 170)."""
AUDIO_TOKENS: Final = 1500
"""Most tokens of one recording: a minute at 25 tokens a second, as Qwen2-Audio encodes it."""
OTHER_MEDIA_TOKENS: Final = 4096
"""Most tokens of one video or file."""
_MEDIA: Final = {
    "image_url": IMAGE_TOKENS,
    "input_audio": AUDIO_TOKENS,
    "audio_url": AUDIO_TOKENS,
    "video_url": OTHER_MEDIA_TOKENS,
    "file": OTHER_MEDIA_TOKENS,
    "file_data": OTHER_MEDIA_TOKENS,
    # Anthropic's images and documents.
    "source": OTHER_MEDIA_TOKENS,
}
_INLINE: Final = frozenset({"input_audio", "file", "file_data", "source"})
"""Content parts whose payload is not a URL."""
_PAYLOADS: Final = ("url", "data", "file_data")


class Estimate(NamedTuple):
    """Roughly how many tokens a request will take.

    Attributes:
        prompt: of all its prompts.
        total: prompts and answers together.
        sequences: how many sequences an engine runs for it, at least 1.
    """

    prompt: int
    total: int
    sequences: int


def estimate_tokens(route: Route, fields: Mapping[str, Any], length: int) -> Estimate:
    """Return roughly how many tokens a request will take.

    Args:
        route: the route of the request.
        fields: its top-level members; a long one may be ``RawJson``.
        length: the length of the whole body, in bytes.
    """
    if not route.takes_slot:
        return Estimate(0, 1, 1)
    prompt, answer, number = _prompt_tokens(route, fields, length), 0, sequences(route, fields)
    if route.generates:
        answer = (_largest(fields, _ANSWER_FIELDS[route]) or _USUAL_ANSWER) * number
    return Estimate(prompt, prompt + answer + 1, number)


def sequences(route: Route, fields: Mapping[str, Any]) -> int:
    """Return how many sequences an engine runs for a request; at least 1."""
    copies = _largest(fields, _COPIES_FIELDS.get(route, ()))
    if route is Route.COMPLETIONS:
        embeds = fields.get("prompt_embeds")
        prompts = _prompts(fields.get("prompt")) + (_prompts(embeds) if embeds else 0)
    elif route.generates:
        prompts = 1
    else:
        prompts = max(
            (_prompts(fields.get(name)) for name in _INPUTS_FIELDS.get(route, ())), default=1
        )
    return max(copies, 1) * max(prompts, 1)


def choices_per_prompt(fields: Mapping[str, Any]) -> int:
    """Return how many choices a request wants per prompt; at least 1."""
    return _largest(fields, ("n",)) or 1


def _largest(fields: Mapping[str, Any], names: Iterable[str]) -> int:
    """Return the largest number in some fields, or 0."""
    largest = 0
    for name in names:
        value = fields.get(name)
        # Most requests have none of them, or one.
        if value is not None:
            largest = max(largest, _count(value))
    return largest


def _count(value: object) -> int:
    """Return a positive whole number as engines read it, or 0."""
    if type(value) is int:
        return min(max(value, 0), _MOST)
    if isinstance(value, RawJson):
        return _MOST if value.startswith(b'"') else 0
    if not isinstance(value, str | float):
        return 0
    if isinstance(value, str) and len(value) > _LONGEST_NUMBER:
        return _MOST
    try:
        return int(min(max(float(value), 0.0), float(_MOST)))
    except ValueError:
        return 0


def _prompts(prompt: object) -> int:
    """Return how many prompts a ``prompt`` or ``input`` holds."""
    if isinstance(prompt, RawJson):
        return _raw_prompts(prompt)
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return len(prompt)
    return 1


def _raw_prompts(raw: RawJson) -> int:
    """Return the same for a raw value.

    It is exact for strings within ``_UNESCAPED`` bytes and for arrays within ``_SEARCHED``, and
    otherwise an upper bound. Engines reject prompts of several kinds in one array, so the first one
    says how to count: two quotes per string, one bracket per array.
    """
    if not raw.startswith(b"["):
        return 1
    first = bytes(raw.data[1:_NEAR]).lstrip()[:1]
    if first.isdigit():
        return 1
    unsearched = max(0, len(raw) - _SEARCHED) // len('"",')
    arrays = 0 if first == b'"' else raw.count(b"[", _SEARCHED) - 1
    strings = 0 if first == b"[" else _raw_strings(raw)
    return max(1, strings + unsearched, arrays + unsearched)


def _raw_strings(raw: RawJson) -> int:
    """Return how many strings a raw value holds, in its first ``_SEARCHED`` bytes."""
    near, _ = blank_escapes(bytes(raw.data[:_UNESCAPED]))
    quotes = near.count(b'"') + raw.count(b'"', _SEARCHED) - raw.count(b'"', _UNESCAPED)
    return quotes // 2


def _prompt_tokens(route: Route, fields: Mapping[str, Any], length: int) -> int:
    prompt = fields.get(route.prompt_field)
    if route is Route.COMPLETIONS or not route.generates:
        return _token_ids(prompt) or length // _BYTES_PER_TOKEN
    if length <= _SMALL:
        return length // _BYTES_PER_TOKEN
    media = _raw_media(prompt) if isinstance(prompt, RawJson) else _media(prompt)
    tokens = 0
    for size, most in media:
        length -= size
        tokens += min(most, size // _BYTES_PER_TOKEN)
    return max(length, 0) // _BYTES_PER_TOKEN + tokens


def _token_ids(prompt: object) -> int:
    """Return the length of a prompt that is one or several arrays of token ids, or 0."""
    if isinstance(prompt, RawJson):
        if prompt.find(b'"', 0, _SEARCHED) >= 0:
            return 0
        unsearched = max(0, len(prompt) - _SEARCHED) // len("1,")
        return prompt.count(b",", _SEARCHED) + unsearched + 1
    if not isinstance(prompt, list) or not prompt:
        return 0
    if isinstance(prompt[0], int):
        return len(prompt)
    if isinstance(prompt[0], list):
        return sum(len(ids) for ids in prompt if isinstance(ids, list))
    return 0


def _media(messages: object) -> Iterator[tuple[int, int]]:
    """Yield size in bytes and maximum tokens of all inline media in messages or input items."""
    if not isinstance(messages, list):
        return
    # There may be 100,000 short strings beside them. Parsed JSON has no subclasses of `dict`.
    contents = [message.get("content") for message in messages if type(message) is dict]
    for content in [one for one in contents if type(one) is list]:
        for part in [one for one in content if type(one) is dict]:
            for name in part.keys() & _MEDIA.keys():
                if size := _payload(part[name], name):
                    yield size, _MEDIA[name]


def _payload(value: object, name: str) -> int:
    """Return the length of a content part's payload; 0 for a payload that is fetched by URL."""
    if isinstance(value, dict):
        held = [text for key in _PAYLOADS if isinstance(text := value.get(key), str)]
        value = max(held, key=len, default="")
    if not isinstance(value, str):
        return 0
    inline = value.startswith("data:") or name in _INLINE
    return len(value) if inline else 0


def _raw_media(raw: RawJson) -> Iterator[tuple[int, int]]:
    """Yield the same for inline media in raw JSON; each counts as an image or as a file.

    A payload is the value of a name that ends with ``data``, or a data URL that is the value of a
    name that ends with ``url``.
    """
    searched = at = 0
    for _ in range(_MOST_HITS):
        # A name ends with a quote, and a data URL follows one.
        found = raw.find(b"data", at, at + _SEARCHED - searched, beside=b'"')
        if found < 0:
            return
        start, searched, at = _payload_start(raw, found), searched + found + 4 - at, found + 4
        if start is None:
            continue
        at = raw.find(b'"', start)
        if at < 0:
            return
        image = raw.startswith(b"data:image", start)
        yield at - start, IMAGE_TOKENS if image else OTHER_MEDIA_TOKENS


def _payload_start(raw: RawJson, found: int) -> int | None:
    """Return the start of the payload that begins with ``data``, or whose name ends with it."""
    if raw.startswith(b'"data:', found - 1):
        before = bytes(raw.data[max(found - _NEAR, 0) : found])
        return found if _URL_NAME.search(before) else None
    after = _DATA_NAME.match(raw.data[found : found + _NEAR])
    return found + after.end() if after else None
