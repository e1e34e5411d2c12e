"""Which replica requests prefer that a client names as belonging together."""

import pytest

from app.config.ingress import IngressSettings
from app.core.dialect import Route
from tests.support.world import ALIAS, Seen, World

pytestmark = pytest.mark.unit


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    await made.start()
    yield made
    await made.close()


async def prefixes(world, monkeypatch, *requests):
    """Return what the scheduler is given of each request."""
    from app.flow.scheduler import Scheduler

    arrive, found = Scheduler.arrive, []

    def noted(self, request, now):
        found.append(request.prefix)
        return arrive(self, request, now)

    monkeypatch.setattr(Scheduler, "arrive", noted)
    for number, more in enumerate(requests):
        messages = [{"role": "user", "content": f"question {number}"}]
        fields = {"model": ALIAS, "messages": messages, "max_tokens": 1, **more}
        await world.ask(Seen(None, []), Route.CHAT, fields, "plain")
    return found


@pytest.mark.parametrize("by_user", [True, False])
async def test_a_prompt_cache_key_or_where_set_a_user(world, monkeypatch, by_user):
    from app.config.model import ModelSettings

    world.services.settings = IngressSettings(auth="keys", affinity_by_user=by_user)
    await world.set(ModelSettings(), ["vllm"])
    key, user = {"prompt_cache_key": "k"}, {"user": "u"}
    found = await prefixes(world, monkeypatch, key, key, user, user, key | user, {})
    assert found[0] == found[1] == found[4]
    assert (found[2] == found[3]) is by_user
    assert len(set(found)) == (3 if by_user else 4)
