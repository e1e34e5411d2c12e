from dataclasses import replace
from itertools import pairwise

import pytest

from app.core.dialect import AUDIO_ROUTES, MESSAGES_ROUTES, POOLED_ROUTES, Route
from app.core.settings import SettingsError
from app.core.tiers import Tier
from deployments.engines.base import LOW_FIRST, EngineContractError, Launch, NodeSpan
from deployments.engines.lora import LoraAdapter, LoraRoom
from deployments.engines.sglang import Sglang

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
    command = Sglang().command(launch(context_length=4096, device="cpu"))
    assert command[:3] == ["/env/bin/python", "-m", "frontline_sglang"]
    assert flag(command, "--host") == "127.0.0.1"
    assert flag(command, "--port") == "1234"
    assert flag(command, "--model-path") == "/models/m"
    assert flag(command, "--served-model-name") == "org/m"
    assert flag(command, "--max-running-requests") == "16"
    assert flag(command, "--context-length") == "4096"
    assert flag(command, "--default-priority-value") == "0"
    assert flag(command, "--retraction-policy") == "priority"
    bare = {"--enable-priority-scheduling", "--schedule-low-priority-values-first"}
    assert {*bare, "--enable-metrics", "--enable-cache-report"} <= set(command)
    assert "--max-queued-requests" not in command, "the ingress sheds, not the engine"


def test_adapters_are_loaded_by_name_beside_requests_without_one():
    adapters = tuple(LoraAdapter(str(n), f"/loras/{n}") for n in range(3))
    command = Sglang().command(replace(launch(), loras=adapters))
    at = command.index("--lora-paths") + 1
    assert command[at : at + 3] == ["0=/loras/0", "1=/loras/1", "2=/loras/2"]
    assert flag(command, "--max-loras-per-batch") == "4" and "--enable-lora" in command
    assert not [word for word in Sglang().command(launch()) if "lora" in word]


def test_room_for_later_adapters_is_reserved_at_the_start():
    room = LoraRoom(count=3, rank=20)
    command = Sglang().command(replace(launch(), lora_room=room))
    assert "--enable-lora" in command and "--lora-paths" not in command
    assert flag(command, "--max-loras-per-batch") == "4"
    assert flag(command, "--max-lora-rank") == "20"
    assert flag(command, "--lora-target-modules") == "all"
    first = (LoraAdapter("a", "/a", 64),)
    command = Sglang().command(replace(launch(), loras=first, lora_room=room))
    assert flag(command, "--max-loras-per-batch") == "5"
    assert flag(command, "--max-lora-rank") == "64"


def test_an_engine_on_several_nodes():
    span = NodeSpan(nodes=2, rank=1, here="10.0.0.2", address="10.0.0.1", port=2345)
    command = Sglang().command(replace(launch(tp_size=16), span=span))
    assert (flag(command, "--nnodes"), flag(command, "--node-rank")) == ("2", "1")
    assert flag(command, "--dist-init-addr") == "10.0.0.1:2345"
    assert flag(command, "--tp-size") == "16"
    assert "--nnodes" not in Sglang().command(launch())


def test_an_operators_arguments_win_over_defaults():
    command = Sglang().command(launch(max_running_requests=3, retraction_policy="length"))
    assert flag(command, "--max-running-requests") == "3"
    assert flag(command, "--retraction-policy") == "length"


def test_without_priority_scheduling_nothing_is_asked_that_needs_it():
    command = Sglang().command(launch(enable_priority_scheduling=False))
    assert not [word for word in command if "priority" in word]


@pytest.mark.parametrize(
    "name", ["host", "port", "api_key", "served_model_name", "model", "model_path", "grpc_port"]
)
def test_what_would_open_the_engine_is_refused(name):
    with pytest.raises(SettingsError, match=f"engine_args.{name}"):
        Sglang().command(launch(**{name: "x"}))


def test_the_key_is_not_on_the_command_line():
    assert not any("secret" in word for word in Sglang().command(launch()))
    assert Sglang().environment(launch())["FRONTLINE_ENGINE_KEY"] == "secret"


