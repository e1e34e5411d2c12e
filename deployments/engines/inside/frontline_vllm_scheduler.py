"""A scheduler for vLLM in which a waiting request takes the slot of a running lower-tier one.

vLLM loads it with ``--scheduler-cls frontline_vllm_scheduler.make_scheduler``. Runs under the
engine's interpreter, where Frontline is not installed: standard library only.

vLLM's priority policy orders the waiting requests. A running request loses its place only to
another running one that gets no KV blocks. This scheduler makes room at the start of a step, where
slots or KV blocks are short, and then lets vLLM schedule as usual. vLLM suspends and resumes the
victim itself: same request object, output tokens, grammar state and random generator. The decision
is ``frontline_preemption.choose_victims``.

Read in vLLM 0.32.0 (``v1/core/sched/scheduler.py``, ``v1/core/kv_cache_manager.py``):

- Start of a step: nothing is scheduled yet, so no budget, LoRA, encoder or draft token has to be
  given back. ``reset_prefix_cache`` preempts at the same point.
- Asynchronous scheduling and pipeline parallelism: output in flight becomes stale in
  ``_preempt_request`` and is still delivered; the request resumes only after that.
- A victim that resumes in the same step must not count as scheduled in the step before
  (``prev_step_scheduled_req_ids``), or the V1 model runner does not get its tokens.
- Chunked prefill: the victim's prefill starts again, less what the prefix cache still has.
  ``_preempt_request`` drops it from the prefills in flight.
- Prefix caching: a newcomer's need is computed after its cache hits, as at its admission. A
  victim's block that another request shares does not become free.
- Speculative decoding: ``_preempt_request`` drops the draft tokens. Lookahead tokens are part of a
  newcomer's need.
- LoRA: vLLM passes over a request whose adapter would be one too many, so no room is made for it.
- Structured output: a request whose grammar is not compiled yet is passed over.

The same places were read in vLLM 0.33.0, which was not run.

Where it falls back to vLLM's plain priority order, with one line in the log: another version of
vLLM, another policy than ``priority``, KV or encoder-cache connectors, encoder-decoder models, a
``prefill_schedule_interval``, and wherever something that it uses is missing.
``GET /frontline/facts`` reports what is in force.
"""

from __future__ import annotations

import inspect
import itertools
import logging
import re
import time
from collections.abc import Iterator
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

from frontline_preemption import History, Rules, Running, Waiting, choose_victims

logger = logging.getLogger("vllm.frontline_scheduler")

REPORT = "frontline_preemption_report"
"""The method of vLLM's ``EngineCore`` that returns the scheduler's report."""

_KNOWN_VERSIONS = re.compile(r"0\.(32|33)\.")
_USED = (
    "running",
    "waiting.peek_request",
    "waiting.add_request",
    "waiting.remove_request",
    "kv_holding_waiting",
    "max_num_active_reqs",
    "max_num_scheduled_tokens",
    "max_model_len",
    "num_lookahead_tokens",
    "num_waiting_for_streaming_input",
    "prev_step_scheduled_req_ids",
    "scheduler_reserve_full_isl",
    "pause_state.name",
    "kv_cache_manager.get_blocks",
    "kv_cache_manager.get_computed_blocks",
    "kv_cache_manager.watermark_blocks",
    "kv_cache_manager.block_pool.get_num_free_blocks",
    "kv_cache_manager.coordinator.get_num_blocks_to_allocate",
    "_preempt_request",
    "_request_blocks_can_be_freed",
)
_ASKED_WITH = frozenset(
    {
        "request_id",
        "num_tokens",
        "new_computed_blocks",
        "num_encoder_tokens",
        "total_computed_tokens",
        "num_local_computed_tokens",
        "num_tokens_main_model",
        "apply_admission_cap",
        "prefill_end",
    }
)


