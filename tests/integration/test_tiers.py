"""The tier that is echoed is the tier that is delivered, and the one that is paid."""

import pytest

from tests.support.cluster import eventually, simulated_app

pytestmark = pytest.mark.integration

MESSAGES = [{"role": "user", "content": "one two three four five six seven"}]


def ask(frontline, model, tier, **more):
    raw = frontline.client().chat.completions.with_raw_response.create(
        model=model, messages=MESSAGES, **({"service_tier": tier} if tier else {}), **more
    )
    return raw.headers, raw.parse()


@pytest.mark.parametrize(
    ("requested", "served"),
    [
        ("priority", "priority"),
        ("fast", "priority"),
        ("default", "default"),
        ("auto", "default"),
        (None, "default"),
        ("flex", "flex"),
    ],
)
def test_tiers_of_a_model_with_native_priority(frontline, requested, served):
    headers, answer = ask(frontline, "native", requested)
    assert answer.service_tier == headers["x-service-tier"] == served
    assert "x-service-tier-reason" not in headers


def test_the_engine_gets_the_tier_in_its_own_sign(frontline):
    with frontline.engine("native") as engine:
        for tier, priority in [("priority", -100), ("default", 0), ("flex", 100)]:
            ask(frontline, "native", tier)
            assert engine.get("/simulate").json()["requests"][-1]["body"]["priority"] == priority


def test_an_engine_without_native_priority_serves_default_at_the_default_price(frontline):
    headers, answer = ask(frontline, "fcfs", "priority")
    _, plain = ask(frontline, "fcfs", "default")
    assert answer.service_tier == headers["x-service-tier"] == "default"
    assert headers["x-service-tier-reason"] == "no_replica_honours_priority"
    assert answer.usage.estimated_cost == plain.usage.estimated_cost


def test_priority_costs_one_and_a_half_times_default_cached_tokens_included(frontline):
    ask(frontline, "native", None)  # fills the prefix cache
    costs = {tier: ask(frontline, "native", tier)[1].usage for tier in ("priority", "default")}
    tokens = {tier: usage.model_copy(update={"estimated_cost": 0}) for tier, usage in costs.items()}
    assert tokens["priority"] == tokens["default"]
    assert costs["priority"].estimated_cost == pytest.approx(1.5 * costs["default"].estimated_cost)


@pytest.mark.parametrize("value", ["gold", "", "Priority", 1, True, ["priority"], {}])
def test_other_values_are_refused_and_the_accepted_ones_listed(frontline, value):
    body = {"model": "native", "messages": MESSAGES, "service_tier": value}
    with frontline.http() as http:
        answer = http.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "service_tier")
    assert "'priority'" in error["message"] and "'flex'" in error["message"]


def test_null_is_accepted(frontline):
    body = {"model": "native", "messages": MESSAGES, "service_tier": None}
    with frontline.http() as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.json()["service_tier"] == "default"


def test_prices_and_tiers_change_without_a_restart(frontline):
    def offer(priority, price):
        frontline.deploy(
            simulated_app(
                "changing",
                settings={
                    "tiers": {"priority": priority, "flex": False},
                    "rate_card": {"input": price, "output": 0},
                },
            )
        )

    def price():
        return (frontline.entry("changing") or {"metadata": {"pricing": {"default": {}}}})[
            "metadata"
        ]["pricing"]["default"].get("input_tokens")

    offer("auto", 3)
    try:
        frontline.wait_ready("changing")
        before = frontline.snapshot("changing").replicas[0].replica_id
        assert ask(frontline, "changing", "priority")[0]["x-service-tier"] == "priority"
        assert ask(frontline, "changing", "flex")[0]["x-service-tier"] == "default"

        offer("off", 5)
        eventually(lambda: price() == 5)
        headers, _ = ask(frontline, "changing", "priority")
        assert headers["x-service-tier"] == "default"
        assert headers["x-service-tier-reason"] == "model_does_not_offer_tier"

        offer("queue", 7)
        eventually(lambda: price() == 7)
        assert ask(frontline, "changing", "priority")[0]["x-service-tier"] == "priority"
        assert frontline.snapshot("changing").replicas[0].replica_id == before
    finally:
        frontline.remove("changing")


def test_a_model_without_native_priority_can_sell_its_line(frontline):
    settings = {"tiers": {"priority": "queue"}}
    frontline.deploy(simulated_app("inline", settings=settings, policy="fcfs"))
    try:
        frontline.wait_ready("inline")
        headers, answer = ask(frontline, "inline", "priority")
        assert answer.service_tier == headers["x-service-tier"] == "priority"
        with frontline.engine("inline") as engine:
            seen = engine.get("/simulate").json()["requests"][-1]["body"]
        assert "priority" not in seen, "the engine has no priority in force"
    finally:
        frontline.remove("inline")
