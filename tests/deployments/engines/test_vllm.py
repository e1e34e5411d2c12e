from dataclasses import replace

import pytest

from app.contracts.status import Preempted
from app.core.dialect import (
    AUDIO_ROUTES,
    GENERATING_ROUTES,
    MESSAGES_ROUTES,
    OPENAI_ROUTES,
    TOKEN_ROUTES,
    Route,
)
from app.core.settings import SettingsError
from app.core.tiers import Tier
from deployments.engines.base import EngineContractError, Launch, NodeSpan, PreemptionReport
from deployments.engines.lora import LoraAdapter, LoraRoom
from deployments.engines.vllm import Vllm

pytestmark = pytest.mark.unit


def launch(**engine_args):
    return Launch(
        model="/models/m",
        served_name="org/m",
        host="127.0.0.1",
        port=1234,
        slots=16,
        key="secret",
        python="/env/bin/python",
        engine_args=engine_args,
    )


def flag(command, name):
    return command[command.index(name) + 1]


def test_the_command_line():
    command = Vllm().command(launch(max_model_len=4096, enforce_eager=True, seed=None))
    assert command[:3] == ["/env/bin/python", "-m", "frontline_vllm_start"]
    assert flag(command, "--host") == "127.0.0.1"
    assert flag(command, "--port") == "1234"
    assert flag(command, "--served-model-name") == "org/m"
    assert flag(command, "--max-num-seqs") == "16"
    assert flag(command, "--scheduling-policy") == "priority"
    assert flag(command, "--max-model-len") == "4096"
    assert "--enforce-eager" in command and "--seed" not in command


@pytest.mark.parametrize(
    ("ranks", "expected"), [([4], "8"), ([8, 16, 9], "16"), ([None, 33], "64"), ([None], None)]
)
def test_adapters_are_loaded_by_name_with_room_for_their_rank(ranks, expected):
    adapters = tuple(LoraAdapter(f"a/{n}", f"/loras/{n}", rank) for n, rank in enumerate(ranks))
    command = Vllm().command(replace(launch(), loras=adapters))
    assert "--enable-lora" in command
    at = command.index("--lora-modules") + 1
    count = len(ranks)
    assert command[at : at + count] == [f"a/{n}=/loras/{n}" for n in range(count)]
    assert flag(command, "--max-loras") == flag(command, "--max-cpu-loras") == str(count)
    assert ("--max-lora-rank" in command) == (expected is not None)
    assert expected is None or flag(command, "--max-lora-rank") == expected


def test_without_adapters_there_is_nothing_about_them():
    assert not [word for word in Vllm().command(launch()) if "lora" in word]


def test_not_all_of_many_adapters_are_on_the_gpu():
    adapters = tuple(LoraAdapter(str(n), f"/loras/{n}") for n in range(30))
    command = Vllm().command(replace(launch(), loras=adapters))
    assert (flag(command, "--max-loras"), flag(command, "--max-cpu-loras")) == ("8", "30")
    fewer = Vllm().command(replace(launch(max_loras=2), loras=adapters))
    assert flag(fewer, "--max-loras") == "2"


def test_room_for_later_adapters_is_reserved_at_the_start():
    room = LoraRoom(count=3, rank=20)
    command = Vllm().command(replace(launch(), lora_room=room))
    assert "--enable-lora" in command and "--lora-modules" not in command
    assert flag(command, "--max-loras") == flag(command, "--max-cpu-loras") == "3"
    assert flag(command, "--max-lora-rank") == "32"
    first = (LoraAdapter("a", "/a", 64), LoraAdapter("b", "/b"))
    command = Vllm().command(replace(launch(), loras=first, lora_room=room))
    assert (flag(command, "--max-loras"), flag(command, "--max-lora-rank")) == ("5", "64")


def test_the_routes_that_change_adapters_are_there_only_with_room_for_some():
    name = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
    assert name not in Vllm().environment(replace(launch(), loras=(LoraAdapter("a", "/a"),)))
    assert Vllm().environment(replace(launch(), lora_room=LoraRoom(1, 8)))[name] == "True"
    assert name in Vllm.reserved_environment, "a pool cannot open them by itself"


