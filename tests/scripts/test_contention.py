import asyncio
import math
from itertools import pairwise

import orjson
import pytest
from aiohttp import web

from scripts.bench import contention
from scripts.bench.load import (
    Answer,
    Endpoint,
    Load,
    RefusedAddress,
    Workload,
    poisson_arrivals,
    regular_arrivals,
    require_loopback,
    retry_after,
)
from scripts.bench.report import cells, draw, markdown, write
from scripts.bench.summary import Row, goals_of, percentile, rows_of, tokens_in, total_change
from scripts.bench.trial import Plan, Trial, Window, run_trial

pytestmark = pytest.mark.unit

TIERS = {"priority": {"service_tier": "priority"}, "default": {"service_tier": "default"}}
WORKLOAD = Workload(prompt_words=4, tokens=3, spread=0.0)


# --- addresses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000/v1", "http://127.8.9.1/v1", "http://[::1]:1/v1",
            "http://localhost:8000/v1/openai"],
)  # fmt: skip
def test_loopback_addresses_are_accepted(url):
    require_loopback(url)


@pytest.mark.parametrize(
    "url", ["http://192.168.0.7:8000/v1", "https://api.example.com/v1", "http://0.0.0.0/v1",
            "http://127.0.0.1.example.com/v1", "http://localhost.example.com/v1", "not an address",
            "http://127.0.0.1@example.com/v1", ""],
)  # fmt: skip
def test_all_others_are_refused(url):
    with pytest.raises(RefusedAddress):
        require_loopback(url)


def test_the_command_refuses_them_unless_told_otherwise(monkeypatch):
    arguments = ["contention.py", "--base-url", "http://192.0.2.1/v1", "--model", "m"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit, match="not a loopback address"):
        contention.main()
    options = contention.parse([*arguments[1:], "--allow-remote"])
    with contention.running(options.base_url, options) as target:
        assert target.endpoints[0].base_url == "http://192.0.2.1/v1"


# --- what is sent and when ---------------------------------------------------------------------


def test_random_arrivals_have_their_rate_and_are_the_same_each_time():
    times = poisson_arrivals(rate=5, seconds=200)
    assert times == poisson_arrivals(rate=5, seconds=200) == sorted(times)
    assert times[0] > 0 and times[-1] < 200
    assert len(times) == pytest.approx(1000, rel=0.1)
    # Random, not regular: distances of an exponential distribution lie as far apart as their mean.
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.2)


def test_regular_arrivals():
    assert regular_arrivals(rate=2, seconds=2) == [0, 0.5, 1, 1.5]


def test_prompts_begin_differently_and_requests_are_the_same_each_time():
    prompts = [WORKLOAD.prompt("x", number) for number in range(200)]
    assert len({prompt.split()[0] for prompt in prompts}) == 200
    assert prompts == [WORKLOAD.prompt("x", number) for number in range(200)]
    varied = Workload(prompt_words=4, tokens=20, spread=0.5)
    lengths = [varied.length(number) for number in range(1000)]
    assert (min(lengths), max(lengths)) == (10, 30)
    assert sum(lengths) / 1000 == pytest.approx(20, rel=0.05)
    assert {WORKLOAD.length(number) for number in range(100)} == {3}


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"retry-after-ms": "250", "retry-after": "9"}, 0.25), ({"retry-after": "2"}, 2.0), ({}, 1.0),
     ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 1.0)],
)  # fmt: skip
def test_how_long_a_shed_request_waits(headers, seconds):
    assert retry_after(headers) == seconds


# --- what is made of it ------------------------------------------------------------------------


def test_percentiles():
    values = list(range(100, 0, -1))
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile([7.0], 0.99) == percentile([7.0], 0.5) == 7.0
    assert math.isnan(percentile([], 0.5))


