"""The answer to a request, token by token, before its first token is due. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from deployments.simulator.language import PrefixCache, Vocabulary
from deployments.simulator.requests import Wish
from deployments.simulator.settings import SimulatedSettings


@dataclass(slots=True)
class Choice:
    """One of a reply's answers.

    ``tokens`` has the text of each token. A stop string may have shortened the last one, or
    emptied it.
    """

    index: int
    tokens: list[str]
    finish_reason: str
    stop: str | None = None
    tool: str | None = None
    tool_required: bool = False
    prompt_tokens: int = 0

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(self.tokens)


@dataclass(slots=True)
class GeneratedReply:
    """The answer to one generation request, ready to be written at any pace."""

    id: str
    created: int
    model: str
    prompt_tokens: int
    cached_tokens: int
    choices: list[Choice]
    wish: Wish

    @property
    def completion_tokens(self) -> int:
        """The number of tokens of all choices together."""
        return sum(len(choice.tokens) for choice in self.choices)

    @property
    def steps(self) -> int:
        """The number of tokens of the longest choice; all choices grow together."""
        return max(len(choice.tokens) for choice in self.choices)


def answers(
    wish: Wish, settings: SimulatedSettings, vocabulary: Vocabulary, cache: PrefixCache
) -> tuple[list[Choice], int]:
    """Return the choices of a reply, and how many of its prompt tokens were cached."""
    choices: list[Choice] = []
    cached = 0
    for prompt in wish.prompts:
        cached += cache.take(prompt.tokens)
        room = settings.context_length - len(prompt.tokens)
        for number in range(wish.n):
            choice = _choice(wish, prompt.text, number, room, settings, vocabulary)
            choice.index, choice.prompt_tokens = len(choices), len(prompt.tokens)
            choices.append(choice)
    return choices, cached


def _choice(
    wish: Wish,
    prompt: str,
    number: int,
    room: int,
    settings: SimulatedSettings,
    vocabulary: Vocabulary,
) -> Choice:
    limit = room if wish.limit is None else min(wish.limit, room)
    if wish.tool is not None:
        return Choice(
            0, [wish.tool_arguments], "stop", tool=wish.tool, tool_required=wish.tool_required
        )
    if wish.fixed_text is not None:
        tokens = re.findall(r"\s*\S+|\s+$", wish.fixed_text)
        return _cut(tokens[:limit], "stop" if len(tokens) <= limit else "length", wish)
    if wish.limit is not None:
        # With a limit, the answer always reaches it.
        return _cut(vocabulary.tokens(prompt, number, limit), "length", wish)
    natural = max(settings.default_completion_tokens, wish.min_tokens)
    tokens = vocabulary.tokens(prompt, number, min(natural, limit))
    return _cut(tokens, "stop" if natural <= limit else "length", wish)


def _cut(tokens: list[str], finish_reason: str, wish: Wish) -> Choice:
    """End the answer at the first stop string after ``min_tokens`` tokens."""
    found = _first_stop(tokens, wish.stops, wish.min_tokens) if wish.stops else None
    if found is None:
        return Choice(0, tokens, finish_reason)
    stop, position = found
    end = position + len(stop)
    kept: list[str] = []
    length = 0
    for token in tokens:
        if length >= end:
            break
        kept.append(token)
        length += len(token)
    text_end = end if wish.keep_stop else position
    return Choice(0, _trim(kept, text_end), "stop", stop)


def _first_stop(
    tokens: Sequence[str], stops: Sequence[str], min_tokens: int
) -> tuple[str, int] | None:
    text = "".join(tokens)
    start = sum(map(len, tokens[:min_tokens]))
    found = [(text.find(stop, start), stop) for stop in stops if stop]
    position, stop = min(
        ((position, stop) for position, stop in found if position >= 0), default=(-1, "")
    )
    return None if position < 0 else (stop, position)


def _trim(tokens: list[str], length: int) -> list[str]:
    """Cut the text of the tokens to ``length`` characters; keep the number of tokens."""
    trimmed = []
    for token in tokens:
        trimmed.append(token[: max(length, 0)])
        length -= len(token)
    return trimmed
