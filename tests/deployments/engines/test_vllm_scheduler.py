"""The scheduler inside vLLM, over a stand-in that has what it uses of vLLM's own."""

import heapq
import importlib
import logging
import sys
from dataclasses import replace
from itertools import count
from types import ModuleType, SimpleNamespace

import pytest

pytestmark = pytest.mark.unit

PRIORITY, DEFAULT, FLEX = -100, 0, 100
numbers = count()


class Request:
    def __init__(self, priority=DEFAULT, tokens=100, prompt=16, **more):
        self.request_id = f"r{next(numbers)}"
        self.priority, self.arrival_time = priority, float(next(numbers))
        self.num_prompt_tokens, self.max_tokens = prompt, tokens
        self.num_output_tokens = self.num_output_placeholders = self.num_preemptions = 0
        self.num_stale_output_tokens, self.drop_stale_output = 0, False
        self.num_computed_tokens = self.next_decode_eligible_step = 0
        self.is_prefill_chunk = False
        self.status = SimpleNamespace(name="WAITING")
        self.resumable, self.lora_request, self.structured_output_request = False, None, None
        self.sampling_params = SimpleNamespace(prompt_logprobs=None)
        self.__dict__.update(more)

    @property
    def num_tokens(self):
        return self.num_prompt_tokens + self.num_output_tokens

    num_tokens_with_spec = num_tokens

    def __lt__(self, other):
        return (self.priority, self.arrival_time) < (other.priority, other.arrival_time)


class Queue(list):
    def add_request(self, request):
        heapq.heappush(self, request)

    def peek_request(self):
        return self[0]

    def remove_request(self, request):
        self.remove(request)
        heapq.heapify(self)

    def __iter__(self):
        return iter(sorted(list.__iter__(self)))


BLOCK = 16