class Engine:
    """Answers as a running SGLang does."""

    def __init__(self, *schedulers, guarded=True, generates=True, embeds=False):
        self._info = {
            # What it was asked to be proves nothing: only what its schedulers say.
            "enable_priority_scheduling": True,
            "schedule_low_priority_values_first": True,
            "internal_states": list(schedulers),
            "version": "9",
        }
        self.messages = self.reads_header = True
        self._guarded = guarded
        self._generates = generates
        self._embeds = embeds
        self.posted = []

    async def get_json(self, path, *, authorized=True):
        if not authorized and self._guarded:
            return 401, {}
        if path == "/v1/models":
            return 200, {"data": [{"id": "org/m", "max_model_len": 77}]}
        if path == "/model_info":
            return 200, {"is_generation": not self._embeds}
        return 200, self._info if path == "/server_info" else {}

    async def post_json(self, path, body, *, authorized=True, headers=None):
        self.posted.append(path)
        if path.startswith("/v1/messages"):
            return self._anthropics(path, headers)
        if path in ("/v1/tokenize", "/v1/detokenize"):
            return 200, {"tokens": [7]}
        if path == "/v1/rerank" and self._embeds:
            return 200, [{"score": 0.5, "index": 0}]
        if path == "/v1/classify" and self._embeds:
            return 200, {"data": [], "usage": {"prompt_tokens": 3}}
        return (200 if self._generates else 500), {}

    def _anthropics(self, path, headers):
        if not self.messages:
            return 404, {"detail": "Not Found"}
        if path == "/v1/messages/count_tokens":
            return 200, {"input_tokens": 9}
        assert headers == {"x-override-priority": "none"}
        if not self.reads_header:
            return 200, {"type": "message"}
        message = "invalid x-override-priority header 'none': invalid literal for int()"
        return 400, {"type": "error", "error": {"type": "x", "message": message}}


def scheduler(enabled=True, low_first=True, *, without_preemption=False, threshold=50):
    return {
        "enable_priority_scheduling": enabled,
        "schedule_low_priority_values_first": low_first,
        "disable_priority_preemption": without_preemption,
        "priority_scheduling_preemption_threshold": threshold,
    }


async def inspect(*schedulers, **options):
    return await Sglang().inspect(launch(), Engine(*schedulers, **options))


async def test_priority_is_offered_when_the_scheduler_says_that_it_is_in_force():
    facts = await inspect(scheduler())
    assert (facts.version, facts.context_length) == ("9", 77)
    by_body = {Route.CHAT, Route.COMPLETIONS, Route.EMBEDDINGS}
    assert facts.dialect.priority_routes == by_body | {Route.MESSAGES}
    assert facts.dialect.priority_headers == {Route.MESSAGES: "x-override-priority"}
    assert facts.dialect.routes == set(Route) - POOLED_ROUTES - AUDIO_ROUTES - {Route.EMBEDDINGS}
    assert facts.dialect.priority_values == {Tier.PRIORITY: -100, Tier.DEFAULT: 0, Tier.FLEX: 100}


@pytest.mark.parametrize("embeds", [True, False])
async def test_the_model_says_whether_it_generates_text(embeds):
    assert (await inspect(scheduler(), embeds=embeds)).dialect.generates is not embeds


async def test_a_route_whose_answers_have_no_usage_is_not_offered():
    dialect = (await inspect(scheduler(), embeds=True)).dialect
    generating = {Route.CHAT, Route.COMPLETIONS, Route.RESPONSES}
    assert dialect.routes & (POOLED_ROUTES | generating) == {Route.CLASSIFY}
    assert Route.CLASSIFY not in dialect.priority_routes


@pytest.mark.parametrize("messages", [True, False])
async def test_messages_have_priority_only_where_the_engine_reads_the_header(messages):
    engine = Engine(scheduler())
    engine.messages, engine.reads_header = messages, False
    dialect = (await Sglang().inspect(launch(), engine)).dialect
    assert dialect.routes == set(Route) - POOLED_ROUTES - AUDIO_ROUTES - {Route.EMBEDDINGS} - (
        set() if messages else MESSAGES_ROUTES
    )
    assert Route.MESSAGES not in dialect.priority_routes and not dialect.priority_headers
    assert Sglang().environment(launch())["SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES"] == "1"


