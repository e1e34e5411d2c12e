import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytestmark = pytest.mark.unit

INSIDE = Path(__file__).parents[3] / "deployments/engines/inside"


@pytest.fixture
def guard(monkeypatch):
    monkeypatch.syspath_prepend(str(INSIDE))
    module = importlib.import_module("frontline_vllm_guard")
    monkeypatch.setenv("FRONTLINE_ENGINE_KEY", "secret")
    vllm = ModuleType("vllm")
    monkeypatch.setattr(vllm, "__version__", "9.9", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", vllm)

    async def engine(scope, receive, send):
        await send({"type": "engine"})

    return module.Guard(engine)


async def ask(guard, path="/invocations", key=None, app=None, kind="http"):
    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    scope = {"type": kind, "path": path, "headers": headers, "app": app}
    await guard(scope, None, send)
    return sent


@pytest.mark.parametrize("key", [None, "wrong", "secret2", ""])
@pytest.mark.parametrize("path", ["/v1/models", "/invocations", "/health", "/frontline/facts"])
async def test_every_route_wants_the_key(guard, path, key):
    sent = await ask(guard, path, key)
    assert sent[0]["status"] == 401


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/classify", "/pooling"])
async def test_what_vllm_has_at_its_root_is_below_v1_as_with_other_engines(monkeypatch, path):
    monkeypatch.syspath_prepend(str(INSIDE))
    monkeypatch.setenv("FRONTLINE_ENGINE_KEY", "secret")
    seen = []

    async def engine(scope, receive, send):
        seen.append((scope["path"], scope["raw_path"]))

    guard = importlib.import_module("frontline_vllm_guard").Guard(engine)
    await ask(guard, f"/v1{path}", "secret")
    assert seen == [(path, path.encode())]


async def test_with_the_key_the_engine_answers(guard):
    assert await ask(guard, key="secret") == [{"type": "engine"}]


async def test_a_websocket_without_the_key_is_closed(guard):
    assert (await ask(guard, kind="websocket"))[0]["type"] == "websocket.close"


async def test_lifespan_events_reach_the_engine(guard):
    assert await ask(guard, kind="lifespan") == [{"type": "engine"}]


async def test_the_facts_are_those_of_the_running_configuration(guard):
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(policy="priority", max_num_seqs=8),
        model_config=SimpleNamespace(max_model_len=512, runner_type="pooling"),
        cache_config=SimpleNamespace(num_gpu_blocks=182, block_size=128),
    )
    app = SimpleNamespace(state=SimpleNamespace(vllm_config=config))
    sent = await ask(guard, "/frontline/facts", "secret", app)
    assert json.loads(sent[1]["body"]) == {
        "version": "9.9",
        "scheduling_policy": "priority",
        "max_num_seqs": 8,
        "max_model_len": 512,
        "runner": "pooling",
        "kv_tokens": 23_296,
        "preemption": None,
        "messages_priority_header": None,
    }


class Chat:
    async def create_chat_completion(self, request, raw_request=None):
        pass

    @staticmethod
    def _get_priority(request, raw_request):
        return int(raw_request.headers.get(PRIORITY_HEADER, request.priority))


class Messages(Chat):
    async def create_messages(self, request, raw_request=None):
        return await self.create_chat_completion(request, raw_request)


class Dropping(Chat):
    async def create_messages(self, request, raw_request=None):
        return await self.create_chat_completion(request)


class Deaf(Messages):
    @staticmethod
    def _get_priority(request, raw_request):
        return request.priority


PRIORITY_HEADER = "X-Vllm-Priority"


@pytest.mark.parametrize(
    ("serving", "header"),
    [(Messages(), PRIORITY_HEADER), (Dropping(), None), (Deaf(), None), (object(), None),
     (None, None)],
)  # fmt: skip
async def test_the_header_of_messages_is_named_if_the_running_server_reads_it(
    guard, serving, header
):
    app = SimpleNamespace(state=SimpleNamespace(anthropic_serving_messages=serving))
    sent = await ask(guard, "/frontline/facts", "secret", app)
    assert json.loads(sent[1]["body"])["messages_priority_header"] == header


async def test_what_the_engine_does_not_tell_is_null(guard):
    app = SimpleNamespace(state=SimpleNamespace())
    sent = await ask(guard, "/frontline/facts", "secret", app)
    assert json.loads(sent[1]["body"])["scheduling_policy"] is None


SCHEDULER = "frontline_vllm_scheduler.make_scheduler"


def engine_with(cores, scheduler_cls=SCHEDULER):
    config = SimpleNamespace(scheduler_config=SimpleNamespace(scheduler_cls=scheduler_cls))
    client = SimpleNamespace(engine_core=cores)
    return SimpleNamespace(state=SimpleNamespace(vllm_config=config, engine_client=client))


class Cores:
    """vLLM's client of its engine cores."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    async def call_utility_all_async(self, method, *given):
        self.asked.append(" ".join(map(str, [method, *given])))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def preemption(guard, app):
    sent = await ask(guard, "/frontline/facts", "secret", app)
    return json.loads(sent[1]["body"])["preemption"]


async def test_every_scheduler_reports_whether_it_preempts(guard):
    cores = Cores([{"preempts": True}, {"preempts": False}])
    assert await preemption(guard, engine_with(cores)) == cores.answer
    scheduler = importlib.import_module("frontline_vllm_scheduler")
    assert cores.asked == [scheduler.REPORT]


async def test_another_scheduler_is_not_asked(guard):
    cores = Cores([{"preempts": True}])
    assert await preemption(guard, engine_with(cores, "their.Scheduler")) is None
    assert not cores.asked


async def test_a_scheduler_that_does_not_answer_counts_as_one_that_does_not_preempt(guard):
    assert await preemption(guard, engine_with(Cores(RuntimeError("Call failed")))) is None
    assert await preemption(guard, engine_with(None)) is None


async def limit(guard, app, body, key="secret"):
    pieces = [{"body": body[:3], "more_body": True}, {"body": body[3:], "more_body": False}]

    async def receive():
        return {"type": "http.request", **pieces.pop(0)}

    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())]
    path = "/frontline/limit"
    await guard({"type": "http", "path": path, "headers": headers, "app": app}, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


@pytest.mark.parametrize(
    ("answer", "limited"),
    [([True, True], True), ([True, False], False), ([], False), (RuntimeError("no"), False)],
)
async def test_every_scheduler_is_held_to_fewer_requests(guard, answer, limited):
    cores = Cores(answer)
    assert await limit(guard, engine_with(cores), b'{"slots": 12}') == (200, {"limited": limited})
    scheduler = importlib.import_module("frontline_vllm_scheduler")
    assert cores.asked == [f"{scheduler.LIMIT} 12"]


@pytest.mark.parametrize("body", [b"", b"[]", b"nonsense", b'{"slots": 0}', b'{"slots": true}'])
async def test_what_is_no_number_of_slots_changes_nothing(guard, body):
    cores = Cores([True])
    assert await limit(guard, engine_with(cores), body) == (200, {"limited": False})
    assert not cores.asked
    assert (await limit(guard, engine_with(cores), b'{"slots": 2}', key="x"))[0] == 401


async def test_another_scheduler_is_not_limited(guard):
    cores = Cores([True])
    found = await limit(guard, engine_with(cores, "their.Scheduler"), b'{"slots": 2}')
    assert found == (200, {"limited": False}) and not cores.asked
