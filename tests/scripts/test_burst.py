import asyncio
import math
import statistics
from dataclasses import replace

import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from scripts.bench import burst_modes, burst_report, contention, fill, priority_peers, targets
from scripts.bench.burst import BurstPlan, BurstTrial, Contender, counted, run_bursts
from scripts.bench.burst_summary import (
    HEADROOM,
    PREEMPTION,
    BurstRow,
    goals_of,
    is_whole,
    longest_pause,
    met_by_bursts,
    row_of,
    taken,
    tokens_per_s,
    ttfts,
)
from scripts.bench.load import Answer, Endpoint, Workload
from scripts.bench.trial import Window

pytestmark = pytest.mark.unit

WORKLOAD = Workload(prompt_words=4, tokens=10, spread=0.0)
PLAN = BurstPlan(
    clients=2, flex_clients=1, size=3, slots=4, tokens=2, idle_bursts=1, bursts=2, every_s=0.0,
    alone_s=0.1, rounds=2, most=10_000,
)  # fmt: skip


# --- what is made of it ------------------------------------------------------------------------


def default(first, ended, moments, tokens=10, asked=10, error=""):
    return Answer("default", first - 1, first, ended, tokens, asked, moments, error=error)


def test_tokens_count_when_they_came():
    # Ten tokens in five events: four before a pause of eight seconds, one after.
    paused = default(1, 10, [1, 1.2, 1.4, 1.6, 10])
    assert tokens_per_s([paused], [Window(1, 3)]) == pytest.approx(8 / 2)
    assert tokens_per_s([paused], [Window(3, 9)]) == 0
    assert tokens_per_s([paused], [Window(1, 3), Window(9, 11)]) == pytest.approx(10 / 4)


def test_tokens_of_an_answer_that_was_aborted_count_too():
    aborted = default(2, 3, [2, 2.5], tokens=0, error="aborted")
    assert tokens_per_s([default(1, 2, [1, 1.1]), aborted], [Window(2, 3)]) == pytest.approx(10)


@pytest.mark.parametrize("answers", [[], [default(1, 2, [1], error="HTTP 500")]])
def test_no_tokens_are_known_without_a_whole_answer(answers):
    assert math.isnan(tokens_per_s(answers, [Window(0, 3)]))


def test_a_burst_meets_those_that_run_when_it_is_sent():
    before, running, after = default(1, 2, []), default(2, 5, []), default(4, 6, [])
    waiting = default(0, 0, [])
    priority = Answer("priority", 1, 2, 5, 10, 10)
    answers = [before, running, after, waiting, priority]
    assert met_by_bursts(answers, [3]) == [running]
    assert met_by_bursts(answers, [1.5, 3, 4.5]) == [before, running, after]


@pytest.mark.parametrize(
    ("changed", "whole"),
    [({}, True), ({"tokens": 9}, False), ({"tokens": 11}, False), ({"error": "x"}, False)],
)
def test_a_whole_answer_has_just_the_tokens_that_were_asked_for(changed, whole):
    assert is_whole(replace(default(1, 2, []), **changed)) is whole


def test_the_longest_pause():
    assert longest_pause(default(1, 9, [1, 2, 7, 9])) == 5
    assert longest_pause(default(1, 1, [1])) == 0


def test_a_row_of_made_up_answers():
    trial = BurstTrial("it", idle=[Window(0, 2)], alone=[Window(10, 20)], bursts=[Window(20, 30)])
    trial.starts, trial.preemptions = [21.0], 1.0
    trial.answers = [
        Answer("priority", 1, 1.1, 2, 4, 4, [1.1, 2]),
        Answer("priority", 21, 21.2, 22, 4, 4, [21.2, 22], sheds=1, served="default"),
        default(10, 20, [float(second) for second in range(10, 20)]),
        default(20, 29, [20.0, 20.5, 26, 27, 28, 29]),
        default(20, 23, [20.0, 20.2], tokens=1),
        default(0, 0, [], error="HTTP 500"),
    ]
    row = row_of(trial)
    assert row.idle_p99 == pytest.approx(0.1)
    assert row.ttft_p50 == pytest.approx(0.2)
    assert (row.count, row.met, row.whole, row.errors, row.sheds) == (1, 2, 1, 1, 1)
    assert (row.longest_pause, row.lowered) == (5.5, 1)
    assert row.default_alone == pytest.approx(21 / 18)
    assert row.all_with > row.default_with
    # A burst takes the idle engine one second, and there is one in ten seconds.
    assert row.taken == pytest.approx(0.1)
    assert row.lost == pytest.approx(0.9 - row.default_with / row.default_alone)


