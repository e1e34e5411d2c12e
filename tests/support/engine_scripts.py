"""Scripts of requests and of what happens around them, and how one is played."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st

from app.config.model import ModelSettings
from app.core.dialect import Route
from app.core.tiers import ACCEPTED_VALUES
from deployments.simulator.settings import InjectedFailures, RequestFailure
from tests.support.world import ADAPTER, ALIAS, ENGINES, KEYS, MODEL, QUEUE, Seen, World


@dataclass(frozen=True)
class Leave:
    """When a client goes away: after so many seconds, pieces of the answer, or engines' hearing."""

    seconds: float | None = None
    pieces: int | None = None


@dataclass(frozen=True)
class Ask:
    """A request. The script goes on at once, or when it has its answer."""

    tier: str | None = "priority"
    route: Route = Route.CHAT
    stream: bool = False
    tenant: str = "plain"
    tokens: int = 4
    options: str | None = None
    fail_fast: bool = False
    require: bool = False
    within: float | str | None = None
    within_tier: str | None = None
    model: str = MODEL
    goes_wrong: tuple[InjectedFailures | None, ...] = ()
    leave: Leave | None = None
    retries: int = 0
    behind: bool = False

    @property
    def adapter(self) -> str:
        """The adapter that it names, or an empty text."""
        return self.model if self.model == ADAPTER else ""

    def fields(self) -> dict[str, Any]:
        # Longer than what the engines' caches keep together, so that some of it is cached.
        words = "tell me of the sea, and of the ships on it; " * 4
        fields: dict[str, Any] = {"model": self.model, "stream": self.stream}
        match self.route:
            case Route.CHAT | Route.MESSAGES:
                fields |= {"messages": [{"role": "user", "content": words}]}
                fields |= {"max_tokens": self.tokens}
            case Route.COMPLETIONS:
                fields |= {"prompt": words, "max_tokens": self.tokens}
            case _:
                fields |= {"input": words, "max_output_tokens": self.tokens}
        if self.tier is not None:
            fields["service_tier"] = self.tier
        if self.fail_fast:
            fields["fail_fast"] = True
        if self.require:
            fields["require_tier"] = True
        # Also as null, which counts as absent.
        fields |= {"start_within": self.within, "start_within_tier": self.within_tier}
        if (
            self.options is not None
            and self.stream
            and self.route in (Route.CHAT, Route.COMPLETIONS)
        ):
            continuous = {"continuous_usage_stats": True} if self.options == "continuous" else {}
            fields["stream_options"] = {"include_usage": True, **continuous}
        return fields


@dataclass(frozen=True)
class Reprice:
    """The operator changes the rate card."""

    output: Decimal
    priority: Decimal
    flex: Decimal


@dataclass(frozen=True)
class Offer:
    """The operator changes which tiers the model has."""

    priority: str
    flex: bool
    strict: bool = False


@dataclass(frozen=True)
class Engines:
    """Replicas come and go; those that died come back under other names."""

    names: frozenset[str]


@dataclass(frozen=True)
class Pause:
    """What is under way goes on for a moment, or comes to its end."""

    seconds: float | None


def broken(kind, after_tokens=0, status=500):
    return InjectedFailures(request=RequestFailure(kind), after_tokens=after_tokens, status=status)


HANG, CRASH = broken("hang"), broken("crash")
ONE_OF_TWO = Engines(frozenset({"vllm", "unordered"}))
DEARER = Reprice(Decimal(40), Decimal(3), Decimal(1))
ADAPTER_PRICE = {"cached_input": Decimal("0.00000001")}


failures = st.one_of(
    st.builds(
        broken,
        st.sampled_from(["crash", "error_event", "truncate", "truncate_cleanly", "hang", "error"]),
        st.sampled_from([0, 0, 1, 5]),
    ),
    st.builds(broken, st.just("error"), st.just(0), st.sampled_from([400, 429, 500, 503])),
)
leaves = st.one_of(
    st.builds(Leave, seconds=st.sampled_from([0.0, 0.001, 0.004, 0.02])),
    st.builds(Leave, pieces=st.integers(1, 6)),
    st.just(Leave()),
)
rarely = st.sampled_from([False, False, False, True])
asks = st.builds(
    Ask,
    tier=st.sampled_from([None, *ACCEPTED_VALUES, "priority", "priority"]),
    route=st.sampled_from(
        [Route.CHAT, Route.CHAT, Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES, Route.MESSAGES]
    ),
    stream=st.booleans(),
    tenant=st.sampled_from(["plain", "plain", *KEYS]),
    tokens=st.sampled_from([1, 4, 25]),
    options=st.sampled_from([None, "usage", "continuous"]),
    fail_fast=rarely,
    require=rarely,
    within=st.sampled_from([None, "1ms", 0.02, "0h-0m-30s"]),
    within_tier=st.sampled_from([None, None, "default", "priority"]),
    model=st.sampled_from([MODEL, MODEL, ALIAS, ADAPTER]),
    goes_wrong=st.one_of(
        st.just(()),
        st.lists(st.none() | failures, min_size=1, max_size=2).map(tuple),
    ),
    leave=st.one_of(st.none(), st.none(), leaves),
    retries=st.sampled_from([0, 0, 1]),
    behind=st.booleans(),
)
mistakes = st.sampled_from([Ask(tier="gold"), Ask(tenant="nobody"), Ask(model="no/such-model")])
crowds = st.lists(asks, min_size=3, max_size=9).map(tuple)
short = st.decimals(0, 500, places=5)
changes = st.one_of(
    st.builds(Reprice, short, st.decimals(1, 3, places=3), st.decimals(0, 1, places=3)),
    st.builds(Offer, st.sampled_from(["auto", "auto", "queue", "off"]), st.booleans(), rarely),
    st.builds(Engines, st.sets(st.sampled_from(sorted(ENGINES)), min_size=1).map(frozenset)),
)
pauses = st.builds(Pause, st.sampled_from([0.0, 0.005, 0.03, None]))
steps = st.one_of(asks, asks, crowds, changes, pauses, mistakes)
scripts = st.lists(steps, min_size=3, max_size=20)


