"""The tokens that an answer is billed for: the engine's counts, or else a marked estimate. Pure.

Engines report usage at the end of an answer, and on every chunk of a stream if they can. If an
answer is cut off before that, or an engine reports no usage or an impossible one, tokens are
estimated:

- An answer has one token per delta that was sent, or one per 5 bytes if that is more, for example
  if several tokens or the whole answer arrive together.
- A prompt has the estimate used for limits (``app.protocol.token_estimate``).

An estimate never replaces a possible count, and it never lowers one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from app.core.dialect import AUDIO_ROUTES, Route
from app.core.pricing import TokenUsage
from app.protocol import anthropic

MOST_TOKENS: Final = 10**9
"""More than any context length: a larger count is impossible."""
_BYTES_PER_TOKEN: Final = 5
"""Slightly more than the average token has, so that deltas of one token count as one."""
_NOT_TEXT: Final = frozenset(
    {"role", "type", "id", "call_id", "status", "logprobs", "annotations", "signature"}
)
_DURATION: Final = "duration"
"""The type of a ``usage`` of seconds, as OpenAI names it."""
_CACHED: Final = ("cached_tokens",)
_WRITTEN: Final = ("cache_write_tokens", "created_cache_tokens", "cache_creation_tokens")
"""OpenAI's name, which vLLM has on responses; vLLM's own on other routes; and LiteLLM's."""
_TEXTS: Final = ("message", "text", "delta")


class Counted(NamedTuple):
    """The tokens of an answer, so far or in total.

    Attributes:
        usage: the tokens.
        estimated: whether some of the counts are not the engine's own.
    """

    usage: TokenUsage
    estimated: bool = False


NOT_BILLED: Final = Counted(TokenUsage(0, 0, 0))
"""What an answer of a route that generates nothing is billed for."""


class Reported(NamedTuple):
    """The counts in a ``usage`` object; ``None`` stands for an impossible number."""

    prompt: int | None
    cached: int
    completion: int | None
    odd: bool
    written: int = 0


def recording_used(seconds: int, *, estimated: bool) -> Counted:
    """Return what the transcription of a recording is billed for: its seconds alone."""
    return Counted(TokenUsage(0, 0, 0, audio_seconds=seconds), estimated)


def told_seconds(answer: Mapping[str, Any]) -> int | None:
    """Return how many seconds an engine says a recording has; ``None`` if none that can be."""
    usage = answer.get("usage")
    seconds = usage.get("seconds") if isinstance(usage, dict) else None
    told: object
    for told in (seconds, answer.get("duration")):
        if isinstance(told, int | float) and told is not True and 0 < told <= MOST_TOKENS:
            return math.ceil(told)
    return None