SPAN = NodeSpan(nodes=2, rank=0, here="10.0.0.1", address="10.0.0.1", port=2345)


def test_an_engine_on_several_nodes():
    first = replace(launch(tensor_parallel_size=16), span=SPAN)
    command = Vllm().command(first)
    assert (flag(command, "--nnodes"), flag(command, "--node-rank")) == ("2", "0")
    assert (flag(command, "--master-addr"), flag(command, "--master-port")) == ("10.0.0.1", "2345")
    assert "--middleware" in command and "--headless" not in command
    assert Vllm().environment(first)["VLLM_HOST_IP"] == "10.0.0.1"
    assert "VLLM_HOST_IP" not in Vllm().environment(launch())


def test_the_other_part_of_such_an_engine_has_no_server():
    other = replace(launch(), span=replace(SPAN, rank=1, here="10.0.0.2"))
    command = Vllm().command(other)
    assert command[1:4] == ["-m", "frontline_vllm_headless", "serve"]
    assert flag(command, "--node-rank") == "1" and "--headless" in command
    assert flag(command, "--master-addr") == "10.0.0.1" and "--middleware" not in command
    assert Vllm().environment(other)["VLLM_HOST_IP"] == "10.0.0.2"


def test_an_operators_arguments_win_over_defaults():
    command = Vllm().command(launch(scheduling_policy="fcfs", max_num_seqs=3))
    assert flag(command, "--scheduling-policy") == "fcfs"
    assert flag(command, "--max-num-seqs") == "3"


@pytest.mark.parametrize(
    "name",
    [
        "host",
        "port",
        "uds",
        "api_key",
        "served_model_name",
        "model",
        "nnodes",
        "headless",
        "lora_modules",
    ],
)
def test_what_would_open_the_engine_is_refused(name):
    with pytest.raises(SettingsError, match=f"engine_args.{name}"):
        Vllm().command(launch(**{name: "x"}))


def test_the_key_is_not_on_the_command_line_and_the_guard_is_outermost():
    command = Vllm().command(launch(middleware=["their.Own"]))
    assert not any("secret" in word for word in command)
    assert Vllm().environment(launch())["FRONTLINE_ENGINE_KEY"] == "secret"
    named = [command[i + 1] for i, word in enumerate(command) if word == "--middleware"]
    assert named == ["their.Own", "frontline_vllm_guard.Guard"]


class Engine:
    """Answers as a running vLLM with the guard in it."""

    def __init__(
        self, facts, *, guarded=True, messages=False, tokenizes=False, pooled=None,
        transcript=None, completes=True,
    ):  # fmt: skip
        self._transcript, self._completes = transcript, completes
        # By path: whether it reads a priority there.
        self._pooled = pooled or {}
        self.tokenizes = tokenizes
        self._facts = facts
        self._guarded = guarded
        self._messages = messages

    async def get_json(self, path, *, authorized=True):
        if not authorized and self._guarded:
            return 401, {}
        return (200, self._facts) if path == "/frontline/facts" else (200, {})

    async def post_json(self, path, body, *, authorized=True, headers=None):
        assert body["model"] == "org/m"
        if self._messages and path == "/v1/messages/count_tokens":
            return 200, {"input_tokens": 9}
        if self.tokenizes and path == "/v1/tokenize":
            return 200, {"tokens": [7], "count": 1}
        if self.tokenizes and path == "/v1/detokenize" and body["tokens"] == [7]:
            return 200, {"prompt": "Hi"}
        if path in self._pooled:
            if self._pooled[path] and body.get("priority", 0) == "none":
                return 400, {"error": {"message": "Input should be a valid integer: priority"}}
            return 200, {"data": [], "usage": {"prompt_tokens": 3, "total_tokens": 3}}
        if path == "/v1/completions":
            return (200 if self._completes else 404), {}
        return 404, {"detail": "Not Found"}

    async def post_form(self, path, form):
        body = b"".join(form)
        assert path == "/v1/audio/transcriptions" and b"\r\norg/m\r\n" in body
        assert b"RIFF" in body and form.content_type.startswith(b"multipart/form-data")
        return (404, {"detail": "Not Found"}) if self._transcript is None else self._transcript