@dataclass
class Run:
    """One script on its way."""

    world: World
    engines: frozenset[str] = frozenset(ENGINES)
    tiers: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=lambda: {"free": True})
    seen: list[Seen] = field(default_factory=list)
    running: set[asyncio.Task[None]] = field(default_factory=set)
    cards = 0

    async def play(self, script):
        await self.step(Engines(self.engines))
        await self.step(Reprice(Decimal(2), Decimal("1.5"), Decimal("0.8")))
        for step in script:
            for one in step if isinstance(step, tuple) else [step]:
                await self.step(one, crowd=isinstance(step, tuple))
        await self.step(Pause(None))

    async def step(self, step, *, crowd=False):
        match step:
            case Ask():
                task = asyncio.create_task(self.ask(step))
                self.running.add(task)
                if not (crowd or step.behind):
                    await asyncio.wait([task])
            case Reprice():
                # Every card is known by its price of input.
                Run.cards += 1
                price = Decimal(Run.cards) / 1000
                factors = {"priority": step.priority, "flex": step.flex}
                self.card = {
                    "input": price, "cached_input": price / 4, "output": step.output,
                    "multipliers": factors,
                }  # fmt: skip
                if Run.cards % 3:
                    self.card |= {"cache_write": price * 2, "image": price}
                if Run.cards % 2:
                    self.card["long_context"] = {
                        "above": 1 + Run.cards % 20,
                        **{kind: self.card[kind] + 1000 for kind in ("input", "output")},
                    }
                await self.apply()
            case Offer():
                self.tiers = {"priority": step.priority, "flex": step.flex, "strict": step.strict}
                await self.apply()
            case Engines():
                self.engines = step.names
                for name in step.names:
                    if not self.world.engines[name].up:
                        await self.world.restart(name)
                await self.apply()
            case Pause(seconds=None):
                while self.running:
                    # What goes wrong in the product is raised here.
                    await asyncio.gather(*self.running)
                    self.running = {task for task in self.running if not task.done()}
            case Pause(seconds=seconds):
                await asyncio.sleep(seconds)

    async def apply(self):
        # No card of the model has this price.
        cards = {ADAPTER: self.card if "free" in self.card else self.card | ADAPTER_PRICE}
        model = {
            "rate_card": self.card, "adapter_rate_cards": cards, "tiers": self.tiers,
            "queue": QUEUE,
        }  # fmt: skip
        settings = ModelSettings.load(model, "user_config")
        await self.world.set(settings, self.engines, adapters=(ADAPTER,))

    async def ask(self, ask):
        for tries_left in reversed(range(ask.retries + 1)):
            seen = Seen(ask, list(ask.goes_wrong))
            self.seen.append(seen)
            sending = asyncio.create_task(self.world.ask(seen, ask.route, ask.fields(), ask.tenant))
            if ask.leave is not None and not tries_left:
                await until_leaving(seen, sending, ask.leave)
                # As Serve does when a client's connection has ended.
                seen.left = sending.cancel()
                await asyncio.wait([sending])
            if not (seen.left and sending.cancelled()):
                await sending
            if seen.status == 200 and b'"error"' not in seen.body:
                return


async def until_leaving(seen, sending, leave):
    if leave.seconds is not None:
        await asyncio.wait([sending], timeout=leave.seconds)
        return
    while not sending.done():
        if (seen.pieces >= leave.pieces) if leave.pieces else seen.attempts:
            return
        seen.changed.clear()
        waking = asyncio.create_task(seen.changed.wait())
        await asyncio.wait([sending, waking], return_when=asyncio.FIRST_COMPLETED)
        waking.cancel()