class Cache:
    """As much of the KV cache manager as is asked."""

    watermark_blocks = 0

    def __init__(self, blocks):
        self.total, self.held = blocks, {}
        self.block_pool = SimpleNamespace(get_num_free_blocks=lambda: self.free)
        self.coordinator = self

    @property
    def free(self):
        return self.total - sum(self.held.values())

    def get_computed_blocks(self, request):
        return SimpleNamespace(blocks=((),)), 0, 0

    def get_blocks(self, request_id):
        blocks = [
            SimpleNamespace(block_id=(request_id, i), ref_cnt=1, is_null=False)
            for i in range(self.held[request_id])
        ]
        return SimpleNamespace(blocks=(blocks,))

    def get_num_blocks_to_allocate(
        self,
        request_id,
        num_tokens,
        new_computed_blocks,
        num_encoder_tokens,
        total_computed_tokens,
        num_local_computed_tokens,
        num_tokens_main_model,
        apply_admission_cap=False,
        prefill_end=0,
    ):
        return -(-num_tokens // BLOCK)


class Scheduler:
    """vLLM's order. In a step, a running request whose prompt is computed generates a token."""

    def __init__(self, *, vllm_config, blocks=1000):
        self.scheduler_config = vllm_config.scheduler_config
        self.running, self.waiting, self.kv_holding_waiting = [], Queue(), Queue()
        self.max_num_active_reqs = self.scheduler_config.max_num_seqs
        self.max_num_scheduled_tokens, self.max_model_len = 2048, 4096
        self.current_step = 0
        self.num_lookahead_tokens = self.num_waiting_for_streaming_input = 0
        self.prev_step_scheduled_req_ids = set()
        self.scheduler_reserve_full_isl = True
        self.pause_state = SimpleNamespace(name="UNPAUSED")
        self.kv_cache_manager = Cache(blocks)
        self.is_encoder_decoder, self.connector, self.ec_connector = False, None, None
        self.lora_config = None

    def add_request(self, *requests):
        for request in requests:
            self.waiting.add_request(request)

    def schedule(self, throttle_prefills=False):
        self.current_step += 1
        self.budget = self.max_num_scheduled_tokens
        for request in self.running:
            if self.current_step >= request.next_decode_eligible_step:
                self.compute(request)
        while (
            self.waiting
            and len(self.running) < self.max_num_active_reqs
            and not throttle_prefills
            and self.budget
        ):
            need = -(-self.waiting[0].num_tokens // BLOCK)
            if need > self.kv_cache_manager.free:
                break
            request = heapq.heappop(self.waiting)
            self.kv_cache_manager.held[request.request_id] = need
            request.status = SimpleNamespace(name="RUNNING")
            self.running.append(request)
            self.compute(request)
        self.prev_step_scheduled_req_ids = {one.request_id for one in self.running}
        for request in list(self.running):
            if request.num_output_tokens == request.max_tokens:
                request.status = SimpleNamespace(name="FINISHED_LENGTH_CAPPED")
                self.running.remove(request)
                del self.kv_cache_manager.held[request.request_id]
        return list(self.running)

    def compute(self, request):
        tokens = min(request.num_tokens - request.num_computed_tokens, self.budget)
        self.budget -= tokens
        request.num_computed_tokens += tokens
        request.is_prefill_chunk = request.num_computed_tokens < request.num_tokens
        if tokens and not request.is_prefill_chunk:
            request.num_output_tokens += 1

    def _preempt_request(self, request, timestamp, drop_stale_output=False):
        assert request.status.name == "RUNNING" and request not in self.running
        del self.kv_cache_manager.held[request.request_id]
        request.status = SimpleNamespace(name="PREEMPTED")
        request.num_preemptions += 1
        request.num_computed_tokens, request.is_prefill_chunk = 0, False
        self.waiting.add_request(request)

    def _request_blocks_can_be_freed(self, request):
        return True


class EngineCore:
    scheduler = None


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for the package, of a version that is known."""
    for name in ("vllm", "vllm.v1", "vllm.v1.engine", "vllm.v1.engine.core"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    package = sys.modules["vllm"]
    monkeypatch.setattr(package, "__version__", "0.32.0", raising=False)
    core = type("EngineCore", (EngineCore,), {})
    monkeypatch.setattr(sys.modules["vllm.v1.engine.core"], "EngineCore", core, raising=False)
    return package


def config(slots=2, **more):
    class SchedulerConfig:
        scheduler_cls = "frontline_vllm_scheduler.make_scheduler"
        max_num_seqs = slots
        policy = "priority"
        long_prefill_token_threshold = 0

        def get_scheduler_cls(self):
            assert self.scheduler_cls is None, "vLLM would load this very scheduler"
            return Scheduler

    made = SchedulerConfig()
    made.__dict__.update(more)
    return SimpleNamespace(scheduler_config=made)


def make(slots=2, *, options=None, **more):
    module = importlib.import_module("frontline_vllm_scheduler")
    return module.make_scheduler(vllm_config=config(slots, **(options or {})), **more)


def steps(scheduler, number):
    for _ in range(number):
        scheduler.schedule()


def test_a_better_request_takes_a_slot_and_its_victim_resumes_exactly(vllm):
    scheduler = make()
    first, last = Request(FLEX), Request(FLEX)
    scheduler.add_request(first, last)
    steps(scheduler, 10)
    urgent = Request(PRIORITY, tokens=5)
    scheduler.add_request(urgent)
    steps(scheduler, 1)
    assert scheduler.running == [first, urgent] and urgent.num_output_tokens == 1
    assert last.num_output_tokens == 10
    assert scheduler.frontline.report()["suspended"] == 1
    steps(scheduler, 200)
    assert [one.num_output_tokens for one in (first, last, urgent)] == [100, 100, 5]
    assert scheduler.frontline.report() == {
        "preempts": True,
        "why_not": None,
        "preemptions": 1,
        "suspended": 0,
        "suspended_s": pytest.approx(0, abs=1),
    }


def test_room_is_made_in_the_cache(vllm):
    scheduler = make(slots=8, blocks=6)
    flex = [Request(FLEX, prompt=32, tokens=30) for _ in range(3)]
    scheduler.add_request(*flex)
    steps(scheduler, 1)
    urgent = Request(PRIORITY, prompt=40, tokens=5)  # three blocks
    scheduler.add_request(urgent)
    steps(scheduler, 1)
    assert scheduler.running == [flex[0], urgent]
    steps(scheduler, 100)
    assert [one.num_output_tokens for one in flex] == [30, 30, 30]
    assert scheduler.kv_cache_manager.free == 6


@pytest.mark.parametrize("newcomer", [FLEX, FLEX + 1, FLEX - 50])
def test_nobody_gives_way_to_its_own_tier(vllm, newcomer):
    scheduler = make()
    inside = [Request(FLEX), Request(FLEX)]
    scheduler.add_request(*inside)
    steps(scheduler, 3)
    scheduler.add_request(Request(newcomer))
    steps(scheduler, 3)
    assert scheduler.running == inside


GRAMMAR = SimpleNamespace(name="WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR")


@pytest.mark.parametrize(
    ("newcomer", "makes_room"),
    [
        ({}, True),
        ({"status": GRAMMAR, "structured_output_request": SimpleNamespace(grammar="g")}, True),
        ({"status": GRAMMAR, "structured_output_request": SimpleNamespace(grammar=None)}, False),
        (
            {
                "status": GRAMMAR,
                "structured_output_request": SimpleNamespace(grammar=ValueError("bad")),
            },
            False,
        ),
        ({"status": SimpleNamespace(name="WAITING_FOR_REMOTE_KVS")}, False),
        ({"num_stale_output_tokens": 1}, False),
        ({"num_stale_output_tokens": 1, "drop_stale_output": True}, True),
        ({"lora_request": SimpleNamespace(lora_int_id=2)}, False),
        ({"lora_request": SimpleNamespace(lora_int_id=1)}, True),
    ],
)
def test_room_is_made_only_for_a_request_that_vllm_would_start(vllm, newcomer, makes_room):
    scheduler = make()
    scheduler.lora_config = SimpleNamespace(max_loras=1)
    inside = [Request(FLEX, lora_request=SimpleNamespace(lora_int_id=1)), Request(FLEX)]
    scheduler.add_request(*inside)
    steps(scheduler, 1)
    scheduler.add_request(Request(PRIORITY, **newcomer))
    assert bool(scheduler.frontline.victims()) is makes_room


@pytest.mark.parametrize(
    "victim",
    [
        {"resumable": True},
        {"sampling_params": SimpleNamespace(prompt_logprobs=1)},
        {"tokens": 6},
        {"num_output_placeholders": 96},
        {"prompt": 4090},
    ],
)
def test_these_run_to_their_end(vllm, victim):
    scheduler = make(slots=1)
    scheduler.add_request(Request(FLEX, **victim))
    steps(scheduler, 3)
    scheduler.add_request(Request(PRIORITY))
    assert scheduler.frontline.victims() == []


def test_a_step_that_admits_no_prompt_makes_no_room(vllm):
    scheduler = make(slots=1)
    flex = Request(FLEX)
    scheduler.add_request(flex)
    steps(scheduler, 1)
    scheduler.add_request(Request(PRIORITY))
    scheduler.schedule(True)
    scheduler.schedule(throttle_prefills=True)
    scheduler.pause_state = SimpleNamespace(name="PAUSED_NEW")
    scheduler.schedule()
    assert scheduler.running == [flex]


def test_a_victim_is_not_taken_for_one_that_was_scheduled_in_the_step_before(vllm):
    # Otherwise the V1 model runner gets no tokens of a victim that resumes in the same step.
    scheduler = make(slots=1)
    flex = Request(FLEX)
    scheduler.add_request(flex)
    steps(scheduler, 1)
    scheduler.add_request(Request(PRIORITY))
    scheduler.frontline.make_room()
    assert scheduler.prev_step_scheduled_req_ids == set()


def test_a_request_that_was_suspended_for_long_comes_before_newer_priority(vllm, monkeypatch):
    scheduler = make(slots=1)
    clock = [0.0]
    now = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr(sys.modules["frontline_vllm_scheduler"], "time", now)
    flex = Request(FLEX, tokens=50)
    scheduler.add_request(flex)
    steps(scheduler, 1)
    while flex.num_output_tokens < 50:
        clock[0] += 10.0
        if len(scheduler.waiting) < 3:
            scheduler.add_request(Request(PRIORITY, tokens=5))
        scheduler.schedule()
        assert clock[0] < 1000
    assert flex.num_preemptions == 1


def test_preemptions_of_vllm_itself_count(vllm):
    scheduler = make(slots=1)
    flex = Request(FLEX)
    scheduler.add_request(flex)
    for _ in range(scheduler.frontline.rules.most_preemptions):
        steps(scheduler, 1)
        scheduler.running.remove(flex)
        # private: vLLM's own, with which it preempts where blocks are short.
        scheduler._preempt_request(flex, 0.0)  # noqa: SLF001
    assert scheduler.frontline.report()["preemptions"] == scheduler.frontline.rules.most_preemptions
    steps(scheduler, scheduler.frontline.rules.tokens_between)
    scheduler.add_request(Request(PRIORITY))
    steps(scheduler, 1)
    assert scheduler.running == [flex]


def test_the_time_suspended_is_reported(vllm, monkeypatch):
    scheduler = make(slots=1)
    clock = [0.0]
    now = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr(sys.modules["frontline_vllm_scheduler"], "time", now)
    scheduler.add_request(Request(FLEX))
    steps(scheduler, 1)
    scheduler.add_request(Request(PRIORITY, tokens=5))
    steps(scheduler, 1)
    clock[0] += 3.0
    told = scheduler.frontline.report()
    assert (told["preemptions"], told["suspended"], told["suspended_s"]) == (1, 1, 3.0)
    steps(scheduler, 10)
    clock[0] += 9.0
    told = scheduler.frontline.report()
    assert (told["preemptions"], told["suspended"], told["suspended_s"]) == (1, 0, 3.0)


def budgeted(tokens, **more):
    scheduler = make(slots=8, **more)
    scheduler.max_num_scheduled_tokens = tokens
    return scheduler


def steps_to_first(scheduler, request):
    for number in range(1, 1000):
        scheduler.schedule()
        if request.num_output_tokens:
            return number
    raise AssertionError("it never begins")


def test_a_long_prompt_of_a_lower_tier_does_not_take_whole_steps_from_a_better_request(vllm):
    # vLLM by itself: the 31 steps that are left of the flex prompt, and then its own.
    scheduler = budgeted(100)
    flex = Request(FLEX, prompt=3200)
    scheduler.add_request(flex)
    steps(scheduler, 1)
    urgent = Request(PRIORITY, prompt=30, tokens=50)
    scheduler.add_request(urgent)
    assert steps_to_first(scheduler, urgent) == 1
    computed = flex.num_computed_tokens
    steps(scheduler, 10)
    assert urgent.num_output_tokens == 11, "a token each step, ahead of the long prompt"
    assert flex.num_computed_tokens == computed + 10 * 99, "it goes on with what is left"
    assert flex.num_preemptions == 0
    steps(scheduler, 200)
    assert flex.num_output_tokens == flex.max_tokens


def test_no_more_prompts_are_held_back_than_a_better_request_needs(vllm):
    scheduler = budgeted(100)
    default, flex = Request(DEFAULT, prompt=60, tokens=9), Request(FLEX, prompt=3200)
    scheduler.add_request(flex)
    steps(scheduler, 1)
    scheduler.add_request(default)
    steps(scheduler, 1)
    scheduler.add_request(Request(PRIORITY, prompt=10))
    before = flex.num_computed_tokens
    steps(scheduler, 1)
    assert (default.num_output_tokens, flex.num_computed_tokens) == (2, before)


def test_a_long_prompt_gets_on_however_many_better_requests_come(vllm):
    scheduler = budgeted(100)
    flex = Request(FLEX, prompt=1000, tokens=10)
    scheduler.add_request(flex)
    steps(scheduler, 1)
    for _ in range(10 * (scheduler.frontline.rules.most_held + 1)):
        scheduler.add_request(Request(PRIORITY, prompt=80, tokens=1))
        steps(scheduler, 1)
    assert flex.num_output_tokens >= 1


@pytest.mark.parametrize("priority", [FLEX, DEFAULT])
def test_a_prompt_is_not_held_back_for_its_own_tier_or_where_there_is_no_slot(vllm, priority):
    scheduler = budgeted(100)
    scheduler.max_num_active_reqs = 1 if priority == DEFAULT else 8
    scheduler.frontline.rules = replace(scheduler.frontline.rules, nearly_done=10_000)
    flex = Request(FLEX, prompt=3200)
    scheduler.add_request(flex)
    steps(scheduler, 1)
    scheduler.add_request(Request(priority, prompt=30))
    steps(scheduler, 1)
    assert flex.num_computed_tokens == 200


def test_it_adds_one_name_to_vllms_scheduler(vllm):
    # vLLM calls methods of its own of almost any name: one of ours would hide it.
    module = importlib.import_module("frontline_vllm_scheduler")
    [own] = [kind for kind in type(make()).__mro__ if kind is module.Preempting]
    names = {name for name in vars(own) if not name.startswith("__")}
    assert names == {"schedule", "_preempt_request"}
    assert vars(make()).keys() - vars(Scheduler(vllm_config=config())).keys() == {"frontline"}


OTHER_COORDINATOR = SimpleNamespace(get_num_blocks_to_allocate=lambda request, tokens: 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda vllm, s: setattr(vllm, "__version__", "0.34.0"), "vLLM 0.34.0 is not known"),
        (lambda vllm, s: setattr(vllm, "__version__", "dev"), "vLLM dev is not known"),
        (lambda vllm, s: setattr(s.scheduler_config, "policy", "fcfs"), "policy is fcfs"),
        (lambda vllm, s: setattr(s, "connector", object()), "connector"),
        (lambda vllm, s: setattr(s, "ec_connector", object()), "connector"),
        (lambda vllm, s: setattr(s, "is_encoder_decoder", True), "encoder"),
        (lambda vllm, s: delattr(s, "kv_holding_waiting"), "no kv_holding_waiting"),
        (lambda vllm, s: setattr(s, "pause_state", None), "no pause_state.name"),
        (
            lambda vllm, s: setattr(s.kv_cache_manager, "coordinator", OTHER_COORDINATOR),
            "does not take",
        ),
        (
            lambda vllm, s: setattr(s.scheduler_config, "prefill_schedule_interval", 2),
            "every few steps",
        ),
    ],
)
def test_what_it_does_not_know_falls_back_to_plain_priority_with_one_line(
    vllm, monkeypatch, caplog, change, words
):
    made = Scheduler.__init__

    def differently(self, **options):
        made(self, **options)
        change(vllm, self)

    monkeypatch.setattr(Scheduler, "__init__", differently)
    with caplog.at_level(logging.INFO):
        scheduler = make(slots=1)
    [line] = caplog.records
    assert words in line.getMessage() and line.levelname == "WARNING"
    assert words in scheduler.frontline.report()["why_not"]
    assert scheduler.frontline.report()["preempts"] is False
    flex = Request(FLEX)
    scheduler.add_request(flex)
    steps(scheduler, 2)
    scheduler.add_request(Request(PRIORITY))
    steps(scheduler, 2)
    assert scheduler.running == [flex]


def test_a_decision_that_fails_turns_preemption_off_and_nobody_is_lost(vllm, caplog):
    scheduler = make(slots=1)
    flex, urgent = Request(FLEX, tokens=10), Request(PRIORITY, tokens=5)
    scheduler.add_request(flex)
    steps(scheduler, 1)
    scheduler.add_request(urgent)
    scheduler.kv_cache_manager.get_computed_blocks = None
    steps(scheduler, 20)
    assert (flex.num_output_tokens, urgent.num_output_tokens) == (10, 5)
    assert scheduler.frontline.report()["preempts"] is False
    assert sum(line.levelname == "ERROR" for line in caplog.records) == 1


def test_the_engine_core_answers_with_the_report_of_its_scheduler(vllm):
    scheduler = make()
    core = sys.modules["vllm.v1.engine.core"].EngineCore()
    core.scheduler = scheduler
    method = sys.modules["frontline_vllm_scheduler"].REPORT
    assert getattr(core, method)() == scheduler.frontline.report()


def test_it_is_held_to_fewer_requests_while_it_runs(vllm):
    """With `slots: auto` priority takes a slot of those that fit, and no memory of the others."""
    scheduler = make(slots=8)
    others = [Request(FLEX) for _ in range(4)]
    scheduler.add_request(*others)
    steps(scheduler, 20)
    core = sys.modules["vllm.v1.engine.core"].EngineCore()
    core.scheduler = scheduler
    limit = getattr(core, sys.modules["frontline_vllm_scheduler"].LIMIT)
    assert limit(3) is True
    scheduler.add_request(Request(FLEX))
    steps(scheduler, 1)
    assert scheduler.running == others, "those that run stay, and nobody joins them"
    urgent = Request(PRIORITY, tokens=5)
    scheduler.add_request(urgent)
    steps(scheduler, 1)
    assert urgent in scheduler.running and len(scheduler.running) == 3
    assert limit(50) is True and scheduler.max_num_active_reqs == 8, "never more than at its start"


def test_where_it_does_not_preempt_it_is_not_held(vllm):
    scheduler = make(options={"policy": "fcfs"})
    assert scheduler.frontline.limit(1) is False and scheduler.max_num_active_reqs == 2