async def inspect(facts, **options):
    return await Vllm().inspect(launch(), Engine(facts, **options))


async def test_priority_is_offered_when_the_engine_says_that_it_is_in_force():
    told = {"max_model_len": 77, "max_num_seqs": 16, "kv_tokens": 23_296}
    facts = await inspect({"version": "9", "scheduling_policy": "priority", **told})
    assert (facts.version, facts.context_length) == ("9", 77)
    assert (facts.most_running, facts.kv_tokens) == (16, 23_296)
    assert facts.dialect.priority_routes == OPENAI_ROUTES
    assert facts.dialect.routes == GENERATING_ROUTES
    values = facts.dialect.priority_values
    assert values[Tier.PRIORITY] < values[Tier.DEFAULT] < values[Tier.FLEX]
    gaps = [values[Tier.DEFAULT] - values[Tier.PRIORITY], values[Tier.FLEX] - values[Tier.DEFAULT]]
    assert min(gaps) > 10


@pytest.mark.parametrize(
    ("status", "answer", "obeys"),
    [(200, {"limited": True}, True), (200, {"limited": False}, False), (404, None, False)],
)
async def test_a_running_engine_is_held_to_fewer_requests(status, answer, obeys):
    asked = []

    class Running:
        async def post_json(self, path, body, **options):
            asked.append((path, body))
            return status, answer

    assert await Vllm().limit(launch(), Running(), 12) is obeys
    assert asked == [("/frontline/limit", {"slots": 12})]


@pytest.mark.parametrize("policy", ["priority", "fcfs"])
@pytest.mark.parametrize("messages", [True, False])
@pytest.mark.parametrize("header", ["X-Vllm-Priority", None, 7])
async def test_messages_are_offered_where_they_are_served_and_prioritized_by_the_header(
    policy, messages, header
):
    facts = await inspect(
        {"version": "9", "scheduling_policy": policy, "messages_priority_header": header},
        messages=messages,
    )
    dialect = facts.dialect
    assert dialect.routes == GENERATING_ROUTES | (MESSAGES_ROUTES if messages else set())
    by_header = messages and isinstance(header, str)
    assert (Route.MESSAGES in dialect.priority_routes) is (by_header and policy == "priority")
    assert dialect.priority_headers == ({Route.MESSAGES: "x-vllm-priority"} if by_header else {})
    assert Route.COUNT_TOKENS not in dialect.priority_routes


async def test_the_tokenizer_is_offered_where_it_answers():
    facts = await inspect({"version": "9", "scheduling_policy": "priority"}, tokenizes=True)
    assert facts.dialect.routes == GENERATING_ROUTES | TOKEN_ROUTES
    assert facts.dialect.priority_routes == OPENAI_ROUTES


TRANSCRIPT = (200, {"text": "", "usage": {"type": "duration", "seconds": 1}})


@pytest.mark.parametrize(
    ("transcript", "completes", "routes"),
    [
        (TRANSCRIPT, True, GENERATING_ROUTES | AUDIO_ROUTES),
        # Such as Whisper.
        (TRANSCRIPT, False, AUDIO_ROUTES),
        ((200, {"text": "", "usage": {"seconds": 0}}), True, GENERATING_ROUTES),
        ((200, {"text": ""}), True, GENERATING_ROUTES),
        ((500, {"error": {"message": "Please install vllm[audio]"}}), True, GENERATING_ROUTES),
        ((200, None), True, GENERATING_ROUTES),
    ],
)
async def test_recordings_are_offered_where_one_is_transcribed_and_its_length_told(
    transcript, completes, routes
):
    facts = {"version": "9", "scheduling_policy": "priority"}
    dialect = (await inspect(facts, transcript=transcript, completes=completes)).dialect
    assert dialect.routes == routes
    assert dialect.generates is bool(routes & GENERATING_ROUTES)
    assert not AUDIO_ROUTES & dialect.priority_routes