def test_tokens_count_in_the_window_in_which_they_came():
    answers = [
        Answer("default", 0, first=1, ended=3, tokens=20),
        Answer("default", 0, first=9, ended=11, tokens=10),
        Answer("default", 0, first=5, ended=5, tokens=1),
        Answer("default", 0, error="HTTP 500", ended=5),
    ]
    assert tokens_in(answers, [Window(2, 10)]) == 10 + 5 + 1
    assert tokens_in(answers, [Window(0, 2), Window(2, 20)]) == 31


def made_up():
    """Ten seconds of each phase: priority has 0.1 s alone and 0.12 s under load."""
    trial = Trial("made up", dict, idle=Window(0, 10), together=Window(20, 30))
    trial.alone = [Window(10, 20), Window(30, 40)]
    for second in range(40):
        trial.answers.append(answer("default", second - 2, second + 0.1, second + 0.9, 10))
    for second in range(10):
        trial.answers.append(answer("priority", second, second + 0.1, second + 0.2, 2))
        trial.answers.append(answer("priority", 20 + second, 20.12 + second, 20.2 + second, 2))
    trial.sheds = [(5.0, "default"), (25.0, "default"), (26.0, "default")]
    return trial


def answer(tier, started, first, ended, tokens):
    return Answer(tier, started, first, ended, tokens, queue_s=0.01, served=tier)


def test_rows_of_made_up_answers():
    idle, alone, priority, default = rows_of(made_up())
    assert (idle.count, alone.count, priority.count, default.count) == (10, 20, 10, 10)
    assert idle.ttft_p50 == pytest.approx(0.1)
    assert priority.ttft_p99 == pytest.approx(0.12)
    assert default.ttft_p50 == pytest.approx(2.1)
    assert alone.requests_per_s == default.requests_per_s == 1.0
    assert alone.tokens_per_s == pytest.approx(10)
    assert (priority.sheds, default.sheds, alone.sheds) == (0, 2, 0)
    assert priority.served == {"priority": 10}
    assert default.queue_p99 == pytest.approx(0.01)
    assert total_change(rows_of(made_up())) == pytest.approx(0.2)


def test_a_failed_request_counts_as_failed_and_not_as_served():
    trial = made_up()
    trial.answers.append(Answer("priority", 22, ended=23, error="HTTP 500"))
    priority = rows_of(trial)[2]
    assert (priority.errors, priority.count, priority.requests_per_s) == (1, 10, 1.0)
    assert cells(priority)[-1] == "priority 10; 1 failed"


def row(phase, tier, p50, p99, tokens, sheds=0):
    return Row("e", phase, tier, 100, p50, p99, 0, 0, 1, tokens, sheds, {}, 0)


def rows(priority=(0.1, 0.13), default_tokens=100.0, sheds=0, default_p50=2.0):
    return [
        row("idle", "priority", 0.1, 0.1, 5),
        row("alone", "default", 2, 3, 100),
        row("together", "priority", priority[0], priority[1], 3, sheds),
        row("together", "default", default_p50, 3, default_tokens, 7),
    ]


def missed(measured, *, simulated=True):
    return [goal.what for goal in goals_of(measured, simulated=simulated) if not goal.met]


def test_goals_that_are_met():
    assert missed(rows()) == []
    assert missed(rows(priority=(0.2, 9)), simulated=False) == []
    assert missed(rows(default_tokens=95.1)) == []


@pytest.mark.parametrize(
    ("measured", "simulated", "goal"),
    [
        (rows(priority=(0.131, 0.13)), True, "TTFT p50"),
        (rows(priority=(0.1, 0.131)), True, "TTFT p99"),
        (rows(default_tokens=94), True, "throughput"),
        (rows(default_tokens=94), False, "throughput"),
        (rows(sheds=1), True, "shed"),
        (rows(priority=(0.21, 1)), False, "1/10"),
        # Nothing measured is nothing met.
        (rows(priority=(math.nan, math.nan)), False, "1/10"),
    ],
)
def test_goals_that_are_missed(measured, simulated, goal):
    [what] = missed(measured, simulated=simulated)
    assert goal in what