def make_scheduler(*, vllm_config: Any, **arguments: Any) -> Any:
    """Return vLLM's own scheduler for this configuration, with preemption by priority."""
    config = vllm_config.scheduler_config
    named, config.scheduler_cls = config.scheduler_cls, None
    try:
        own = config.get_scheduler_cls()  # AsyncScheduler or Scheduler
    finally:
        config.scheduler_cls = named
    kind = type(f"Preempting{own.__name__}", (Preempting, own), {})
    scheduler = kind(vllm_config=vllm_config, **arguments)
    scheduler.start_preempting(_why_not(scheduler))
    return scheduler


def _why_not(scheduler: Any) -> str | None:
    """Return why this vLLM is left at its plain priority order; ``None`` if it is known."""
    import vllm
    from vllm.v1.engine.core import EngineCore

    # The API server asks for the report over vLLM's own channel to its engine core.
    setattr(EngineCore, REPORT, lambda core: core.scheduler.report_preemption())
    if not _KNOWN_VERSIONS.match(vllm.__version__):
        return f"vLLM {vllm.__version__} is not known"
    policy = scheduler.scheduler_config.policy
    if getattr(policy, "value", policy) != "priority":
        return f"the scheduling policy is {policy}"
    if getattr(scheduler, "is_encoder_decoder", True):
        return "the model has an encoder"
    if getattr(scheduler.scheduler_config, "prefill_schedule_interval", 1) > 1:
        return "prompts are admitted only every few steps"
    if scheduler.connector is not None or scheduler.ec_connector is not None:
        return "a connector moves its cache"
    for name in _USED:
        try:
            attrgetter(name)(scheduler)
        except AttributeError:
            return f"its scheduler has no {name}"
    asked = scheduler.kv_cache_manager.coordinator.get_num_blocks_to_allocate
    if missing := _ASKED_WITH - set(inspect.signature(asked).parameters):
        return f"its KV cache manager does not take {', '.join(sorted(missing))}"
    return None


