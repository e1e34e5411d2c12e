import asyncio

import pytest

from app.core.dialect import Dialect, Route
from app.core.tiers import Tier
from deployments.engines.tensorrt_llm_requests import CLIENT_FIELDS
from deployments.hosting import probe
from deployments.hosting.probe import HangProbe, probe_request, probe_route

pytestmark = pytest.mark.unit

VALUES = {Tier.PRIORITY: -100, Tier.DEFAULT: 0, Tier.FLEX: 100}


@pytest.mark.parametrize("route", sorted({probe_route(route) for route in Route}))
def test_a_probe_asks_for_one_token_ahead_of_all_others(route):
    request = probe_request("m", route, Dialect("e", False, VALUES, frozenset(Route)))
    assert request["model"] == "m" and request["priority"] == -100
    assert request[route.prompt_field]
    limits = {name: value for name, value in request.items() if "max" in name}
    assert set(limits.values()) == ({1} if route.generates else set())


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


async def test_an_engine_that_answers_at_once_is_never_doubted():
    found, seen = HangProbe(5.0), []

    async def ask():
        seen.append(found.doubtful)

    await found.run(ask)
    assert (seen, found.doubtful, found.hangs) == ([False], False, False)


async def test_one_that_takes_long_is_doubted_until_it_answers(monkeypatch):
    monkeypatch.setattr(probe, "DOUBT_S", 0.0)
    found, asked, answered = HangProbe(5.0), [], asyncio.Event()

    async def ask():
        asked.append(1)
        await answered.wait()

    runs = asyncio.create_task(found.run(ask))
    while not found.doubtful:
        await asyncio.sleep(0)
    await found.run(ask)
    answered.set()
    await runs
    assert (len(asked), found.doubtful, found.hangs) == (1, False, False)


async def test_one_that_does_not_answer_hangs_for_good():
    found, asked = HangProbe(0.01), []

    async def ask():
        asked.append(1)
        await asyncio.Event().wait()

    await found.run(ask)
    await found.run(ask)
    assert (len(asked), found.doubtful, found.hangs) == (1, True, True)


async def test_one_that_has_ended_does_not_hang():
    found = HangProbe(5.0)

    async def ask():
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await found.run(ask)
    assert not found.doubtful and not found.hangs
