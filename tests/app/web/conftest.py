"""Pages without a cluster: the application of an ingress, on stand-ins."""

from types import SimpleNamespace

import httpx
import pytest

from app.config.ingress import IngressSettings
from app.core import errors
from app.gateway.asgi import build_api
from app.gateway.registry import ModelRegistry
from app.gateway.services import Services
from app.ledger.record import now_utc
from app.tenants.access import Caller, caller_of
from app.tenants.keys import create_key
from app.tenants.scope import KeyScope
from app.web.routes import add_web_routes

BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


class Access:
    """Knows the key ``good``, and ``scoped``, which sees one model and an adapter of another."""

    async def identify(self, authorization):
        if authorization == "Bearer scoped":
            scope = KeyScope(models=frozenset({"org/plain", "tuned"}))
            return caller_of(create_key("tenant", created=now_utc(), scope=scope)[0])
        if authorization != "Bearer good":
            raise errors.InvalidKey(given=authorization is not None)
        return Caller("tenant")


class Models(ModelRegistry):
    """The models that a test puts into ``snapshots``."""

    def __init__(self):
        super().__init__(None, discover_s=1)
        self.snapshots = []

    def models(self):
        return self.snapshots

    def require(self, name):
        for snapshot in self.snapshots:
            if name in (snapshot.id, *snapshot.aliases, *snapshot.adapters):
                return SimpleNamespace(snapshot=snapshot)
        raise errors.ModelNotFound(name)


@pytest.fixture
def services():
    services = Services(Models(), None, IngressSettings())
    services.ready.set()
    return services


@pytest.fixture
async def browser(services):
    """An HTTP client that sends what a browser sends."""
    transport = httpx.ASGITransport(build_api(services, add_web_routes))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://127.0.0.1", headers=BROWSER
    ) as client:
        yield client


@pytest.fixture
def keys_required(services):
    services.access = Access()
    services.settings = IngressSettings.load({"auth": "keys"}, "user_config")