@given(
    lengths=st.lists(st.floats(0.1, 9), min_size=1, max_size=5),
    size=st.integers(1, 4),
    bursts=st.integers(0, 4),
    share=st.floats(0.1, 1),
)
def test_bursts_take_the_time_that_they_take_on_the_idle_engine(lengths, size, bursts, share):
    trial = BurstTrial("it", bursts=[Window(100, 150), Window(200, 250)], share=share)
    trial.starts = [100.0] * bursts
    now = 0.0
    for length in lengths:
        for number in range(size):
            sent = now + 0.01 * number
            trial.answers.append(Answer("priority", sent, sent + 0.05, now + length))
        now += length + 0.2
    trial.idle = [Window(0, now)]
    trial.answers.append(Answer("priority", 101, 101.1, 140))
    assert taken(trial) == pytest.approx(share * bursts * statistics.median(lengths) / 100)
    trial.idle = []
    assert math.isnan(taken(trial))


def row(name=PREEMPTION, **changed):
    given = BurstRow(
        endpoint=name, idle_p50=0.1, idle_p99=0.1, count=32, ttft_p50=0.1, ttft_p99=0.1,
        default_alone=110, default_with=80, all_alone=110, all_with=110, taken=0.25, met=9, whole=9,
        longest_pause=1, preemptions=8, errors=0, sheds=0, lowered=0,
    )  # fmt: skip
    return replace(given, **changed)


def missed(ours, *, simulated=False, peer_p99=0.6):
    others = [row(HEADROOM, default_alone=100, ttft_p99=0.2), row("engine", ttft_p99=peer_p99)]
    return [goal.what for goal in goals_of([ours, *others], simulated=simulated) if not goal.met]


def test_goals_that_are_met():
    assert missed(row()) == []
    assert missed(row(ttft_p99=0.2), peer_p99=1.0) == []
    assert missed(row(ttft_p99=0.1299), simulated=True, peer_p99=1.0) == []


@pytest.mark.parametrize(
    ("changed", "simulated", "goal"),
    [
        ({"ttft_p99": 0.201}, False, "on the idle engine"),
        ({"ttft_p99": 0.131}, True, "on the idle engine"),
        ({"default_with": 79}, False, "beyond what priority takes"),
        ({"taken": 0.24}, False, "beyond what priority takes"),
        ({"default_alone": 107}, False, "than with headroom"),
        ({"whole": 8}, False, "is whole"),
        ({"met": 0, "whole": 0}, False, "is whole"),
        # Nothing measured is nothing met.
        ({"default_with": math.nan}, False, "beyond what priority takes"),
    ],
)
def test_goals_that_are_missed(changed, simulated, goal):
    [what] = missed(row(**changed), simulated=simulated, peer_p99=9)
    assert goal in what


def test_headroom_is_no_peer():
    assert missed(row(), peer_p99=0.49) == ["burst TTFT p99 at most 1/5 of the best peer's"]
    assert goals_of([row(HEADROOM)], simulated=False) == []


@pytest.mark.parametrize(
    ("metrics", "count"),
    [
        ('vllm:num_preemptions_total{engine="0"} 3.0\nvllm:num_preemptions_created{} 1.7e9\n', 3),
        ("vllm:num_preemptions_total{a} 3.0\nvllm:num_preemptions_total{b} 4.0\n", 7),
        ("# HELP vllm:num_preemptions_total of it\nvllm:other 2\n", None),
        ("", None),
    ],
)
def test_preemptions_are_counted_by_the_engines_own_metrics(metrics, count):
    assert counted(metrics) == count


