"""Clients of an engine's own server, or of an ingress, that keep what is to be billed."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from app.core.tiers import Tier

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class Bill(NamedTuple):
    """What a whole answer should be billed as."""

    tier: str
    stream: bool
    tokens: int


@dataclass
class Streamed:
    """A stream of completions as it arrived."""

    pieces: list[dict[str, Any]] = field(default_factory=list)
    usages: list[dict[str, Any]] = field(default_factory=list)
    first_s: float = 0.0
    pause_s: float = 0.0
    ended: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens the engine counted; fails unless it sent one usage, at the end."""
        [usage] = self.usages
        return int(usage["completion_tokens"])


class Clients:
    """Clients of one server.

    Attributes:
        http: connections to the server.
        model: the model's name there.
        tiers: the fields that say a request's tier there.
        billed: how many whole answers there were of each kind.
    """

    def __init__(
        self, http: httpx.AsyncClient, model: str, tiers: Mapping[Tier, Mapping[str, Any]]
    ) -> None:
        self.http, self.model, self.tiers = http, model, tiers
        self.billed: Counter[Bill] = Counter()

    def _body(self, tier: Tier, tokens: int, **more: Any) -> dict[str, Any]:
        own = {"model": self.model, "max_tokens": tokens, "ignore_eos": True}
        return {**own, **self.tiers[tier], **more}

    async def ask(self, path: str, tier: Tier, tokens: int, **more: Any) -> dict[str, Any]:
        """Return the answer to a request that does not stream."""
        response = await self.http.post(path, json=self._body(tier, tokens, **more))
        assert response.status_code == 200, response.text
        answer = dict(response.json())
        self.billed[Bill(tier.value, False, answer["usage"]["completion_tokens"])] += 1
        return answer

    async def stream(
        self,
        tier: Tier,
        tokens: int,
        *,
        first: Callable[[], object] = lambda: None,
        **more: Any,
    ) -> Streamed:
        """Return a stream of a completion; ``first`` is called at its first token."""
        clock = asyncio.get_running_loop().time
        seen, began = Streamed(), clock()
        at = began
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = self._body(tier, tokens, **options, **more)
        async with self.http.stream("POST", COMPLETIONS, json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    seen.ended = True
                elif line.startswith("data: "):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    if not event["choices"]:
                        seen.usages.append(event["usage"])
                        continue
                    now = clock()
                    if not seen.pieces:
                        seen.first_s = now - began
                        first()
                    else:
                        seen.pause_s = max(seen.pause_s, now - at)
                    at = now
                    seen.pieces += event["choices"]
        self.billed[Bill(tier.value, True, seen.tokens)] += 1
        return seen


def of_engine(engine: httpx.AsyncClient, model: str, priorities: Mapping[Tier, Any]) -> Clients:
    """Return clients of an engine itself, which takes a request's priority as a number."""
    return Clients(engine, model, {tier: {"priority": n} for tier, n in priorities.items()})


def of_ingress(http: httpx.AsyncClient, model: str) -> Clients:
    """Return clients of an ingress."""
    return Clients(http, model, {tier: {"service_tier": tier.value} for tier in Tier})
