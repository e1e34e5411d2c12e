"""The simulation of engines that batch continuously, and the traffic that it is given."""

import json
from dataclasses import replace

import numpy as np
import pytest

from app.config.queue import QueueSettings
from scripts.bench import autoscale_hours
from scripts.bench.autoscale_traces import IDEAL, OURS, SERVE, Case, cases, goals, play, table
from scripts.bench.batching import Cluster, Simulation
from scripts.bench.engine_model import (
    PUBLISHED,
    VLLM_CPU,
    VLLM_CPU_HELD_BACK,
    EngineModel,
    errors,
    fit,
)
from scripts.bench.policies import Fixed
from scripts.bench.rivals import Hpa
from scripts.bench.trace_files import read_azure, read_servegen
from scripts.bench.traffic import draw_fluid, draw_requests, multiply
from tests.scripts.test_trace_files import servegen

pytestmark = pytest.mark.unit

# A step of 100 ms whatever runs, and nothing else.
EVEN = EngineModel(base_s=0.1, token_s=0.0, kv_s=0.0, slots=2, chunk=100)


def run(arrivals, replicas=1, engine=EVEN, seconds=60.0, preempts=True):
    cluster = Cluster(engine, 5.0, replicas, 4, 1.0, preempts)
    policy = Fixed(replicas)
    return Simulation(cluster, policy, QueueSettings()).run(iter(arrivals), seconds)


def test_the_engine_model_is_within_a_fifth_of_what_is_published():
    model = fit(PUBLISHED)
    assert max(map(abs, errors(model, PUBLISHED))) < 0.2
    # Batches of 64 are within a seventh.
    assert max(map(abs, errors(model, PUBLISHED)[:4])) < 0.15
    assert model.base_s > 0 and model.token_s > 0 and model.kv_s > 0


def test_the_engine_model_fits_vllm_on_a_cpu_too():
    model = fit(VLLM_CPU, slots=8)
    assert max(map(abs, errors(model, VLLM_CPU))) < 0.1
    assert max(map(abs, errors(model, VLLM_CPU_HELD_BACK))) < 0.2


def test_an_answer_takes_its_prompt_and_then_a_step_for_each_token():
    served = run([(1.0, 1, 200.0, 10.0, 200.0, 1.0)])
    [(_, ttft, idle, _)] = served.first[1]
    assert ttft == pytest.approx(0.2) == pytest.approx(idle)
    [(_, took, _)] = served.ended[1]
    assert took == pytest.approx(1.2)
    assert served.tokens == 210


def test_a_larger_batch_is_slower():
    engine = EngineModel(base_s=0.1, token_s=0.1, kv_s=0.0, slots=4, chunk=1)
    alone = run([(1.0, 1, 1.0, 10.0, 0.0, 1.0)], engine=engine).ended[1][0][1]
    both = run([(1.0, 1, 1.0, 10.0, 0.0, 1.0)] * 2, engine=engine).ended[1][0][1]
    assert both > 1.3 * alone


def test_priority_suspends_the_newest_of_the_lowest_tier_and_it_goes_on_later():
    lower = [(1.0, 1, 100.0, 50.0, 100.0, 1.0), (1.1, 2, 100.0, 50.0, 100.0, 1.0)]
    served = run([*lower, (2.0, 0, 100.0, 10.0, 100.0, 1.0)])
    assert served.first[0][0][1] == pytest.approx(0.1)
    assert served.preempted == 1
    [(_, default_s, _)], [(_, flex_s, _)] = served.ended[1], served.ended[2]
    assert default_s == pytest.approx(5.1)
    assert flex_s > 5.1 + 1.0
    assert served.tokens == 150 + 150 + 110, "what was suspended counts once"


def test_without_preemption_priority_waits_for_a_slot():
    lower = [(1.0, 1, 100.0, 50.0, 100.0, 1.0)] * 2
    served = run([*lower, (2.0, 0, 100.0, 10.0, 100.0, 1.0)], preempts=False)
    assert served.preempted == 0
    # One of the two slots is headroom, so the second of them waits instead.
    assert served.waits[0][0][1] == 0
    assert served.waits[1][1][1] > 4


def test_a_cohort_is_served_in_parts_and_nothing_of_it_is_lost():
    served = run([(1.0, 1, 100.0, 10.0, 100.0, 7.0)])
    assert sum(weight for _, _, weight in served.waits[1]) == pytest.approx(7)
    assert sum(weight for _, _, weight in served.ended[1]) == pytest.approx(7)
    assert max(wait for _, wait, _ in served.waits[1]) > 3


def test_a_full_queue_sheds_flex_first():
    served = run([(1.0, 2, 100.0, 900.0, 100.0, 100.0), (2.0, 1, 100.0, 900.0, 100.0, 50.0)])
    shed = [sum(w for _, took, w in tier if np.isinf(took)) for tier in served.ended]
    assert shed[2] > 0
    assert shed[0] == shed[1] == 0


