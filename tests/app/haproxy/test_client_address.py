"""The client's address from HAProxy to a whole ingress, over real sockets."""

import asyncio
from contextlib import asynccontextmanager
from ipaddress import ip_network

import httpx
import pytest
import uvicorn
from ray.serve._private.haproxy import BackendConfig, ServerConfig

from app.config.ingress import IngressSettings
from app.config.model import ModelSettings
from app.haproxy.config import CLIENT_HEADER, client_proof
from app.tenants.scope import KeyScope
from deployments.simulator.__main__ import Server
from tests.app.haproxy.test_config import free_ports, running, write_serves
from tests.support.world import KEYS, World

pytestmark = pytest.mark.unit

ENVIRON = {"RAY_AUTH_TOKEN": "0123456789abcdef"}
FORGED = [{}, {"x-forwarded-for": "10.0.0.1"}, {CLIENT_HEADER: "x 10.0.0.1"}]


@pytest.fixture
async def world(tmp_path, monkeypatch):
    for tenant, network in (("here", "127.0.0.0/8"), ("elsewhere", "10.0.0.0/8")):
        scope = KeyScope(addresses=frozenset({ip_network(network)}))
        monkeypatch.setitem(KEYS, tenant, {"scope": scope})
    made = World(tmp_path, timeout_s=30)
    made.services.proxy_proof = client_proof(ENVIRON)
    await made.start()
    await made.set(ModelSettings(), ["vllm"])
    yield made
    await made.close()


@asynccontextmanager
async def served(world, folder):
    """Serve an ingress behind HAProxy, and return the URLs of both."""

    async def replica(scope, receive, send):
        if scope["path"] != "/-/healthz":
            await world.front(scope, receive, send)
            return
        # Serve answers it around the application.
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    config = uvicorn.Config(
        replica, host="127.0.0.1", port=0, loop="none", lifespan="off", log_config=None,
        log_level="critical", access_log=False, ws="none",
    )  # fmt: skip
    server = Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0)
    own = server.servers[0].sockets[0].getsockname()[1]
    port, metrics, stats = free_ports(3)
    backend = BackendConfig(
        name="ingress", path_prefix="/", app_name="i",
        servers=[ServerConfig("s", "127.0.0.1", own)],
    )  # fmt: skip
    path = write_serves(folder, [backend], port, metrics_port=metrics, stats_port=stats)
    try:
        with running(path, ENVIRON):
            yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{own}"
    finally:
        server.should_exit = True
        await task


async def test_a_client_is_known_by_what_haproxy_saw_and_by_nothing_else(world, tmp_path):
    (tmp_path / "proxy").mkdir()
    async with served(world, tmp_path / "proxy") as (proxy, direct), httpx.AsyncClient() as http:

        async def status(base, tenant, more):
            headers = {"x-api-key": world.key(tenant)} | more
            return (await http.get(f"{base}/v1/me", headers=headers)).status_code

        for more in FORGED:
            assert await status(proxy, "here", more) == 200
            assert await status(proxy, "elsewhere", more) == 403
            # Past HAProxy nothing is known, though uvicorn itself believes a loopback address.
            assert await status(direct, "here", more) == 403
            assert await status(direct, "elsewhere", more) == 403
        trusting = world.services.settings.model_dump() | {"trusted_proxies": ["127.0.0.1"]}
        world.services.settings = IngressSettings.model_validate(trusting)
        named = {"x-forwarded-for": "127.0.0.9, 10.0.0.1"}
        assert await status(proxy, "elsewhere", named) == 200
        assert await status(proxy, "here", named) == 403
        assert await status(direct, "elsewhere", named) == 403