class Count:
    """Counts the tokens of one answer as it arrives."""

    def __init__(self, expected_prompt: int, choices_per_prompt: int = 1, images: int = 0) -> None:
        """Start to count.

        Args:
            expected_prompt: the estimate of the prompt's tokens.
            choices_per_prompt: how many choices the request wants per prompt.
            images: how many images it has that are billed.
        """
        self._odd = False
        self._expected_prompt = expected_prompt
        self._choices_per_prompt = max(choices_per_prompt, 1)
        self._images = images
        # By choice and by prompt: engines count each choice of a stream separately.
        self._completions: dict[int, int] = {}
        self._prompts: dict[int, tuple[int, int, int]] = {}
        self._final: Reported | None = None
        self._deltas = self._bytes = 0

    def told(self, usage: object, choice: int | None = None) -> bool:
        """Record a ``usage`` object; return whether it is possible.

        Args:
            usage: the engine's value; ``None`` is no usage.
            choice: the choice that it describes; ``None`` if it describes the whole answer.
        """
        return usage is not None and self.take(_read(usage), choice)

    def take(self, reported: Reported, choice: int | None = None) -> bool:
        """Do the same for a ``usage`` object that is read already."""
        self._odd = self._odd or reported.odd
        if choice is None:
            self._final = reported
        else:
            if reported.completion is not None:
                self._completions[choice] = reported.completion
            if reported.prompt is not None:
                self._prompts[choice // self._choices_per_prompt] = (
                    reported.prompt,
                    reported.cached,
                    reported.written,
                )
        return not reported.odd and reported.prompt is not None and reported.completion is not None

    def sent(self, deltas: int, size: int) -> None:
        """Record text that was sent: the number of deltas, and their bytes."""
        self._deltas += deltas
        self._bytes += size

    @property
    def odd(self) -> bool:
        """Whether the engine has reported impossible usage."""
        return self._odd or (self._final is not None and self.result().estimated)

    def result(self) -> Counted:
        """Return the tokens so far."""
        final = self._final
        completion, completion_estimated = self._completion(final)
        if final is not None and final.prompt is not None:
            prompt, cached, written = final.prompt, final.cached, final.written
            prompt_estimated = final.odd
        elif self._prompts:
            prompt, cached, written = map(sum, zip(*self._prompts.values(), strict=True))
            prompt_estimated = final is not None
        else:
            prompt, cached, written, prompt_estimated = self._expected_prompt, 0, 0, True
        usage = TokenUsage(prompt, cached, completion, written, self._images)
        return Counted(usage, completion_estimated or prompt_estimated)

    def _completion(self, final: Reported | None) -> tuple[int, bool]:
        reported, sane = sum(self._completions.values()), final is None
        if final is not None and final.completion is not None:
            # An answer has at least the tokens of its choices.
            reported, sane = max(final.completion, reported), final.completion >= reported
        estimate = max(self._deltas, -(-self._bytes // _BYTES_PER_TOKEN))
        if reported or not estimate:
            return reported, not sane
        # Text was sent, so there are tokens.
        return estimate, True


def count_answer(
    answer: dict[str, Any], route: Route, expected_prompt: int, images: int = 0
) -> Counted:
    """Return the tokens of an answer that is not streamed, and the images of its prompt."""
    usage = answer.get("usage")
    if route.is_anthropic:
        usage = anthropic.plain_usage(usage)
    # A stream may be cut off before its usage arrives; a whole answer must have it.
    reported = _read({} if usage is None else usage)
    prompt, cached, completion, odd, written = reported
    has_all = not route.generates or completion
    if not odd and has_all and prompt is not None and completion is not None:
        return Counted(TokenUsage(prompt, cached, completion, written, images))
    count = Count(expected_prompt, images=images)
    count.take(reported)
    if not has_all:
        size = sum(map(text_size, _parts(answer)))
        count.sent(bool(size), size)
    return count.result()


def text_size(value: object) -> int:
    """Return the bytes of text in a delta, a message or an output item."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        return sum(text_size(item) for name, item in value.items() if name not in _NOT_TEXT)
    if isinstance(value, list):
        return sum(map(text_size, value))
    return 0


def choice_text_size(choice: object) -> int:
    """Return the bytes of text in a choice."""
    return sum(text_size(choice.get(name)) for name in _TEXTS) if isinstance(choice, dict) else 0


def usage_fields(counted: Counted, route: Route) -> dict[str, Any]:
    """Return a ``usage`` object in a route's format, for tokens that the engine did not report."""
    usage, estimated = counted
    if route in AUDIO_ROUTES:
        fields: dict[str, Any] = {"type": _DURATION, "seconds": usage.audio_seconds}
        return fields | ({"usage_estimated": True} if estimated else {})
    if route.is_anthropic:
        return anthropic.usage_fields(usage) | ({"usage_estimated": True} if estimated else {})
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    names = ("prompt", "completion") if route is not Route.RESPONSES else ("input", "output")
    details = {"cached_tokens": usage.cached_tokens}
    if usage.cache_write_tokens:
        details["cache_write_tokens"] = usage.cache_write_tokens
    return {
        f"{names[0]}_tokens": prompt,
        f"{names[1]}_tokens": completion,
        "total_tokens": prompt + completion,
        f"{names[0]}_tokens_details": details,
    } | ({"usage_estimated": True} if estimated else {})


def read_usage(usage: object, images: int = 0) -> TokenUsage | None:
    """Return the tokens in a ``usage`` object, or ``None`` if it has no possible counts.

    ``images`` are those of the request, which engines do not count.
    """
    if not isinstance(usage, dict):
        return None
    if usage.get("type") == _DURATION and (seconds := told_seconds({"usage": usage})) is not None:
        return TokenUsage(0, 0, 0, audio_seconds=seconds)
    reported = _read(usage)
    if reported.prompt is None or reported.completion is None:
        return None
    return TokenUsage(
        reported.prompt, reported.cached, reported.completion, reported.written, images
    )


def _parts(answer: dict[str, Any]) -> Iterable[object]:
    for choice in _list(answer.get("choices")):
        yield from ((choice.get(name) for name in _TEXTS) if isinstance(choice, dict) else ())
    yield from _list(answer.get("output"))
    yield from _list(answer.get("content"))


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _read(usage: object) -> Reported:
    if not isinstance(usage, dict):
        return Reported(None, 0, None, odd=True)
    prompt = _tokens(usage.get("prompt_tokens", usage.get("input_tokens")))
    completion = usage.get("completion_tokens")
    if completion is None:
        completion = usage.get("output_tokens")
    # Embeddings have none.
    completion = 0 if completion is None else _tokens(completion)
    details = usage.get("prompt_tokens_details")
    if details is None:
        details = usage.get("input_tokens_details")
    if details is None:
        # As in most events of a stream.
        return Reported(prompt, 0, completion, prompt is None or completion is None)
    cached, written = _detail(details, _CACHED), _detail(details, _WRITTEN)
    most = prompt or 0
    odd = prompt is None or completion is None or cached is None or written is None
    odd = odd or (cached or 0) + (written or 0) > most
    read = min(cached or 0, most)
    return Reported(prompt, read, completion, odd, min(written or 0, most - read))


def _detail(details: object, names: tuple[str, ...]) -> int | None:
    """Return the count under the first of some names that is there; ``None`` if it cannot be."""
    if not isinstance(details, dict):
        return None
    for name in names:
        if (value := details.get(name)) is not None:
            return _tokens(value)
    return 0


def _tokens(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None