class Preempting:
    """Mixed into a scheduler of vLLM: makes room for better requests at the start of a step."""

    rules = Rules()
    _off: str | None = "it has not started"

    def start_preempting(self, why_not: str | None) -> None:
        """Preempt from now on, or say why not."""
        self._off = why_not
        self._histories: WeakKeyDictionary[Any, History] = WeakKeyDictionary()
        self._suspended: set[Any] = set()
        self._preemptions = 0
        if why_not is None:
            logger.info("Running requests give way to better tiers: %s", self.rules)
        else:
            logger.warning("No running request gives way to a better tier: %s", why_not)

    def report_preemption(self) -> dict[str, Any]:
        """Return whether preemption is in force, and the counts since the start."""
        return {
            "preempts": self._off is None,
            "why_not": self._off,
            "preemptions": self._preemptions,
            "suspended": sum(one.status.name == "PREEMPTED" for one in self._suspended),
        }

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        # On a throttled step vLLM admits no prefill, so room would stay empty.
        throttled = any(args) or any(kwargs.values())
        if self._off is None and (self.waiting or self._suspended) and not throttled:
            self.make_room()
        return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def _preempt_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        # Also called by vLLM itself, where a running request gets no KV blocks.
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]
        if self._off is None:
            history = self._histories.setdefault(request, History())
            history.suspend(request.num_output_tokens, time.monotonic())
            self._suspended.add(request)

    def make_room(self: Any) -> None:
        try:
            self._look_after_suspended(time.monotonic())
            victims = self.victims_now()
        except Exception:
            # The requests go on in vLLM's own order: slower for some, but all are served.
            self._off = "choosing whom to suspend has failed; see the engine's log"
            logger.exception("No running request gives way to a better tier from now on")
            return
        for victim in victims:
            self.running.remove(victim)
            self._preempt_request(victim, time.monotonic())
            self.prev_step_scheduled_req_ids.discard(victim.request_id)
        self._preemptions += len(victims)

    def _look_after_suspended(self: Any, now: float) -> None:
        """Keep the times of the suspended, and raise those that were suspended for too long."""
        for request in list(self._suspended):
            history = self._histories[request]
            if request.status.name != "PREEMPTED":
                history.resume(now)
                self._suspended.discard(request)
                continue
            best = self.rules.best_priority
            too_long = history.total_s(now) > self.rules.longest_suspended_s
            if too_long and request.priority > best:
                self.waiting.remove_request(request)
                request.priority = best
                self.waiting.add_request(request)

    def victims_now(self: Any) -> list[Any]:
        if not self.waiting:
            return []
        worst = max((one.priority for one in self.running), default=None)
        best = self.waiting.peek_request().priority
        if worst is None or worst - best <= self.rules.margin:
            return []
        # With any of these vLLM has work of its own that comes first.
        if self.pause_state.name != "UNPAUSED" or self.kv_holding_waiting:
            return []
        cache = self.kv_cache_manager
        inside = len(self.running) + self.num_waiting_for_streaming_input
        chosen = choose_victims(
            [self._running(one) for one in self.running],
            itertools.islice(self._could_run(), len(self.running)),
            free_slots=self.max_num_active_reqs - inside,
            free_blocks=cache.block_pool.get_num_free_blocks() - cache.watermark_blocks,
            blocks_of=lambda index: self._blocks(self.running[index]),
            rules=self.rules,
        )
        return [self.running[index] for index in chosen]

    def _running(self: Any, request: Any) -> Running:
        history = self._histories.get(request) or History()
        limit = min(request.max_tokens, self.max_model_len - request.num_prompt_tokens)
        sampling = request.sampling_params
        return Running(
            priority=request.priority,
            arrival=request.arrival_time,
            tokens_left=limit - request.num_output_tokens - request.num_output_placeholders,
            preemptions=history.preemptions,
            tokens_since=request.num_output_tokens - history.tokens,
            suspendable=(
                self._request_blocks_can_be_freed(request)
                # A session takes further input while it runs.
                and not request.resumable
                # They would be computed, and sent, once more.
                and not (sampling is not None and sampling.prompt_logprobs is not None)
            ),
        )

    def _blocks(self: Any, request: Any) -> Iterator[tuple[int, int]]:
        for group in self.kv_cache_manager.get_blocks(request.request_id).blocks:
            for block in group:
                if not block.is_null:
                    yield block.block_id, block.ref_cnt

    def _could_run(self: Any) -> Iterator[Waiting]:
        """Return the waiting requests that vLLM would start in this step if there were room."""
        loras = {one.lora_request.lora_int_id for one in self.running if one.lora_request}
        full = self.lora_config is not None and len(loras) >= self.lora_config.max_loras
        for request in self.waiting:
            lora = request.lora_request
            if full and lora and lora.lora_int_id not in loras:
                continue
            if _is_ready(request):
                yield Waiting(request.priority, _blocks_needed(self, request))


def _is_ready(request: Any) -> bool:
    if request.status.name == "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR":
        grammar = request.structured_output_request.grammar
        return grammar is not None and not isinstance(grammar, Exception)
    if request.status.name not in ("WAITING", "PREEMPTED"):
        return False
    # Output in flight from before its preemption is delivered first.
    return not request.num_stale_output_tokens or bool(request.drop_stale_output)


def _blocks_needed(scheduler: Any, request: Any) -> int:
    """Return how many KV blocks vLLM asks for when it admits a request.

    That is enough for its first chunk, and for the whole sequence where vLLM reserves that.
    """
    found, hit, *_ = scheduler.kv_cache_manager.get_computed_blocks(request)

    def ask(tokens: int, of_main_model: int, cap: bool) -> int:
        needed = scheduler.kv_cache_manager.coordinator.get_num_blocks_to_allocate(
            request_id=request.request_id,
            num_tokens=tokens,
            new_computed_blocks=found.blocks,
            num_encoder_tokens=0,
            total_computed_tokens=hit,
            num_local_computed_tokens=hit,
            num_tokens_main_model=of_main_model,
            apply_admission_cap=cap,
            prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
        )
        return int(needed)

    whole = min(request.num_tokens, scheduler.max_model_len)
    chunk = min(whole, hit + scheduler.max_num_scheduled_tokens)
    ahead = min(chunk + scheduler.num_lookahead_tokens, scheduler.max_model_len)
    first = ask(ahead, chunk, cap=False)
    return (
        max(first, ask(whole, whole, cap=True)) if scheduler.scheduler_reserve_full_isl else first
    )
