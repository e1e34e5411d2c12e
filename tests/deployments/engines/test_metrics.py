import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.contracts.traffic import Histogram
from deployments.engines.base import Launch
from deployments.engines.metrics import Role, engine_metrics, read_metrics
from deployments.engines.registry import ADAPTERS, adapter_named
from deployments.simulator.application import Application
from deployments.simulator.engine import Engine
from deployments.simulator.settings import DialectName, SimulatedSettings
from deployments.simulator.wire import prometheus

pytestmark = pytest.mark.unit

TEXT = """\
# HELP vllm:num_requests_running Number of requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="m"} 5.0
# TYPE vllm:num_preemptions_created gauge
vllm:num_preemptions_created{engine="0",model_name="m"} 1.7e+09
# TYPE vllm:request_queue_time_seconds histogram
vllm:request_queue_time_seconds_sum{engine="0",model_name="m"} 4.5
vllm:request_queue_time_seconds_bucket{engine="0",le="0.3",model_name="m"} 1.0
vllm:request_queue_time_seconds_bucket{engine="0",le="2.0",model_name="m"} 3.0
vllm:request_queue_time_seconds_bucket{engine="0",le="+Inf",model_name="m"} 4.0
vllm:request_queue_time_seconds_count{engine="0",model_name="m"} 4.0
# TYPE something:else gauge
something:else{broken 1
"""


def launch(**engine_args):
    return Launch("m", "m", "127.0.0.1", 1, 8, "key", "python", engine_args)


def test_an_engines_series_are_joined_and_the_rest_is_left_alone():
    _, wanted = adapter_named("vllm").relayed(launch())
    found = {one.metric.role: one.value for one in read_metrics(TEXT, wanted)}
    shown = {Role.RUNNING, Role.KV_USE, Role.PREEMPTIONS, Role.QUEUE_TIME}
    assert found.keys() - {Role.PROMPT_TOKENS, Role.CACHED_TOKENS} == shown
    assert (found[Role.RUNNING], found[Role.KV_USE], found[Role.PREEMPTIONS]) == (7, 0.75, 5)
    times = found[Role.QUEUE_TIME]
    assert isinstance(times, Histogram)
    assert (times.bounds, times.counts, times.total) == ((0.3, 2.0), [1, 2, 1], 4.5)


def test_a_counter_is_there_with_0_before_its_first_event():
    """SGLang's of suspended requests was missing until there was one, which was not counted."""
    wanted = adapter_named("sglang").metrics
    text = 'sglang:num_running_reqs{model_name="m"} 0.0\n'
    found = {one.metric.role: one.value for one in read_metrics(text, wanted)}
    counters = (Role.PREEMPTIONS, Role.PROMPT_TOKENS, Role.CACHED_TOKENS)
    assert found == {Role.RUNNING: 0, **dict.fromkeys(counters, 0)}
    assert list(read_metrics("something_else 1\n", wanted)) == []


@given(st.lists(st.floats(0, 100), max_size=30))
def test_a_histogram_is_read_as_it_was(values):
    histogram = Histogram((0.1, 1.0, 10.0))
    for value in values:
        histogram.add(value)
    text = prometheus({"e:x": ("histogram", histogram)}, 'model_name="m"').decode()
    [one] = read_metrics(text, engine_metrics({Role.TTFT: "e:x"}))
    assert isinstance(one.value, Histogram)
    assert (one.value.counts, one.value.total) == (histogram.counts, histogram.total)


@pytest.mark.parametrize("dialect", DialectName)
async def test_a_simulated_engine_shows_all_that_is_relayed_of_its_dialect(dialect):
    path, wanted = adapter_named("simulated").relayed(launch(dialect=dialect.value))
    assert wanted
    engine = Engine(SimulatedSettings(dialect=dialect, slots=4), asyncio.get_running_loop())
    text = Application(engine, "m", "m", "key").metrics()[path].decode()
    assert [one.metric for one in read_metrics(text, wanted)] == list(wanted)


def test_ray_gets_no_colon_and_names_stay_distinct():
    names = [metric.relayed.name for name in ADAPTERS for metric in adapter_named(name).metrics]
    assert not any(":" in name for name in names)
    assert len(set(names)) == len(names)
