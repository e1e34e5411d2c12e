"""One model on several engines: where requests go, and where they go when an engine fails."""

import asyncio
import time
import uuid
from collections import Counter

import httpx
import openai
import pytest

from tests.support.cluster import eventually, eventually_async, pooled_app
from tests.support.waiting import SLOWEST

pytestmark = pytest.mark.integration

POOLS = {
    "first": {"dialect": "vllm", "tokens_per_second": 100},
    "second": {"dialect": "tensorrt_llm", "policy": "fcfs", "tokens_per_second": 100},
}
NAMES = {"first": "simulated-vllm", "second": "simulated-tensorrt-llm"}


@pytest.fixture(scope="module")
def model(frontline):
    """A model on an engine that honours priority, and on a strict one that does not."""
    frontline.deploy(pooled_app("pools", POOLS))
    yield frontline
    frontline.remove("pools")


@pytest.fixture
def pools(model):
    """The model with both pools in use and nothing wrong with them."""
    eventually(lambda: mended(model), 60, "the pools are not ready")
    wait_placed(model, *NAMES.values())
    return model


def mended(model):
    """Take back what tests made fail; false while an engine that died is not replaced yet."""
    try:
        for pool in NAMES:
            fail(model, pool)
    except (httpx.TransportError, ValueError):
        return False
    return True


def replicas(frontline):
    entry = frontline.entry("pools")
    return frontline.snapshot("pools").replicas if entry else ()


def wait_placed(frontline, *engines):
    """Wait until the ingress places requests on just these engines."""

    def seen():
        # Other words every time: a prompt's beginning decides which replica it prefers.
        answers = [ask(frontline, text=uuid.uuid4().hex) for _ in range(8)]
        return {headers["x-engine"] for headers, _ in answers} == set(engines)

    eventually(seen, 40, f"not placed on {engines}")


def ask(frontline, tier="default", text="hello", **more):
    raw = frontline.client().chat.completions.with_raw_response.create(
        model="pools",
        messages=[{"role": "user", "content": text}],
        service_tier=tier,
        **{"max_tokens": 4, **more},
    )
    return raw.headers, raw.parse()


def index_of(frontline, pool):
    return [replica.pool for replica in replicas(frontline)].index(pool)


def fail(frontline, pool, **failures):
    with frontline.engine("pools", index_of(frontline, pool)) as engine:
        engine.post("/simulate", json={"failures": failures, "forget": True})


def received(frontline, pool):
    with frontline.engine("pools", index_of(frontline, pool)) as engine:
        return engine.get("/simulate").json()["received"]


async def test_default_uses_every_pool_and_priority_those_that_honour_it(pools):
    async with pools.async_client() as client:

        async def engine(tier, number):
            raw = await client.chat.completions.with_raw_response.create(
                model="pools",
                messages=[{"role": "user", "content": f"{tier} {number}"}],
                service_tier=tier,
                max_tokens=20,
            )
            assert raw.parse().service_tier == tier
            return raw.headers["x-engine"]

        default = Counter(await asyncio.gather(*(engine("default", n) for n in range(14))))
        priority = Counter(await asyncio.gather(*(engine("priority", n) for n in range(14))))
    assert min(default[name] for name in NAMES.values()) >= 5, default
    assert priority == {NAMES["first"]: 14}


def test_the_models_list_tells_all_its_engines(pools):
    entry = pools.entry("pools")
    assert entry["metadata"]["engines"] == sorted(NAMES.values())
    assert entry["service_tiers"] == ["priority", "default", "flex"]


def test_without_an_engine_that_honours_it_priority_is_served_as_default(pools):
    price = ask(pools)[1].usage.estimated_cost
    fail(pools, "first", request="crash", at_request=1)
    # It is on its way to the first pool when that dies: decided anew, as the second pool cannot
    # honour what was decided for the first.
    headers, answer = ask(pools, "priority")
    assert (answer.service_tier, headers["x-engine"]) == ("default", NAMES["second"])
    assert headers["x-service-tier"] == "default"
    assert headers["x-service-tier-reason"] == "no_replica_honours_priority"
    assert answer.usage.estimated_cost == pytest.approx(price)
    # And while it is away, those that come are.
    headers, answer = ask(pools, "priority")
    assert (answer.service_tier, headers["x-engine"]) == ("default", NAMES["second"])