def test_the_autoscaler_of_kubernetes_scales_on_the_queue_and_on_utilisation():
    policy = Hpa(slots=2)
    cluster = Cluster(EVEN, 5.0, 1, 4, 1.0)
    arrivals = [(1.0, 1, 100.0, 600.0, 100.0, 6.0)]
    served = Simulation(cluster, policy, QueueSettings()).run(iter(arrivals), 900.0)
    targets = [target for _, _, target in served.history]
    assert max(targets) == 4
    assert targets[-1] == 1, "five minutes after it was needed last"


@pytest.fixture
def data(tmp_path):
    random = np.random.default_rng(1)
    at = np.cumsum(random.exponential(1.0, 300))
    for name in ("code", "conv"):
        lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
        lines += [f"2023-11-16 18:{int(t // 60):02}:{t % 60:010.7f},{100 + i % 900},{1 + i % 60}"
                  for i, t in enumerate(at)]  # fmt: skip
        (tmp_path / f"AzureLLMInferenceTrace_{name}.csv").write_text("\n".join(lines))
    rates = [(2.0, 1.0), (4.0, 2.0), (3.0, 1.5)]
    servegen(tmp_path, 0, rates, ({100: 0.5, 200: 0.5}, {10: 0.5, 30: 0.5}))
    servegen(tmp_path, 1, [(cv, rate) for rate, cv in rates], ({300: 1.0}, {20: 1.0}))
    return tmp_path


@pytest.mark.parametrize("replicas", [1, 20])
def test_a_trace_is_scaled_to_the_fleet(data, replicas):
    engine = fit(PUBLISHED)
    requests = read_azure(data / "AzureLLMInferenceTrace_conv.csv")
    traffic = multiply("conv", requests, engine, replicas)
    assert traffic.work.sum() / traffic.seconds == pytest.approx(replicas, rel=0.02)
    assert (np.diff(traffic.columns[:, 0]) >= 0).all()
    assert set(traffic.columns[:, 1]) == {0, 1, 2}


def test_a_fluid_and_its_requests_bring_the_same_work(data):
    engine, clients = fit(PUBLISHED), read_servegen(data)
    single = draw_requests(clients, engine, 1, 0, 3)
    fluid = draw_fluid(clients, engine, 1, 60.0)
    assert single.work.sum() == pytest.approx(1800, rel=0.05)
    assert fluid.work.sum() == pytest.approx(1800, rel=0.05)
    for rank in range(3):
        ours, theirs = (t.work[t.columns[:, 1] == rank].sum() for t in (single, fluid))
        assert ours == pytest.approx(theirs, rel=0.1)


def test_cohorts_bring_as_many_requests_as_single_ones_and_as_irregularly(data):
    engine, clients = fit(PUBLISHED), read_servegen(data)[:1]
    minutes = []
    for cohort in (1, 10):
        drawn = [draw_requests(clients, engine, 2, 0, 1, seed, cohort) for seed in range(20)]
        assert all(set(traffic.columns[:, 5]) == {float(cohort)} for traffic in drawn)
        counts = [np.bincount((t.columns[:, 0] / 60).astype(int), t.columns[:, 5]) for t in drawn]
        minutes.append(np.concatenate(counts))
    single, together = minutes
    assert together.mean() == pytest.approx(single.mean(), rel=0.02)
    assert together.std() == pytest.approx(single.std(), rel=0.25)


def test_an_hour_by_request_and_as_a_fluid(data):
    both = autoscale_hours.cases(data, [1], [30.0], [0], cohort=8)
    assert [case.windows for case in both] == [(0, 6), (0, 6)]
    ten_minutes = [replace(case, windows=(0, 1)) for case in both]
    rows = [row for case in ten_minutes for row in play(case, [OURS, IDEAL])]
    single, fluid = rows[1], rows[3]
    assert fluid.replica_hours == pytest.approx(single.replica_hours, rel=0.1)
    lines = autoscale_hours.table(rows).splitlines()
    assert [line.split(" | ")[2] for line in lines[2:]] == [OURS, IDEAL]


def test_a_short_run_of_every_kind_of_trace(data):
    rows = []
    for trace in ("azure", "servegen"):
        [case, *_] = cases(trace, data, [2], [30.0])
        rows += play(case, [SERVE, "KEDA", OURS, IDEAL], split=trace == "servegen")
    whole = [row for row in rows if row.part == "all"]
    assert len(whole) == 8
    assert all(0 <= row.on_time <= 1 and row.replica_hours > 0 for row in rows)
    assert len(table(whole).splitlines()) == 2 + 8
    assert len(goals(whole).splitlines()) == 2 + 2
    json.dumps([vars(row) for row in rows])


def test_a_folder_without_the_trace_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="conversation_trace"):
        play(Case("mooncake", tmp_path, 1, 30.0), [SERVE])
