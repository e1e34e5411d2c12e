"""A scheduler for vLLM in which a waiting request takes the slot of a running lower-tier one.

vLLM loads it with ``--scheduler-cls frontline_vllm_scheduler.make_scheduler``. Runs under the
engine's interpreter, where Frontline is not installed: standard library only.

vLLM's priority policy orders the waiting requests. A running request loses its place only to
another running one that gets no KV blocks. This scheduler makes room at the start of a step, where
slots or KV blocks are short, and then lets vLLM schedule as usual. vLLM suspends and resumes the
victim itself: same request object, output tokens, grammar state and random generator. The decision
is ``frontline_preemption.choose_victims``.

vLLM gives a step's tokens to running requests first, the oldest first. So a long prompt of a lower
tier would take whole steps from a better request. While a prompt is computed in several steps,
running requests are kept in the order of their priority, and a lower tier's prompt is held back
while a better request begins (``choose_held``).

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
- Holding back: vLLM itself passes over a running request until its ``next_decode_eligible_step``.
  The order of ``running`` has no other meaning under the policy ``priority``.
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

from frontline_preemption import (
    History,
    Rules,
    Running,
    Step,
    Waiting,
    choose_held,
    choose_victims,
)

logger = logging.getLogger("vllm.frontline_scheduler")

REPORT = "frontline_preemption_report"
"""The method of vLLM's ``EngineCore`` that returns the scheduler's report."""

LIMIT = "frontline_limit"
"""The method that lowers the number of requests that the scheduler runs at once."""

_KNOWN_VERSIONS = re.compile(r"0\.(32|33)\.")
_USED = (
    "running",
    "waiting.peek_request",
    "waiting.add_request",
    "waiting.remove_request",
    "kv_holding_waiting",
    "max_num_active_reqs",
    "max_num_scheduled_tokens",
    "current_step",
    "scheduler_config.long_prefill_token_threshold",
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
    scheduler.frontline = Preemption(scheduler, _why_not(scheduler))
    return scheduler


def _why_not(scheduler: Any) -> str | None:
    """Return why this vLLM is left at its plain priority order; ``None`` if it is known."""
    import vllm
    from vllm.v1.engine.core import EngineCore

    # The API server asks for the report over vLLM's own channel to its engine core.
    setattr(EngineCore, REPORT, lambda core: core.scheduler.frontline.report())
    setattr(EngineCore, LIMIT, lambda core, slots: core.scheduler.frontline.limit(slots))
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
    """Mixed into a scheduler of vLLM: acts at the start of a step.

    It adds one name to vLLM's own, so that neither can hide a method of the other.
    """

    frontline: Preemption

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        # On a throttled step vLLM admits no prefill, so room would stay empty.
        if not (any(args) or any(kwargs.values())):
            self.frontline.before_step()
        return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def _preempt_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        # Also called by vLLM itself, where a running request gets no KV blocks.
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]
        self.frontline.note_preempted(request)


class Preemption:
    """Decides for one scheduler of vLLM whom to suspend and whom to hold back.

    Attributes:
        rules: the limits.
    """

    def __init__(self, scheduler: Any, why_not: str | None) -> None:
        """Preempt from now on, or say why not."""
        self.rules = Rules()
        self._vllm = scheduler
        self._off = why_not
        self._histories: WeakKeyDictionary[Any, History] = WeakKeyDictionary()
        self._suspended: set[Any] = set()
        self._preemptions = 0
        self._suspended_s = 0.0
        if why_not is None:
            self._most = scheduler.max_num_active_reqs
            logger.info("Running requests give way to better tiers: %s", self.rules)
        else:
            logger.warning("No running request gives way to a better tier: %s", why_not)

    def report(self) -> dict[str, Any]:
        """Return whether preemption is in force, and the counts since the start.

        Preemptions are vLLM's own too, which it counts itself in ``vllm:num_preemptions``.
        """
        now = time.monotonic()
        waits = [one for one in self._suspended if one.status.name == "PREEMPTED"]
        histories = [self._histories[one] for one in waits]
        waits_s = sum(one.total_s(now) - one.suspended_s for one in histories)
        return {
            "preempts": self._off is None,
            "why_not": self._off,
            "preemptions": self._preemptions,
            "suspended": len(waits),
            "suspended_s": self._suspended_s + waits_s,
        }

    def limit(self, slots: int) -> bool:
        """Run at most so many requests at once from now on, and return whether that is so.

        It is never more than at the start. Those that run stay. vLLM admits by this number, and
        sizes its buffers by another.
        """
        if self._off is not None:
            return False
        self._vllm.max_num_active_reqs = min(self._most, slots)
        logger.info("At most %d requests run at once", self._vllm.max_num_active_reqs)
        return True

    def before_step(self) -> None:
        """Make room for better waiting requests, as far as the rules allow it."""
        if self._off is not None:
            return
        try:
            computing = self._keep_order()
        except Exception:
            self._fail("putting running requests in order has failed")
            return
        if not (self._vllm.waiting or self._suspended):
            return
        self.make_room()
        if computing and self._off is None:
            self._hold_back()

    def _keep_order(self) -> bool:
        """While a prompt is computed in several steps, put better running requests first.

        Returns whether one is.
        """
        running = self._vllm.running
        computing = any(getattr(one, "is_prefill_chunk", False) for one in running)
        if computing:
            running.sort(key=attrgetter("priority"))
        return computing

    def note_preempted(self, request: Any) -> None:
        """Record that a request was suspended."""
        if self._off is None:
            history = self._histories.setdefault(request, History())
            history.suspend(request.num_output_tokens, time.monotonic())
            self._suspended.add(request)
            self._preemptions += 1

    def make_room(self) -> None:
        """Suspend running requests for better waiting ones."""
        try:
            self._look_after_suspended(time.monotonic())
            victims = self.victims()
        except Exception:
            self._fail("choosing whom to suspend has failed")
            return
        for victim in victims:
            self._vllm.running.remove(victim)
            # private: vLLM's own, as everything here is that a subclass may use.
            self._vllm._preempt_request(victim, time.monotonic())  # noqa: SLF001
            self._vllm.prev_step_scheduled_req_ids.discard(victim.request_id)

    def _hold_back(self) -> None:
        """Let running prompts of lower tiers wait for this step, if better requests need it."""
        try:
            held = self._held()
        except Exception:
            self._fail("choosing which prompts to hold back has failed")
            return
        for request in self._vllm.running:
            if request in held:
                history = self._histories.setdefault(request, History())
                history.held += 1
                # The step that is being scheduled is the next one.
                later = max(request.next_decode_eligible_step, self._vllm.current_step + 2)
                request.next_decode_eligible_step = later
            elif (known := self._histories.get(request)) is not None:
                known.held = 0

    def _held(self) -> list[Any]:
        if not self._vllm.waiting or self._has_work_of_its_own():
            return []
        best = self._vllm.waiting.peek_request().priority
        running = [self._step(one) for one in self._vllm.running]
        if not any(one.is_prompt and one.priority - best > self.rules.margin for one in running):
            return []
        chosen = choose_held(
            running,
            self._could_run(),
            free_slots=self._free_slots(),
            free_blocks=self._free_blocks(),
            budget=self._vllm.max_num_scheduled_tokens,
            rules=self.rules,
        )
        return [self._vllm.running[index] for index in chosen]

    def _step(self, request: Any) -> Step:
        tokens = (
            request.num_tokens_with_spec
            + request.num_output_placeholders
            - request.num_computed_tokens
        )
        most = self._vllm.scheduler_config.long_prefill_token_threshold
        history = self._histories.get(request) or History()
        return Step(
            priority=request.priority,
            tokens=min(tokens, most) if most > 0 else tokens,
            is_prompt=request.is_prefill_chunk,
            held=history.held,
        )

    def _has_work_of_its_own(self) -> bool:
        """Return whether vLLM has requests to start that come first, or starts none."""
        return self._vllm.pause_state.name != "UNPAUSED" or bool(self._vllm.kv_holding_waiting)

    def _free_slots(self) -> int:
        inside = len(self._vllm.running) + self._vllm.num_waiting_for_streaming_input
        return int(self._vllm.max_num_active_reqs - inside)

    def _free_blocks(self) -> int:
        cache = self._vllm.kv_cache_manager
        return int(cache.block_pool.get_num_free_blocks() - cache.watermark_blocks)

    def _fail(self, what: str) -> None:
        # The requests go on in vLLM's own order: slower for some, but all are served.
        self._off = f"{what}; see the engine's log"
        logger.exception("No running request gives way to a better tier from now on")

    def _look_after_suspended(self, now: float) -> None:
        """Keep the times of the suspended, and raise those that were suspended for too long."""
        for request in list(self._suspended):
            history = self._histories[request]
            if request.status.name != "PREEMPTED":
                self._suspended_s += history.resume(now)
                self._suspended.discard(request)
                continue
            best = self.rules.best_priority
            too_long = history.total_s(now) > self.rules.longest_suspended_s
            if too_long and request.priority > best:
                self._vllm.waiting.remove_request(request)
                request.priority = best
                self._vllm.waiting.add_request(request)

    def victims(self) -> list[Any]:
        """Return whom to suspend now."""
        if not self._vllm.waiting:
            return []
        worst = max((one.priority for one in self._vllm.running), default=None)
        best = self._vllm.waiting.peek_request().priority
        if worst is None or worst - best <= self.rules.margin:
            return []
        if self._has_work_of_its_own():
            return []
        chosen = choose_victims(
            [self._running(one) for one in self._vllm.running],
            itertools.islice(self._could_run(), len(self._vllm.running)),
            free_slots=self._free_slots(),
            free_blocks=self._free_blocks(),
            blocks_of=lambda index: self._blocks(self._vllm.running[index]),
            rules=self.rules,
        )
        return [self._vllm.running[index] for index in chosen]

    def _running(self, request: Any) -> Running:
        history = self._histories.get(request) or History()
        limit = min(request.max_tokens, self._vllm.max_model_len - request.num_prompt_tokens)
        sampling = request.sampling_params
        return Running(
            priority=request.priority,
            arrival=request.arrival_time,
            tokens_left=limit - request.num_output_tokens - request.num_output_placeholders,
            preemptions=history.preemptions,
            tokens_since=request.num_output_tokens - history.tokens,
            suspendable=(
                # private: as above.
                self._vllm._request_blocks_can_be_freed(request)  # noqa: SLF001
                # A session takes further input while it runs.
                and not request.resumable
                # They would be computed, and sent, once more.
                and not (sampling is not None and sampling.prompt_logprobs is not None)
            ),
        )

    def _blocks(self, request: Any) -> Iterator[tuple[int, int]]:
        for group in self._vllm.kv_cache_manager.get_blocks(request.request_id).blocks:
            for block in group:
                if not block.is_null:
                    yield block.block_id, block.ref_cnt

    def _could_run(self) -> Iterator[Waiting]:
        """Return the waiting requests that vLLM would start in this step if there were room."""
        loras = {one.lora_request.lora_int_id for one in self._vllm.running if one.lora_request}
        full = self._vllm.lora_config is not None and len(loras) >= self._vllm.lora_config.max_loras
        for request in self._vllm.waiting:
            lora = request.lora_request
            if full and lora and lora.lora_int_id not in loras:
                continue
            if _is_ready(request):
                yield _need_of(self._vllm, request)


def _is_ready(request: Any) -> bool:
    if request.status.name == "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR":
        grammar = request.structured_output_request.grammar
        return grammar is not None and not isinstance(grammar, Exception)
    if request.status.name not in ("WAITING", "PREEMPTED"):
        return False
    # Output in flight from before its preemption is delivered first.
    return not request.num_stale_output_tokens or bool(request.drop_stale_output)


def _need_of(scheduler: Any, request: Any) -> Waiting:
    """Return what vLLM asks for when it admits a request.

    Its KV blocks are enough for its first chunk, and for the whole sequence where vLLM reserves
    that.
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
    blocks = ask(ahead, chunk, cap=False)
    if scheduler.scheduler_reserve_full_isl:
        blocks = max(blocks, ask(whole, whole, cap=True))
    return Waiting(request.priority, blocks, max(1, whole - hit))
