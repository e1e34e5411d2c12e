import asyncio
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import frontline_tally
import pytest

pytestmark = pytest.mark.unit

INSIDE = Path(__file__).parents[3] / "deployments/engines/inside"
TELLING = SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(log_stats=True)))
KEY = [(b"authorization", b"Bearer secret")]


def tally():
    found = frontline_tally.current()
    assert found is not None
    return found


class Sequence:
    """What an engine runs for a request."""

    def __init__(self):
        self.preemptions = 0


async def answered(app, about=None):
    """Return the headers of an application's answer, and its body."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": "/v1/completions", "headers": KEY, "app": about}
    await app(scope, None, send)
    headers = dict(sent[0]["headers"])
    return headers, [message.get("body", b"") for message in sent[1:]]


async def begin(send, kind):
    headers = [(b"Content-Type", kind)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def test_an_answer_has_the_count_of_all_its_sequences_when_it_begins():
    async def app(scope, receive, send):
        send = frontline_tally.telling(send)
        for count in (2, 0, 1):
            tally().add(lambda count=count: count)
        await begin(send, b"application/json")
        await send({"type": "http.response.body", "body": b"{}"})

    assert await answered(app) == (
        {b"Content-Type": b"application/json", b"x-frontline-preemptions": b"3"},
        [b"{}"],
    )


async def test_a_stream_has_each_new_count_before_the_next_events_and_never_within_one():
    one = Sequence()

    async def app(scope, receive, send):
        send = frontline_tally.telling(send)
        tally().add(lambda: one.preemptions)
        await begin(send, b"text/event-stream; charset=utf-8")
        for count, piece in enumerate([b"data: a\n\n", b"data: b\n\ndata", b": c\n\n", b"", b"d"]):
            one.preemptions = count
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})

    headers, pieces = await answered(app)
    assert headers[b"x-frontline-preemptions"] == b"0"
    assert pieces == [
        b"data: a\n\n", b": frontline-preemptions 1\n\ndata: b\n\ndata", b": c\n\n", b"",
        b": frontline-preemptions 4\n\nd", b"",
    ]  # fmt: skip


async def test_requests_are_not_taken_for_one_another():
    begun = asyncio.Barrier(3)

    async def app(scope, receive, send):
        send = frontline_tally.telling(send)
        await begun.wait()
        # As a server's task for a request.
        number = len(scope["headers"])
        await asyncio.create_task(asyncio.to_thread(tally().add, lambda: number))
        await begin(send, b"application/json")

    async def one(number):
        told = []

        async def send(message):
            told.extend(message["headers"])

        await app({"headers": [()] * number}, None, send)
        return told[-1][1]

    assert await asyncio.gather(*map(one, (1, 2, 3))) == [b"1", b"2", b"3"]
    assert frontline_tally.current() is None


# Inside engines


@pytest.fixture
def inside(monkeypatch):
    """Returns the modules of an engine that has these classes, and imports one of ours there."""
    monkeypatch.syspath_prepend(str(INSIDE))
    monkeypatch.setenv("FRONTLINE_ENGINE_KEY", "secret")

    def load(ours, **classes):
        for name, members in classes.items():
            path = name.split("__")
            for depth in range(1, len(path)):
                monkeypatch.setitem(sys.modules, ".".join(path[:depth]), ModuleType("package"))
            module = ModuleType(".".join(path))
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, ".".join(path), module)
        monkeypatch.delitem(sys.modules, ours, raising=False)
        return importlib.import_module(ours)

    return load


class Stats:
    def __init__(self):
        self.num_preemptions = 0


def vllm():
    class OutputProcessor:
        def __init__(self):
            self.request_states = {}

        def add_request(self, request, prompt, parent_req=None):
            self.request_states[request.request_id] = SimpleNamespace(stats=Stats())

    return OutputProcessor, {
        "vllm__v1__engine__output_processor": {"OutputProcessor": OutputProcessor},
        "vllm__v1__metrics__stats": {"RequestStateStats": Stats},
    }


async def test_vllms_own_counts_are_told(inside):
    kind, classes = vllm()
    processor, guard = kind(), inside("frontline_vllm_guard", **classes)

    async def engine(scope, receive, send):
        for name in ("0_a", "1_a"):
            processor.add_request(SimpleNamespace(request_id=name), "prompt", parent_req=None)
        await begin(send, b"text/event-stream")
        for state in processor.request_states.values():
            state.stats.num_preemptions += 2
            await send({"type": "http.response.body", "body": b"data: a\n\n", "more_body": True})

    # The server may make the guard several times.
    app = [guard.Guard(engine), guard.Guard(engine)][1]
    headers, pieces = await answered(app, TELLING)
    assert headers[b"x-frontline-preemptions"] == b"0"
    assert pieces == [b": frontline-preemptions %d\n\ndata: a\n\n" % count for count in (2, 4)]
    # Requests of others, as its own check of its health.
    processor.add_request(SimpleNamespace(request_id="b"), "prompt")


@pytest.mark.parametrize("lacking", ["statistics", "class", "field"])
async def test_vllm_without_counts_tells_none(inside, lacking):
    _, classes = vllm()
    if lacking == "class":
        classes["vllm__v1__engine__output_processor"] = {}
    if lacking == "field":
        classes["vllm__v1__metrics__stats"] = {"RequestStateStats": SimpleNamespace}

    async def engine(scope, receive, send):
        await begin(send, b"application/json")

    client = SimpleNamespace(log_stats=lacking != "statistics")
    about = SimpleNamespace(state=SimpleNamespace(engine_client=client))
    headers, _ = await answered(inside("frontline_vllm_guard", **classes).Guard(engine), about)
    assert b"x-frontline-preemptions" not in headers


@pytest.mark.parametrize("works", [True, False])
async def test_sglangs_own_counts_are_told(inside, works):
    closed = []

    class TokenizerManager:
        async def generate_request(self, asked, request=None):
            try:
                for counts in asked:
                    outputs = [{"meta_info": {"id": n, **one}} for n, one in enumerate(counts)]
                    yield outputs if len(outputs) > 1 else outputs[0]
            finally:
                closed.append(asked)

        if not works:
            generate_request = None

    manager, added = TokenizerManager(), []
    ours = inside(
        "frontline_sglang",
        sglang__srt__managers__tokenizer_manager={"TokenizerManager": TokenizerManager},
        sglang__srt__entrypoints__http_server={"app": SimpleNamespace(add_middleware=added.append)},
    )
    asked = [[{}, {"num_retractions": 1}], [{"num_retractions": 1}], [{"num_retractions": 5}]]

    async def engine(scope, receive, send):
        await begin(send, b"text/event-stream")
        if works:
            async for output in manager.generate_request(asked, request=None):
                body = b"data: %d\n\n" % len(output)
                await send({"type": "http.response.body", "body": body, "more_body": True})

    assert added == [ours.Guard]
    headers, pieces = await answered(ours.Guard(engine))
    assert (b"x-frontline-preemptions" in headers) is works
    if works:
        told = (b": frontline-preemptions %d\n\ndata: " % count for count in (1, 2, 6))
        assert [piece[:-3] for piece in pieces] == [*told] and closed == [asked]
