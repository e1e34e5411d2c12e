"""Requests of every kind sent to an engine, while bursts of priority preempt them.

Each answer is checked as a whole: the tokens that were asked for, one usage, valid structure.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from app.core.tiers import Tier
from tests.engines.preemption_clients import CHAT, COMPLETIONS, Clients
from tests.engines.subjects import Can, Engine

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 40},
        "people": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 6},
    },
    "required": ["city", "people"],
    "additionalProperties": False,
}
BURST_TOKENS = 4
"""How long answers of priority are that suspend others: short, as those go on in between."""
TOLD_EVERY_S = 20.0
TOOL = {"type": "function", "function": {"name": "find", "parameters": SCHEMA, "strict": True}}
"""Without ``strict``, vLLM lets a model fill in other arguments than the schema has."""


class Load:
    """Lower-tier requests of all kinds, and bursts of priority, until so many preemptions.

    Attributes:
        suspended: how often requests were suspended, as far as their answers say.
        served: how many requests of each kind there were.
        first_s: the times to the first token of all priority requests.
        pause_s: the longest pause of a stream of a lower tier.
        texts: prompt and answer of greedy requests, as token ids, to be scored again.
    """

    def __init__(
        self, clients: Clients, direct: Clients, engine: Engine, slots: int, seed: int = 0
    ) -> None:
        self.clients, self.direct = clients, direct
        self.engine, self.slots = engine, slots
        self.random = random.Random(seed)
        self.suspended = 0
        self.served: Counter[str] = Counter()
        self.first_s: list[float] = []
        self.pause_s = 0.0
        self.texts: list[tuple[list[int], list[int]]] = []
        self.kinds: list[Callable[[Tier, int], Awaitable[None]]] = [
            self.greedy_stream,
            self.seeded,
            self.log_probabilities,
            self.several_choices,
            self.penalties,
            self.stop_strings,
            self.leaver,
            *([self.greedy_ids] if engine.native else []),
            *([self.schema] if Can.FOLLOW_SCHEMAS in engine.can else []),
            *([self.tool] if Can.CALL_TOOLS in engine.can else []),
        ]

    async def run(self, preemptions: Callable[[], Awaitable[float]], goal: int) -> float:
        """Send requests until there were ``goal`` preemptions more; return how many."""
        began, over = await preemptions(), asyncio.Event()
        clock = asyncio.get_running_loop().time
        told = clock()
        low = [asyncio.create_task(self._client(over, kind)) for kind in self.kinds]
        bursts = asyncio.create_task(self._bursts(over))
        tasks = {*low, bursts}
        try:
            while (count := await preemptions() - began) < goal:
                done, _ = await asyncio.wait(tasks, timeout=1, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    await task  # it has failed: none ends before ``over``
                if clock() > told + TOLD_EVERY_S:
                    told = clock()
                    print(f"{count:.0f} of {goal} preemptions", flush=True)
            over.set()
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return count

    async def _client(self, over: asyncio.Event, kind: Callable[[Tier, int], Any]) -> None:
        while not over.is_set():
            tier = self.random.choice([Tier.DEFAULT, Tier.FLEX])
            await kind(tier, self.random.randint(60, 300))
            self.served[kind.__name__] += 1

    async def _bursts(self, over: asyncio.Event) -> None:
        tokens = BURST_TOKENS
        while not over.is_set():
            size = self.random.randint(1, self.slots)
            burst = await asyncio.gather(
                *(self.clients.stream(Tier.PRIORITY, tokens, **self._prompt()) for _ in range(size))
            )
            assert all(one.tokens == tokens for one in burst)
            self.first_s += [one.first_s for one in burst]
            await asyncio.sleep(self.random.uniform(0, 0.5))

    def _prompt(self) -> dict[str, Any]:
        return {"prompt": f"{self.random.random()} is the number of the day. Once upon a time"}

    def _messages(self) -> dict[str, Any]:
        text = f"Case {self.random.random()}: name a city and its people."
        return {"messages": [{"role": "user", "content": text}]}

    async def _chat(self, tier: Tier, tokens: int, **more: Any) -> dict[str, Any]:
        told = self.engine.tells_preemptions
        answer = await self.clients.ask(CHAT, tier, tokens, **told, **self._messages(), **more)
        for choice in answer["choices"] if told else ():
            self.suspended += choice["meta_info"]["num_retractions"]
        return answer

    async def _either(self, tier: Tier, tokens: int, **more: Any) -> dict[str, Any]:
        """Ask for a chat completion or a completion."""
        if self.engine.tells_preemptions or self.random.random() < 0.5:
            return await self._chat(tier, tokens, **more)
        return await self.clients.ask(COMPLETIONS, tier, tokens, **self._prompt(), **more)

    async def greedy_stream(self, tier: Tier, tokens: int) -> None:
        answer = await self.clients.stream(
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

    async def greedy_ids(self, tier: Tier, tokens: int) -> None:
        """On SGLang's own route, which alone of its routes returns token ids."""
        prompt = [self.random.randint(1000, 40_000) for _ in range(12)]
        answer = await self._generate(prompt, tier, tokens, top_logprobs_num=1)
        meta, ids = answer["meta_info"], answer["output_ids"]
        self.suspended += meta["num_retractions"]
        assert len(ids) == tokens == meta["completion_tokens"]
        chosen, best = meta["output_token_logprobs"], meta["output_top_logprobs"]
        assert [one[1] for one in chosen] == ids
        assert [one[0] for one in chosen] == [places[0][0] for places in best]
        self.texts.append((prompt, ids))

    async def _generate(
        self, prompt: list[int], tier: Tier, tokens: int, **more: Any
    ) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        own = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        body = {**own, **self.direct.tiers[tier], **more}
        response = await self.direct.http.post("/generate", json=body)
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def seeded(self, tier: Tier, tokens: int) -> None:
        answer = await self._either(tier, tokens, seed=7)
        self._is_whole(answer, tokens)

    async def log_probabilities(self, tier: Tier, tokens: int) -> None:
        answer = await self._chat(tier, tokens, temperature=0.7, logprobs=True, top_logprobs=2)
        self._is_whole(answer, tokens)
        content = answer["choices"][0]["logprobs"]["content"]
        assert len(content) == tokens
        assert all(one["logprob"] <= 0 and len(one["top_logprobs"]) >= 2 for one in content)

    async def several_choices(self, tier: Tier, tokens: int) -> None:
        answer = await self._either(tier, tokens, n=2, seed=3)
        self._is_whole(answer, tokens, choices=2)

    async def penalties(self, tier: Tier, tokens: int) -> None:
        penalty = {"presence_penalty": 1.2, "frequency_penalty": 0.9, "repetition_penalty": 1.1}
        answer = await self._either(tier, tokens, seed=5, **penalty)
        self._is_whole(answer, tokens)

    async def stop_strings(self, tier: Tier, tokens: int) -> None:
        answer = await self.clients.stream(tier, tokens, stop=[" the"], **self._prompt())
        text = "".join(piece["text"] for piece in answer.pieces)
        reason = answer.pieces[-1]["finish_reason"]
        assert answer.ended and " the" not in text
        assert reason == "stop" or (reason, answer.tokens) == ("length", tokens)

    async def leaver(self, tier: Tier, tokens: int) -> None:
        """A client that leaves, be its request running, waiting or suspended."""
        task = asyncio.create_task(self.clients.stream(tier, 2000, **self._prompt()))
        await asyncio.sleep(self.random.uniform(0, 4))
        task.cancel()
        await asyncio.wait([task])

    async def schema(self, tier: Tier, tokens: int) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
        answer = await self._chat(tier, 400, ignore_eos=False, response_format=form)
        _follows_schema(answer["choices"][0]["message"]["content"])

    async def tool(self, tier: Tier, tokens: int) -> None:
        answer = await self._chat(tier, 400, ignore_eos=False, tools=[TOOL], tool_choice="required")
        [choice] = answer["choices"]
        if choice["finish_reason"] == "length":
            assert answer["usage"]["completion_tokens"] == 400
            return
        for call in choice["message"]["tool_calls"]:
            assert call["function"]["name"] == "find", answer
            _follows_schema(call["function"]["arguments"])

    @staticmethod
    def _is_whole(answer: dict[str, Any], tokens: int, choices: int = 1) -> None:
        assert answer["usage"]["completion_tokens"] == choices * tokens
        reasons = [choice["finish_reason"] for choice in answer["choices"]]
        assert reasons == ["length"] * choices

    async def score_again(self, texts: int, slack: float) -> float:
        """Let the engine itself score greedy answers as prompts; return the worst token's distance.

        The distance of a token is how much less likely it is than the likeliest one at its place.
        Batches of another size round otherwise, so it is small and not always zero.
        """
        score = self._score_natively if self.engine.native else self._score
        worst = 0.0
        for prompt, ids in self.random.sample(self.texts, min(texts, len(self.texts))):
            distances = await score(prompt, ids)
            assert len(distances) == len(ids)
            worst = max(worst, *distances)
        assert worst <= slack, f"a token was {worst} less likely than the likeliest"
        return worst

    async def _score(self, prompt: list[int], ids: list[int]) -> list[float]:
        answer = await self.direct.ask(
            *(COMPLETIONS, Tier.DEFAULT, 1), prompt=[*prompt, *ids], prompt_logprobs=1
        )
        places = answer["choices"][0]["prompt_logprobs"][len(prompt) :]
        return [
            max(one["logprob"] for one in place.values()) - place[str(token)]["logprob"]
            for token, place in zip(ids, places, strict=True)
        ]

    async def _score_natively(self, prompt: list[int], ids: list[int]) -> list[float]:
        more = {"logprob_start_len": len(prompt) - 1, "top_logprobs_num": 1}
        answer = await self._generate([*prompt, *ids], Tier.DEFAULT, 1, **more)
        # The first is where scoring begins, and has none.
        chosen = answer["meta_info"]["input_token_logprobs"][1:]
        best = answer["meta_info"]["input_top_logprobs"][1:]
        assert [one[1] for one in chosen] == ids
        return [places[0][0] - one[0] for places, one in zip(best, chosen, strict=True)]


def _follows_schema(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"city", "people"} and isinstance(value["people"], list), text
    assert len(value["people"]) <= 6 and len(value["city"]) <= 40, text
