"""The settings of a model: its application's ``args`` and its ``user_config``."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Annotated, Any, Final, Literal

from pydantic import (
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from app.config.queue import QueueSettings
from app.config.scaling import ScalingSettings
from app.config.slo import SloSettings
from app.core.pricing import FREE, RateCard
from app.core.settings import Settings, SettingsError
from app.core.tiers import PriorityMode, TierOffer
from app.core.trace_variables import traces_are_on

ModelId = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$", max_length=200)
]


MOST_AUTO_SLOTS: Final = 256
"""How many requests at once an engine is started for with ``slots: auto``, and the most slots that
its replica then has. More are of no use to one engine: a step computes so many tokens at once."""
FALLBACK_SLOTS: Final = 8
"""The slots of a pool that sets none, and of a replica with ``slots: auto`` if nothing is known of
its engine's memory. Few enough for the smallest engine, and enough to see a queue form."""


def _whole_or_auto(value: object, validate: ValidatorFunctionWrapHandler) -> object:
    """Give one error instead of one for each type that the value is not."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError("expected a whole number from 1 to 65536, or auto") from None


SlotCount = Annotated[
    Annotated[int, Field(gt=0, le=65536)] | Literal["auto"], WrapValidator(_whole_or_auto)
]
"""The slots of a pool's replicas: a number, or ``auto`` for what fits into each engine."""


PoolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=60)]


AdapterName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/@-]*$", max_length=200)
]
"""As a model's id, without a colon: SGLang reads `MODEL:ADAPTER` in the name of a model."""


class AdapterSettings(Settings):
    """A LoRA adapter of a pool's model: requests name it as they name a model."""

    name: AdapterName = Field(description="The adapter's name in requests and in the models list.")
    path: str = Field(
        description="Folder of the adapter, with its `adapter_config.json`; expanded like `model`."
    )


class LaterAdapterSettings(AdapterSettings):
    """A LoRA adapter that running engines load, and unload when it is no longer named."""

    pools: tuple[PoolName, ...] = Field(
        default=(),
        description="Pools whose engines load it; each needs `adapter_room`. Not set: all that "
        "have it.",
    )


class PoolSettings(Settings):
    """One pool of a model: the replicas of one engine deployment."""

    name: PoolName = Field(description="Name of the pool and of its Serve deployment.")
    engine: str = Field(
        description="Engine adapter: `vllm`, `sglang`, `tensorrt_llm` or `simulated`."
    )
    model: str = Field(
        description="Folder or name of the model to load. `~`, `${FRONTLINE_HOME}` and other "
        "environment variables are expanded on the replica's node."
    )
    slots: SlotCount = Field(
        default=FALLBACK_SLOTS,
        description="Requests that one engine replica runs at once. `auto`: as many of a usual "
        "length as fit into the KV cache that its engine reports, at most "
        f"{MOST_AUTO_SLOTS}; see [gpu.md](gpu.md#slots-auto).",
    )
    nodes: int = Field(
        default=1,
        gt=0,
        le=64,
        description="Nodes that one engine replica spans, for tensor or pipeline parallelism "
        "larger than a node (vLLM, SGLang). With more than one, the pool's deployment needs "
        "`placement_group_bundles`, one for each node, and `placement_group_strategy: "
        "STRICT_SPREAD`.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        description="Share of the load relative to the model's other pools. With 2, the pool's "
        "replicas count as half as busy as they are.",
    )
    cost_per_hour: float = Field(
        default=1.0,
        gt=0,
        description="Cost of one replica per hour, in any currency. Autoscaling first grows the "
        "pool whose slots are cheapest. The value is only compared with those of the model's "
        "other pools.",
    )
    python: str | None = Field(
        default=None,
        description="Interpreter of the engine's environment, expanded like `model`. Not set: the "
        "one that Ray's worker runs under.",
    )
    preemption: bool = Field(
        default=True,
        description="Whether a waiting request takes the slot of a running one of a lower tier, "
        "which later goes on where it stopped, if the engine can do that (vLLM, SGLang). On, "
        "because otherwise a burst of priority requests waits for somebody's last token.",
    )
    adapters: tuple[AdapterSettings, ...] = Field(
        default=(),
        description="LoRA adapters that the pool's engines load (vLLM, SGLang). Requests that name "
        "one go to pools that have it. `adapter_rate_cards` has their prices. A change restarts "
        "the model's engines; `adapters` in the `user_config` of `Model` does not.",
    )
    adapter_room: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="How many more LoRA adapters the pool's engines can load while they run: those "
        "of `adapters` in the `user_config` of `Model` (vLLM, SGLang). 0: none, because room takes "
        "memory of the GPU, and an engine without LoRA is faster.",
    )
    adapter_rank: int = Field(
        default=16,
        gt=0,
        le=512,
        description="The highest rank of an adapter that is loaded later, for which memory is "
        "reserved. 16 is vLLM's own default. It is used only with `adapter_room`.",
    )
    engine_args: dict[str, Any] = Field(
        default={}, description="The engine's own arguments by name, with underscores."
    )
    environment: dict[str, str] = Field(
        default={},
        description="Environment variables for the engine process. `OTEL_TRACES_EXPORTER: otlp` "
        "makes it send spans, `none` keeps it from doing so where the variable is inherited (vLLM, "
        "SGLang).",
    )
    startup_timeout_s: float = Field(
        default=1800.0,
        gt=0,
        description="Longest time from start to ready, in seconds. Half an hour is enough for "
        "large models on slow disks.",
    )
    stop_grace_s: float = Field(
        default=10.0,
        ge=0,
        description="Time for an engine to exit by itself, in seconds, before its processes are "
        "killed.",
    )
    health_timeout_s: float = Field(
        default=5.0,
        gt=0,
        description="Longest wait for the engine's health route, in seconds. An engine that "
        "exceeds it counts as hung; after three times in a row, the replica is replaced.",
    )
    probe_timeout_s: float = Field(
        default=30.0,
        gt=0,
        description="An engine whose streams stall while its health route answers is sent a "
        "request for one token, ahead of all others. If the token takes longer than this, in "
        "seconds, the engine counts as hung and is replaced. Engines schedule such a request "
        "beside a long prompt within seconds.",
    )

    @field_validator("environment")
    @classmethod
    def _can_send_spans(cls, value: dict[str, str]) -> dict[str, str]:
        try:
            traces_are_on(value)
        except SettingsError as error:
            # The values are not shown: some may be secrets.
            raise PydanticCustomError("secret", "{problem}", {"problem": str(error)}) from None
        return value

    @property
    def most_slots(self) -> int:
        """The most slots that a replica has: what its engine is started for."""
        return self.slots if isinstance(self.slots, int) else MOST_AUTO_SLOTS