def test_results_are_written_and_drawn(tmp_path):
    trial = BurstTrial("it", idle=[Window(0, 2)], bursts=[Window(2, 4)])
    trial.answers = [Answer("priority", 1, 1.1, 2, 4, 4), Answer("priority", 3, 3.2, 4, 4, 4)]
    rows = [row(preemptions=None), row_of(trial)]
    goals = goals_of(rows, simulated=True)
    burst_report.write(tmp_path / "r.json", {"engine": "none"}, [trial], rows, goals)
    results = orjson.loads((tmp_path / "r.json").read_bytes())
    assert results["rows"][1]["default_alone"] is None
    assert results["trials"][0]["ttft_s"] == {"idle": [0.1], "saturated": [0.2]}
    text = burst_report.markdown(rows)
    assert {line.count("|") for line in text.splitlines()} == {len(rows) + 2}
    assert len(text.splitlines()) == 2 + burst_report.table(rows).row_count
    assert burst_report.table(rows).row_count == 18
    assert burst_report.goals_markdown(goals).count("\n") == len(goals) + 1
    for name in ("r.svg", "again.svg"):
        burst_report.draw(tmp_path / name, "made up", [trial])
    drawn = (tmp_path / "r.svg").read_text()
    assert "<svg" in drawn and drawn == (tmp_path / "again.svg").read_text()


# --- what is measured --------------------------------------------------------------------------


def test_an_application_without_preemption_is_one_of_its_own():
    args = {"id": "org/m", "aliases": ["m"], "pools": [{"name": "p"}]}
    app = {"name": "m", "args": args}
    plain = targets.without_preemption(app)
    assert plain["name"] == "m-plain" and plain["args"]["id"] == "org/m-plain"
    assert plain["args"]["aliases"] == ["m-plain"]
    assert plain["args"]["pools"] == [{"name": "p", "preemption": False}]
    assert args["pools"] == [{"name": "p"}]


def test_each_peer_is_told_the_tier_in_its_own_way(tmp_path):
    engine = Endpoint("e", "http://127.0.0.1:7/v1", "m", "secret", targets.ENGINE_TIERS)
    behind = priority_peers.Behind(engine, slots=8)
    commands, endpoints = {}, {}
    for peer in priority_peers.PEERS:
        commands[peer.name] = peer.command(tmp_path, 99, behind, tmp_path)
        endpoints[peer.name] = priority_peers.at_port(peer.endpoint(engine), 99)
    assert endpoints["smg"].headers["priority"] == {"x-smg-priority": "interactive"}
    assert endpoints["smg"].tiers == targets.ENGINE_TIERS
    ranks = [endpoints["litellm"].tiers[t]["priority"] for t in ("priority", "default", "flex")]
    assert ranks == sorted(set(ranks)) and ranks[0] >= 0, "lower goes first, none is negative"
    assert {one.base_url for one in endpoints.values()} == {"http://127.0.0.1:99/v1"}
    assert "--priority-scheduler-enabled" in commands["smg"]
    assert "--worker-urls" not in commands["smg"], "it is told of its worker with its slots"
    assert "secret" not in commands["litellm"]


@pytest.mark.parametrize("target", ["simulated", "vllm"])
def test_a_burst_is_as_large_as_the_engine_unless_told_otherwise(target):
    options = contention.parse(["--mode", "burst", "--target", target])
    assert burst_modes.plan_of(options, 8).size == 8
    assert burst_modes.plan_of(options, 8).clients >= 2 * 8
    options = contention.parse(["--mode", "burst", "--target", target, "--burst-size", "3"])
    assert burst_modes.plan_of(options, 8).size == 3


def test_the_pool_of_gpu_check_has_bursts(tmp_path):
    options = contention.parse(["--pool", str(tmp_path / "pool.json"), "--clients", "24"])
    assert (options.mode, options.target) == ("burst", "pool")
    assert burst_modes.plan_of(options, 8).size == 8
    assert burst_modes.plan_of(options, 8).bursts > 0


