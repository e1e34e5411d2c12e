import pytest

from app.core.dialect import Dialect, Route
from app.core.tiers import Tier
from deployments.engines.tensorrt_llm_requests import CLIENT_FIELDS
from deployments.hosting.probe import probe_request

pytestmark = pytest.mark.unit

VALUES = {Tier.PRIORITY: -100, Tier.DEFAULT: 0, Tier.FLEX: 100}


@pytest.mark.parametrize("route", list(Route))
def test_a_probe_asks_for_one_token_ahead_of_all_others(route):
    request = probe_request("m", route, Dialect("e", False, VALUES, frozenset(Route)))
    assert request["model"] == "m" and request["priority"] == -100
    assert request[route.prompt_field]
    limits = {name: value for name, value in request.items() if "max" in name}
    assert set(limits.values()) == ({1} if route is not Route.EMBEDDINGS else set())


@pytest.mark.parametrize("sign", [1, -1])
def test_a_probe_takes_the_slot_of_a_running_priority_request(sign):
    values = {tier: sign * value for tier, value in VALUES.items()}
    dialect = Dialect("e", False, values, frozenset({Route.CHAT}), preempts=True)
    assert probe_request("m", Route.CHAT, dialect)["priority"] == sign * -200
    assert "priority" not in probe_request("m", Route.COMPLETIONS, dialect)


@pytest.mark.parametrize("route", list(CLIENT_FIELDS))
def test_a_strict_engine_accepts_it(route):
    request = probe_request("m", route, Dialect("e"))
    assert request.keys() <= CLIENT_FIELDS[route] | {"model"}