class ModelArgs(Settings):
    """``args`` of a model's application. A change restarts this model only."""

    id: ModelId = Field(description="The model's name in requests and in the models list.")
    aliases: tuple[ModelId, ...] = Field(
        default=(), description="Other names that requests may use."
    )
    owned_by: str = Field(default="frontline", description="`owned_by` in the models list.")
    pools: tuple[PoolSettings, ...] = Field(
        min_length=1, description="Engine deployments that serve the model; see below."
    )

    @model_validator(mode="after")
    def _names_are_distinct(self) -> ModelArgs:
        names = Counter(pool.name for pool in self.pools)
        if doubled := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"two pools share the name {doubled[0]!r}")
        if "Model" in names:
            raise ValueError("a pool may not be called 'Model': that is the model's own deployment")
        taken = {self.id, *self.aliases}
        for pool in self.pools:
            adapters = [adapter.name for adapter in pool.adapters]
            for name, count in Counter(adapters).items():
                if count > 1 or name in taken:
                    raise ValueError(
                        f"pool {pool.name!r}: the adapter name {name!r} is taken already"
                    )
        return self

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of its adapters, each once, as its pools name them."""
        return tuple(dict.fromkeys(one.name for pool in self.pools for one in pool.adapters))


class TierSettings(Settings):
    """Which tiers a model offers."""

    priority: PriorityMode = Field(
        default=PriorityMode.AUTO,
        description="When `priority` is delivered. `auto`: on engine replicas that have proved "
        "native priority. `queue`: always; going to the front of the queue counts as delivery. "
        "`off`: never.",
    )
    flex: bool = Field(default=True, description="Whether `flex` is offered.")
    strict: bool = Field(
        default=False,
        description="Whether a request that names a tier which it would not get is refused with "
        "4xx. Not set, it is served as `default`, at the default price, which is what most clients "
        "expect. A client asks for the same with `require_tier`.",
    )

    @cached_property
    def offer(self) -> TierOffer:
        """These settings as the value that tier decisions use."""
        return TierOffer(self.priority, self.flex)


class ModelSettings(Settings):
    """``user_config`` of a model's ``Model`` deployment. Changes need no restart."""

    rate_card: RateCard = Field(
        default=FREE,
        description="Prices of the model. Not set: free, with a warning in the model's log; "
        "`frontline check` asks for it.",
    )
    adapter_rate_cards: dict[AdapterName, RateCard] = Field(
        default={},
        description="Prices of the model's adapters, by name. An adapter that is not named here "
        "has the prices of `rate_card`.",
    )
    adapters: tuple[LaterAdapterSettings, ...] = Field(
        default=(),
        description="LoRA adapters that running engines load, beside those of the pools. One that "
        "is added here is loaded without a restart, and one that is removed is unloaded.",
    )
    tiers: TierSettings = Field(default=TierSettings(), description="Tiers that the model offers.")
    queue: QueueSettings = Field(
        default=QueueSettings(),
        description="How many requests wait, for how long, and which are shed.",
    )
    scaling: ScalingSettings = Field(
        default=ScalingSettings(),
        description="How many replicas the model gets, if its application uses Frontline's "
        "autoscaling policy.",
    )
    slo: SloSettings = Field(
        default=SloSettings(),
        description="Service level objectives by tier, such as `{priority: {ttft_ms: 500, p: "
        "0.99}}`. They are measured and alerted on; no request depends on them. Not set: none.",
    )

    @field_validator("adapters")
    @classmethod
    def _adapters_are_distinct(
        cls, value: tuple[LaterAdapterSettings, ...]
    ) -> tuple[LaterAdapterSettings, ...]:
        for name, count in Counter(one.name for one in value).items():
            if count > 1:
                raise ValueError(f"the adapter name {name!r} is taken already")
        return value

    @model_validator(mode="after")
    def _adapters_price_what_the_model_does(self) -> ModelSettings:
        for name, card in self.adapter_rate_cards.items():
            for kind in ("image", "audio_second"):
                missing = getattr(card, kind) is None and not card.free
                if missing and getattr(self.rate_card, kind) is not None:
                    raise ValueError(
                        f"adapter_rate_cards: {name!r} has no {kind!r}, which the model's card has "
                        "(0 for free)"
                    )
        return self

    def rate_card_of(self, adapter: str) -> RateCard:
        """Return the prices of an adapter, by its name; of the model itself for an empty one."""
        return self.adapter_rate_cards.get(adapter, self.rate_card)