def test_default_keeps_its_decision_when_it_moves_to_another_engine(pools):
    fail(pools, "second", request="crash", at_request=1)
    for number in range(20):
        headers, answer = ask(pools, text=f"question {number}")
        assert answer.service_tier == headers["x-service-tier"] == "default"
        assert "x-service-tier-reason" not in headers
        if len(replicas(pools)) < 2:
            break
    else:
        pytest.fail("no request met the failing engine")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("failure", ["error", "error_event"])
def test_an_engines_own_fault_is_made_good_by_another_and_costs_the_pool_nothing(
    pools, stream, failure
):
    fail(pools, "first", request=failure, status=503, at_request=1)
    fail(pools, "second")
    if stream:
        chunks = list(
            pools.client().chat.completions.create(
                model="pools",
                messages=[{"role": "user", "content": "hello"}],
                service_tier="priority",
                max_tokens=4,
                stream=True,
            )
        )
        assert {chunk.service_tier for chunk in chunks} == {"default"}
        assert sum(bool(chunk.choices[0].finish_reason) for chunk in chunks) == 1
    else:
        assert ask(pools, "priority")[1].service_tier == "default"
    assert (received(pools, "first"), received(pools, "second")) == (1, 1)
    headers, answer = ask(pools, "priority")
    assert (answer.service_tier, headers["x-engine"]) == ("priority", NAMES["first"])


def test_a_request_that_fails_everywhere_fails_once_on_each(pools):
    for pool in NAMES:
        fail(pools, pool, request="error", status=500)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(pools)
    assert caught.value.type == "server_error"
    assert float(caught.value.response.headers["x-queue-time-ms"]) < SLOWEST * 1000
    assert [received(pools, pool) for pool in NAMES] == [1, 1]


@pytest.mark.parametrize("failure", ["crash", "error"])
def test_a_request_that_moves_has_one_answer_and_one_record(pools, failure):
    time.sleep(1)  # the records of those before have come
    before = len(pools.records(model="test/pools"))
    fail(pools, "first", request=failure, at_request=1)
    headers, answer = ask(pools, "priority")
    eventually(lambda: len(pools.records(model="test/pools")) > before)
    time.sleep(0.5)  # a second one would come now
    *_, record = records = pools.records(model="test/pools")
    assert len(records) == before + 1
    assert float(record["cost"]) == pytest.approx(answer.usage.estimated_cost)
    assert record["completion_tokens"] == answer.usage.completion_tokens
    assert (record["state"], record["engine"]) == ("completed", headers["x-engine"])
    assert (record["requested_tier"], record["served_tier"]) == ("priority", "default")
    assert record["reason"] == headers["x-service-tier-reason"] == "no_replica_honours_priority"
    assert record["multiplier"] == "1"


def test_a_refused_request_is_not_tried_elsewhere(pools):
    for pool in NAMES:
        fail(pools, pool)
    with pytest.raises(openai.BadRequestError):
        ask(pools, max_tokens="many")
    assert sum(received(pools, pool) for pool in NAMES) == 1


def test_after_its_first_byte_a_stream_is_never_begun_again(pools):
    for pool in NAMES:
        fail(pools, pool, request="crash", after_tokens=3)
    chunks = []
    with pytest.raises(openai.APIError) as caught:
        for chunk in pools.client().chat.completions.create(
            model="pools",
            messages=[{"role": "user", "content": "hello"}],
            service_tier="priority",
            max_tokens=50,
            stream=True,
        ):
            chunks.append(chunk)
    assert "lost before the answer was complete" in caught.value.message
    assert {chunk.service_tier for chunk in chunks} == {"priority"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert [replica.pool for replica in replicas(pools)].count("second") == 1, "nobody else died"


async def test_a_request_moves_at_once(pools):
    """The time that it takes is the failed engine's; waiting for it to come back is nobody's."""
    fail(pools, "first", request="crash", at_request=1)
    start = time.monotonic()
    headers, _ = await asyncio.to_thread(ask, pools, "priority")
    assert time.monotonic() - start < SLOWEST * 3
    assert headers["x-engine"] == NAMES["second"]
    await eventually_async(lambda: len(replicas(pools)) == 2, 60)
