import pytest

from app.core.tiers import Tier
from app.gateway.services import Services
from app.observe.observers import Ended, Observers
from scripts.bench.switchable import UNOBSERVED, Switchable
from tests.support import records

pytestmark = pytest.mark.unit

NAME, VALUE = (part.encode() for part in UNOBSERVED.split(": "))


class Registry:
    """Takes what services set, and has no models."""

    traffic = None


@pytest.mark.parametrize(
    ("headers", "counted"), [([], 1), ([(NAME, VALUE)], 0), ([(NAME, b"on")], 1)]
)
async def test_a_request_chooses_whether_its_end_is_counted(headers, counted):
    services = Services(Registry(), None, None)

    async def front(scope, receive, send):
        services.observers.ended(Ended(records.completed(served=Tier.FLEX, requested=None), 200))

    app = Switchable(services, front)
    await app({"type": "http", "headers": headers}, None, None)
    assert services.tallies.of("m").requests == counted
    await app({"type": "http", "headers": []}, None, None)
    assert services.tallies.of("m").requests == counted + 1
    assert isinstance(services.observers, Observers)
