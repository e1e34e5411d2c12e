"""The scheduler inside vLLM, over a stand-in that has what it uses of vLLM's own."""

import heapq
import importlib
import logging
import sys
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
        self.status = SimpleNamespace(name="WAITING")
        self.resumable, self.lora_request, self.structured_output_request = False, None, None
        self.sampling_params = SimpleNamespace(prompt_logprobs=None)
        self.__dict__.update(more)

    @property
    def num_tokens(self):
        return self.num_prompt_tokens + self.num_output_tokens

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
    """vLLM's order of the waiting. Each step, a running request generates a token."""

    def __init__(self, *, vllm_config, blocks=1000):
        self.scheduler_config = vllm_config.scheduler_config
        self.running, self.waiting, self.kv_holding_waiting = [], Queue(), Queue()
        self.max_num_active_reqs = self.scheduler_config.max_num_seqs
        self.max_num_scheduled_tokens, self.max_model_len = 2048, 4096
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
        while (
            self.waiting and len(self.running) < self.max_num_active_reqs and not throttle_prefills
        ):
            need = -(-self.waiting[0].num_tokens // BLOCK)
            if need > self.kv_cache_manager.free:
                break
            request = heapq.heappop(self.waiting)
            self.kv_cache_manager.held[request.request_id] = need
            request.status = SimpleNamespace(name="RUNNING")
            self.running.append(request)
        self.prev_step_scheduled_req_ids = {one.request_id for one in self.running}
        for request in list(self.running):
            request.num_output_tokens += 1
            if request.num_output_tokens == request.max_tokens:
                request.status = SimpleNamespace(name="FINISHED_LENGTH_CAPPED")
                self.running.remove(request)
                del self.kv_cache_manager.held[request.request_id]
        return list(self.running)

    def _preempt_request(self, request, timestamp, drop_stale_output=False):
        assert request.status.name == "RUNNING" and request not in self.running
        del self.kv_cache_manager.held[request.request_id]
        request.status = SimpleNamespace(name="PREEMPTED")
        request.num_preemptions += 1
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
    assert scheduler.report_preemption()["suspended"] == 1
    steps(scheduler, 200)
    assert [one.num_output_tokens for one in (first, last, urgent)] == [100, 100, 5]
    assert scheduler.report_preemption() == {
        "preempts": True,
        "why_not": None,
        "preemptions": 1,
        "suspended": 0,
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
    assert bool(scheduler.victims_now()) is makes_room


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
    steps(scheduler, 2)
    scheduler.add_request(Request(PRIORITY))
    assert scheduler.victims_now() == []


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
    scheduler.make_room()
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
    for _ in range(scheduler.rules.most_preemptions):
        steps(scheduler, 1)
        scheduler.running.remove(flex)
        # private: vLLM's own, with which it preempts where blocks are short.
        scheduler._preempt_request(flex, 0.0)  # noqa: SLF001
    steps(scheduler, scheduler.rules.tokens_between)
    scheduler.add_request(Request(PRIORITY))
    steps(scheduler, 1)
    assert scheduler.running == [flex]


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
    assert words in scheduler.report_preemption()["why_not"]
    assert scheduler.report_preemption()["preempts"] is False
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
    assert scheduler.report_preemption()["preempts"] is False
    assert sum(line.levelname == "ERROR" for line in caplog.records) == 1


def test_the_engine_core_answers_with_the_report_of_its_scheduler(vllm):
    scheduler = make()
    core = sys.modules["vllm.v1.engine.core"].EngineCore()
    core.scheduler = scheduler
    method = sys.modules["frontline_vllm_scheduler"].REPORT
    assert getattr(core, method)() == scheduler.report_preemption()
