import asyncio

import pytest
from sqlalchemy import event

from app.ingress import Ingress
from app.store.database import connect

pytestmark = pytest.mark.unit


class NoModels:
    """No Serve application, and no Ray to ask."""

    async def applications(self):
        return set()


@pytest.fixture
def stores(monkeypatch):
    """Every engine that the ingress makes, and which of them it has closed."""
    made, closed = [], []

    def noted(url):
        engine = connect(url)
        made.append(engine)
        event.listen(engine, "engine_disposed", closed.append)
        return engine

    async def loopback():
        return "127.0.0.1"

    # It would be of the whole test run.
    monkeypatch.setattr("app.ingress.settle_in", lambda: None)
    monkeypatch.setattr("app.ingress.connect", noted)
    monkeypatch.setattr("app.ingress.serve_host", loopback)
    monkeypatch.setattr("app.ingress.ServeSource", NoModels)
    return made, closed


async def test_settings_change_without_leaving_anything_behind(stores, tmp_path, monkeypatch):
    made, closed = stores
    ingress, end = Ingress(None), Ingress.__del__
    # Serve awaits it; Python, which cannot, would call it once more.
    monkeypatch.delattr(Ingress, "__del__")

    async def change(ledger="one", folder="a", auth="open"):
        config = {
            "auth": auth,
            "ledger": f"sqlite:///{tmp_path}/{ledger}.db",
            "journal": {"folder": str(tmp_path / folder), "segment_mb": 1},
        }
        await ingress.reconfigure(config)

    await change()
    await change(auth="keys")
    await change(auth="keys", folder="b")
    assert (len(made), closed) == (1, [])
    await change(auth="keys", folder="b", ledger="two")
    async with asyncio.timeout(10):
        while ingress._retiring:
            await asyncio.sleep(0.01)
    assert (len(made), closed) == (2, made[:1])
    await end(ingress)
    assert closed == made