def test_results_are_written_and_drawn(tmp_path):
    trial = made_up()
    measured = rows_of(trial)
    goals = goals_of(measured, simulated=True)
    write(tmp_path / "r.json", {"engine": "none"}, [trial], measured, goals)
    results = orjson.loads((tmp_path / "r.json").read_bytes())
    assert [one["phase"] for one in results["rows"]] == ["idle", "alone", "together", "together"]
    assert results["trials"][0]["ttft_s"]["priority, saturated"] == [0.12] * 10
    assert markdown(measured).count("\n") == 5
    draw(tmp_path / "r.png", "made up", [trial])
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


# --- the whole of it, against a server that is none ----------------------------------------------


class Server:
    """Answers at once; sheds the first default request of each kind that it is told to."""

    def __init__(self):
        self.bodies, self.to_shed, self.url = [], 0, ""

    async def answer(self, request):
        body = await request.json()
        self.bodies.append(body)
        if self.to_shed and body["service_tier"] == "default":
            self.to_shed -= 1
            return web.json_response({}, status=429, headers={"retry-after-ms": "20"})
        headers = {"x-service-tier": body["service_tier"], "x-queue-time-ms": "1.5"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        await asyncio.sleep(0.005)
        for event in _events(body["max_tokens"]):
            await response.write(b"data: " + event + b"\n\n")
        return response


def _events(tokens):
    yield orjson.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    for _ in range(tokens):
        yield orjson.dumps({"choices": [{"delta": {"content": " a"}}]})
    yield orjson.dumps({"choices": [], "usage": {"completion_tokens": tokens}})
    yield b"[DONE]"


@pytest.fixture
async def server():
    server = Server()
    application = web.Application()
    application.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    yield server
    await runner.cleanup()


async def test_a_trial_from_warm_up_to_rows(server):
    server.to_shed = 0
    endpoint = Endpoint("it", server.url, "m", "none", TIERS)
    plan = Plan(4, 5, 0.3, 0.6, rate=20, share=0, regular=True, most=10_000)
    trial = await run_trial(endpoint, WORKLOAD, plan, lambda _: None)
    idle, alone, priority, default = rows_of(trial)
    assert idle.count == 5 and priority.count == 12
    assert priority.served == {"priority": 12}
    assert default.tokens_per_s > 0 and alone.requests_per_s > 0
    assert default.queue_p50 == 0.0015
    assert not any(one.errors or one.sheds for one in (idle, alone, priority, default))
    assert set(trial.efforts) == {"idle", "alone", "together", "alone again"}


async def test_a_shed_request_is_counted_and_sent_again(server):
    server.to_shed = 2
    load = Load(Endpoint("it", server.url, "m", "none", TIERS), WORKLOAD, most=10)
    answer = await load.ask("default", "x")
    await load.close()
    assert answer.sheds == len(load.sheds) == 2 and not answer.error
    assert answer.tokens == 3
    assert answer.ttft >= 0.04, "its waiting counts from the first attempt"
    assert server.bodies[0] == server.bodies[2]


async def test_a_server_that_does_not_answer_ends_the_run(server):
    endpoint = Endpoint("it", server.url + "/nowhere", "m", "none", TIERS)
    plan = Plan(1, 1, 0.1, 0.1, rate=1, share=0, regular=True, most=100)
    with pytest.raises(RuntimeError, match="HTTP 404"):
        await run_trial(endpoint, WORKLOAD, plan, lambda _: None)


async def test_no_more_requests_are_made_than_allowed(server):
    endpoint = Endpoint("it", server.url, "m", "none", TIERS)
    plan = Plan(2, 2, 0.2, 0.2, rate=5, share=0, regular=True, most=40)
    trial = await run_trial(endpoint, WORKLOAD, plan, lambda _: None)
    assert len(trial.answers) <= 40 and len(server.bodies) <= 40