def test_a_burst_on_a_server_that_runs_already_has_a_size(capsys):
    with pytest.raises(SystemExit):
        contention.parse(["--mode", "burst", "--base-url", "http://127.0.0.1:1/v1"])
    assert "--burst-size" in capsys.readouterr().err


# --- the whole of it, against a server that is none ----------------------------------------------


class Server:
    """Answers at a pace, and says that it has preempted once more each time it is asked."""

    def __init__(self):
        self.running, self.most, self.bodies, self.preempted = 0, 0, [], 0
        self.headers, self.url, self.fails = [], "", False

    async def metrics(self, request):
        assert request.headers["authorization"] == "Bearer secret"
        self.preempted += 1
        return web.Response(text=f"vllm:num_preemptions_total {self.preempted}.0\n")

    async def answer(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(request.headers.get("x-class"))
        if self.fails:
            return web.json_response({}, status=500)
        priority = body["service_tier"] == "priority"
        self.running += priority
        self.most = max(self.most, self.running)
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            for _ in range(body["max_tokens"]):
                await asyncio.sleep(0.01)
                await response.write(b'data: {"choices":[{"delta":{"content":" a"}}]}\n\n')
            usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}
            await response.write(b"data: " + orjson.dumps(usage) + b"\n\ndata: [DONE]\n\n")
        finally:
            self.running -= priority
        return response


@pytest.fixture
async def server():
    server = Server()
    application = web.Application()
    application.router.add_post("/v1/chat/completions", server.answer)
    application.router.add_get("/metrics", server.metrics)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


def contender(server, name, **more):
    endpoint = Endpoint(
        name, f"{server.url}/v1", "m", "none", targets.FRONTLINE_TIERS, {},
        {"priority": {"x-class": "best"}},
    )  # fmt: skip
    return Contender(endpoint, **more)


async def test_turns_from_warm_up_to_rows(server):
    known = contender(server, PREEMPTION, engine_url=server.url, engine_key="secret")
    said = []
    trials = await run_bursts(
        [contender(server, "other"), known], WORKLOAD, PLAN, said.append, dict
    )
    other, ours = map(row_of, trials)
    assert other.preemptions is None and ours.preemptions == PLAN.rounds
    for one, trial in zip((other, ours), trials, strict=True):
        assert one.count == PLAN.rounds * PLAN.bursts * PLAN.size
        assert len(ttfts(trial, trial.idle)) == PLAN.rounds * PLAN.idle_bursts * PLAN.size
        assert one.met == one.whole > 0 and one.errors == 0
        assert one.all_alone > one.default_alone > 0, "flex is in it"
        assert len(trial.alone) == 2 * PLAN.rounds
        assert {answer.asked for answer in trial.answers} == {PLAN.tokens, WORKLOAD.tokens}
    assert server.most == PLAN.size, "all of a burst at once, and of one endpoint at a time"
    assert server.headers.count("best") == sum(
        b["service_tier"] == "priority" for b in server.bodies
    )
    order = [line.split(":")[0] for line in said if "idle engine" in line]
    assert order == ["other", PREEMPTION, PREEMPTION, "other"]


async def test_a_server_that_does_not_answer_ends_the_run(server):
    server.fails = True
    with pytest.raises(RuntimeError, match="it does not answer: HTTP 500"):
        await run_bursts([contender(server, "it")], WORKLOAD, PLAN, lambda _: None)


async def test_flex_fills_what_the_others_leave(server):
    trials = await fill.run_fill([contender(server, "it")], WORKLOAD, 4, 0.3, lambda _: None)
    rows = [row for trial in trials for row in fill.rows_of(trial)]
    assert [(row.tier, row.phase) for row in rows] == [
        ("priority", fill.WITHOUT), ("priority", fill.WITH), ("default", fill.WITHOUT),
        ("default", fill.WITH), ("flex", fill.FLEX), ("flex", fill.WITH),
    ]  # fmt: skip
    assert all(row.count and row.tokens_per_s > 0 for row in rows)
