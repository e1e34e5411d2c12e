"""Requests of every kind sent straight to an engine, while bursts of priority preempt them.

Each answer is checked as a whole: the tokens that were asked for, one usage, valid structure.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from app.core.tiers import Tier
from tests.engines.subjects import Can

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 40},
        "people": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 6},
    },
    "required": ["city", "people"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "find", "parameters": SCHEMA}}


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


class Direct:
    """Clients of one engine's own server, without an ingress between."""

    def __init__(self, engine: httpx.AsyncClient, model: str, priorities: dict[Tier, Any]) -> None:
        self.engine, self.model, self.priorities = engine, model, priorities

    def _body(self, tier: Tier, tokens: int, **more: Any) -> dict[str, Any]:
        return {
            "model": self.model,
            "max_tokens": tokens,
            "ignore_eos": True,
            "priority": self.priorities[tier],
            **more,
        }

    async def ask(self, path: str, tier: Tier, tokens: int, **more: Any) -> dict[str, Any]:
        """Return the answer to a request that does not stream."""
        answer = await self.engine.post(path, json=self._body(tier, tokens, **more))
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

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
        async with self.engine.stream("POST", COMPLETIONS, json=body) as answer:
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
        return seen


class Load:
    """Lower-tier requests of all kinds, and bursts of priority, until so many preemptions."""

    def __init__(self, direct: Direct, can: frozenset[Can], slots: int, seed: int = 0) -> None:
        self.direct, self.slots = direct, slots
        self.random = random.Random(seed)
        self.served: Counter[str] = Counter()
        self.first_s: list[float] = []
        self.pause_s = 0.0
        self.texts: list[tuple[list[int], list[int]]] = []
        """Prompt and answer of greedy requests, as token ids, to be scored again."""
        self.kinds: list[Callable[[Tier, int], Awaitable[None]]] = [
            self.greedy_stream,
            self.seeded,
            self.log_probabilities,
            self.several_choices,
            self.penalties,
            self.stop_strings,
            self.leaver,
            *([self.schema] if Can.FOLLOW_SCHEMAS in can else []),
            *([self.tool] if Can.CALL_TOOLS in can else []),
        ]

    async def run(self, preemptions: Callable[[], Awaitable[float]], goal: int) -> float:
        """Send requests until the engine has counted ``goal`` preemptions; return how many."""
        began, over = await preemptions(), asyncio.Event()
        low = [asyncio.create_task(self._client(over, kind)) for kind in self.kinds]
        bursts = asyncio.create_task(self._bursts(over))
        tasks = {*low, bursts}
        while (count := await preemptions() - began) < goal:
            done, _ = await asyncio.wait(tasks, timeout=1, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                await task  # it has failed: none ends before ``over``
        over.set()
        await asyncio.gather(*tasks)
        return count

    async def _client(self, over: asyncio.Event, kind: Callable[[Tier, int], Any]) -> None:
        while not over.is_set():
            tier = self.random.choice([Tier.DEFAULT, Tier.FLEX])
            await kind(tier, self.random.randint(60, 300))
            self.served[kind.__name__] += 1

    async def _bursts(self, over: asyncio.Event) -> None:
        while not over.is_set():
            size = self.random.randint(1, self.slots)
            burst = await asyncio.gather(
                *(self.direct.stream(Tier.PRIORITY, 12, **self._prompt()) for _ in range(size))
            )
            assert all(one.tokens == 12 for one in burst)
            self.first_s += [one.first_s for one in burst]
            await asyncio.sleep(self.random.uniform(0, 0.5))

    def _prompt(self) -> dict[str, Any]:
        return {"prompt": f"{self.random.random()} is the number of the day. Once upon a time"}

    def _messages(self) -> dict[str, Any]:
        text = f"Case {self.random.random()}: name a city and its people."
        return {"messages": [{"role": "user", "content": text}]}

    async def greedy_stream(self, tier: Tier, tokens: int) -> None:
        answer = await self.direct.stream(
            tier, tokens, temperature=0, logprobs=1, return_token_ids=True, **self._prompt()
        )
        assert answer.ended and answer.tokens == tokens
        self.pause_s = max(self.pause_s, answer.pause_s)
        chances = [p for piece in answer.pieces for p in piece["logprobs"]["token_logprobs"]]
        best = [max(p.values()) for one in answer.pieces for p in one["logprobs"]["top_logprobs"]]
        assert len(chances) == tokens and chances == best, "each token is its own argmax"
        if prompt := answer.pieces[0].get("prompt_token_ids"):
            ids = [i for piece in answer.pieces for i in piece["token_ids"] or []]
            assert len(ids) == tokens
            self.texts.append((prompt, ids))

    async def seeded(self, tier: Tier, tokens: int) -> None:
        answer = await self.direct.ask(COMPLETIONS, tier, tokens, seed=7, **self._prompt())
        self._is_whole(answer, tokens)

    async def log_probabilities(self, tier: Tier, tokens: int) -> None:
        answer = await self.direct.ask(
            CHAT, tier, tokens, temperature=0.7, logprobs=True, top_logprobs=2, **self._messages()
        )
        self._is_whole(answer, tokens)
        content = answer["choices"][0]["logprobs"]["content"]
        assert len(content) == tokens
        assert all(one["logprob"] <= 0 and len(one["top_logprobs"]) >= 2 for one in content)

    async def several_choices(self, tier: Tier, tokens: int) -> None:
        answer = await self.direct.ask(COMPLETIONS, tier, tokens, n=2, seed=3, **self._prompt())
        self._is_whole(answer, tokens, choices=2)

    async def penalties(self, tier: Tier, tokens: int) -> None:
        penalty = {"presence_penalty": 1.2, "frequency_penalty": 0.9, "repetition_penalty": 1.1}
        answer = await self.direct.ask(
            COMPLETIONS, tier, tokens, seed=5, **penalty, **self._prompt()
        )
        self._is_whole(answer, tokens)

    async def stop_strings(self, tier: Tier, tokens: int) -> None:
        answer = await self.direct.stream(tier, tokens, stop=[" the"], **self._prompt())
        text = "".join(piece["text"] for piece in answer.pieces)
        reason = answer.pieces[-1]["finish_reason"]
        assert answer.ended and " the" not in text
        assert reason == "stop" or (reason, answer.tokens) == ("length", tokens)

    async def leaver(self, tier: Tier, tokens: int) -> None:
        """A client that leaves, be its request running, waiting or suspended."""
        task = asyncio.create_task(self.direct.stream(tier, 2000, **self._prompt()))
        await asyncio.sleep(self.random.uniform(0, 4))
        task.cancel()
        await asyncio.wait([task])

    async def schema(self, tier: Tier, tokens: int) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
        answer = await self.direct.ask(
            *(CHAT, tier, 400), ignore_eos=False, response_format=form, **self._messages()
        )
        _follows_schema(answer["choices"][0]["message"]["content"])

    async def tool(self, tier: Tier, tokens: int) -> None:
        answer = await self.direct.ask(
            *(CHAT, tier, 400),
            ignore_eos=False,
            tools=[TOOL],
            tool_choice="required",
            **self._messages(),
        )
        [choice] = answer["choices"]
        if choice["finish_reason"] == "length":
            assert answer["usage"]["completion_tokens"] == 400
            return
        for call in choice["message"]["tool_calls"]:
            assert call["function"]["name"] == "find"
            _follows_schema(call["function"]["arguments"])

    @staticmethod
    def _is_whole(answer: dict[str, Any], tokens: int, choices: int = 1) -> None:
        assert answer["usage"]["completion_tokens"] == choices * tokens
        reasons = [choice["finish_reason"] for choice in answer["choices"]]
        assert reasons == ["length"] * choices

    async def score_again(self, texts: int, slack: float) -> float:
        """Let the engine score greedy answers as prompts; return the worst token's distance.

        The distance of a token is how much less likely it is than the likeliest one at its place.
        Batches of another size round otherwise, so it is small and not always zero.
        """
        worst = 0.0
        for prompt, ids in self.random.sample(self.texts, min(texts, len(self.texts))):
            answer = await self.direct.ask(
                *(COMPLETIONS, Tier.DEFAULT, 1), prompt=[*prompt, *ids], prompt_logprobs=1
            )
            places = answer["choices"][0]["prompt_logprobs"][len(prompt) :]
            assert len(places) == len(ids)
            for token, place in zip(ids, places, strict=True):
                best = max(one["logprob"] for one in place.values())
                worst = max(worst, best - place[str(token)]["logprob"])
        assert worst <= slack, f"a token was {worst} less likely than the likeliest"
        return worst


def _follows_schema(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"city", "people"} and isinstance(value["people"], list)
    assert len(value["people"]) <= 6 and len(value["city"]) <= 40