async def test_it_says_how_many_requests_run_at_once():
    ranks = [scheduler() | {"effective_max_running_requests_per_dp": most} for most in (64, 48)]
    assert (await inspect(*ranks)).most_running == 48
    assert (await inspect(ranks[0], scheduler())).most_running is None
    assert (await inspect()).most_running is None


@pytest.mark.parametrize(
    ("status", "done", "obeys"),
    [(200, [True], True), (200, [True, False], False), (200, [], False), (404, {}, False)],
)
async def test_a_running_engine_is_held_to_fewer_requests(status, done, obeys):
    """SGLang preempts for a slot, and not for memory: with more slots than fit, it would not."""
    asked = []

    class Running:
        async def post_json(self, path, body, **options):
            asked.append((path, body))
            return status, done

    own = launch(pp_size=2) if obeys else launch()
    assert await Sglang().limit(own, Running(), 12) is obeys
    change = {"server_args": {"pp_max_micro_batch_size": 6 if obeys else 12}}
    assert asked == [("/set_internal_state", change)]


async def test_the_sign_is_the_running_engines():
    facts = await inspect(scheduler(low_first=False))
    assert facts.dialect.priority_values[Tier.PRIORITY] == 100


@pytest.mark.parametrize(
    "schedulers",
    [
        [],
        [{}],
        ["priority"],
        [scheduler(enabled=False)],
        [scheduler(enabled=None)],
        [scheduler(enabled="true")],
        [scheduler(low_first=None)],
        [scheduler(), scheduler(enabled=False)],
        [scheduler(), scheduler(low_first=False)],
    ],
)
async def test_anything_else_is_never_taken_for_priority(schedulers):
    facts = await inspect(*schedulers)
    assert not facts.dialect.native_priority


@pytest.mark.parametrize("low_first", [True, False])
async def test_it_preempts_if_every_scheduler_says_that_tiers_do(low_first):
    facts = await inspect(scheduler(low_first=low_first), scheduler(low_first=low_first))
    assert facts.dialect.preempts


@pytest.mark.parametrize(
    "schedulers",
    [
        [],
        [{}],
        [scheduler(enabled=False)],
        [scheduler(without_preemption=True)],
        [scheduler(without_preemption=None)],
        [scheduler(threshold=100)],
        [scheduler(threshold=None)],
        [scheduler(), scheduler(threshold=100)],
        [scheduler(), scheduler(low_first=False)],
    ],
)
async def test_anything_else_is_never_taken_for_preemption(schedulers):
    assert not (await inspect(*schedulers)).dialect.preempts


def test_tiers_preempt_each_other_and_requests_of_one_tier_do_not():
    threshold = int(flag(Sglang().command(launch()), "--priority-scheduling-preemption-threshold"))
    tiers = sorted(LOW_FIRST.values())
    assert all(0 < threshold < after - before for before, after in pairwise(tiers))


def test_a_pool_turns_preemption_off():
    command = Sglang().command(replace(launch(), preemption=False))
    assert "--disable-priority-preemption" in command
    assert "--priority-scheduling-preemption-threshold" not in command


async def test_an_engine_that_is_not_guarded_does_not_come_up():
    with pytest.raises(EngineContractError, match="without the key"):
        await inspect(scheduler(), guarded=False)


@pytest.mark.parametrize(("embeds", "path"), [(False, "/v1/completions"), (True, "/v1/embeddings")])
async def test_it_is_warmed_up_before_it_serves(embeds, path):
    engine = Engine(scheduler(), embeds=embeds)
    await Sglang().inspect(launch(), engine)
    assert engine.posted[-2:] == [path, "/freeze_gc"]


async def test_an_engine_that_does_not_generate_does_not_come_up():
    with pytest.raises(EngineContractError, match="does not answer"):
        await inspect(scheduler(), generates=False)