@pytest.mark.parametrize("policy", ["priority", "fcfs"])
async def test_pooled_routes_are_offered_where_they_answer_with_the_priority_that_they_read(policy):
    pooled = {"/v1/rerank": True, "/v1/score": False}
    facts = {"version": "9", "scheduling_policy": policy, "runner": "pooling"}
    dialect = (await inspect(facts, pooled=pooled)).dialect
    assert dialect.routes == {Route.EMBEDDINGS, Route.RERANK, Route.SCORE}
    prioritized = OPENAI_ROUTES | {Route.RERANK} if policy == "priority" else set()
    assert dialect.priority_routes == prioritized
    dialect = (await inspect(facts | {"runner": "generate"}, pooled=pooled)).dialect
    assert dialect.routes == GENERATING_ROUTES


@pytest.mark.parametrize("policy", ["fcfs", None, True, "PRIORITY"])
async def test_anything_else_is_never_taken_for_priority(policy):
    facts = await inspect({"version": "9", "scheduling_policy": policy})
    assert not facts.dialect.native_priority


@pytest.mark.parametrize(
    ("runner", "generates"), [("generate", True), ("pooling", False), (None, True)]
)
async def test_what_the_engine_runs_says_whether_it_generates_text(runner, generates):
    facts = await inspect({"version": "9", "scheduling_policy": "priority", "runner": runner})
    assert facts.dialect.generates is generates


PREEMPTS = {"preempts": True}


@pytest.mark.parametrize(
    ("policy", "reports", "preempts"),
    [
        ("priority", [PREEMPTS], True),
        ("priority", [PREEMPTS, PREEMPTS], True),
        ("priority", [PREEMPTS, {"preempts": False, "why_not": "vLLM 9 is not known"}], False),
        ("priority", [{"preempts": "true"}], False),
        ("priority", [], False),
        ("priority", None, False),
        ("priority", True, False),
        ("fcfs", [PREEMPTS], False),
    ],
)
async def test_it_preempts_if_every_scheduler_of_the_engine_says_so(policy, reports, preempts):
    facts = await inspect({"version": "9", "scheduling_policy": policy, "preemption": reports})
    assert facts.dialect.preempts is preempts


@pytest.mark.parametrize(
    ("reports", "wanted"),
    [
        (
            [
                {**PREEMPTS, "why_not": None, "preemptions": 2, "suspended": 1, "suspended_s": 0.5},
                {**PREEMPTS, "why_not": None, "preemptions": 3, "suspended": 0, "suspended_s": 1.0},
            ],
            PreemptionReport(True, "", Preempted(5, 1, 1.5)),
        ),
        (
            [PREEMPTS, {"preempts": False, "why_not": "it has failed"}],
            PreemptionReport(False, "it has failed", Preempted(0, 0, 0.0)),
        ),
        (None, None),
        ([], None),
    ],
)
async def test_the_reports_of_an_engines_schedulers_are_one(reports, wanted):
    engine = Engine({"version": "9", "scheduling_policy": "priority", "preemption": reports})
    assert await Vllm().preemption(engine) == wanted


def test_the_scheduler_that_preempts_is_loaded_unless_the_pool_or_the_policy_says_otherwise():
    scheduler = "frontline_vllm_scheduler.make_scheduler"
    assert flag(Vllm().command(launch()), "--scheduler-cls") == scheduler
    assert flag(Vllm().command(launch(scheduler_cls="their.Own")), "--scheduler-cls") == "their.Own"
    for other in (replace(launch(), preemption=False), launch(scheduling_policy="fcfs")):
        assert "--scheduler-cls" not in Vllm().command(other)


async def test_an_engine_that_is_not_guarded_does_not_come_up():
    with pytest.raises(EngineContractError, match="without the key"):
        await inspect({"scheduling_policy": "priority"}, guarded=False)
