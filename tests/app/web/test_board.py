import asyncio
import re
from importlib.resources import files

import pytest

from app.contracts.news import ModelNews
from app.core.tiers import Tier
from app.gateway.asgi import build_api
from app.history.point import Point, ReplicaPoint, TierPoint
from app.history.rings import COARSE, COARSE_S, SECONDS
from app.web import feed
from app.web.feed import MOST_VIEWERS
from app.web.routes import add_web_routes
from tests.support.waiting import until

pytestmark = pytest.mark.unit

SCRIPT = files("app.web").joinpath("static/board.js").read_text()


class Viewer:
    """Reads `/board/events` as a browser does, which httpx's transport for tests cannot."""

    def __init__(self, services):
        self.body, self.status, self.ended = b"", None, False
        self._left = asyncio.Event()
        self._task = asyncio.ensure_future(self._look(build_api(services, add_web_routes)))

    async def _look(self, api):
        headers = [(b"host", b"127.0.0.1")]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
            "scheme": "http", "path": "/board/events", "root_path": "", "query_string": b"",
            "headers": headers, "client": None, "server": ("127.0.0.1", 80),
        }  # fmt: skip
        await api(scope, self._receive, self._send)
        self.ended = True

    async def _receive(self):
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")

    async def leave(self):
        self._left.set()
        await self._task


@pytest.fixture
def seen(services, monkeypatch):
    monkeypatch.setattr(feed, "POINT_S", 0.005)
    asked = []

    async def news(known):
        asked.append(known)
        return {"app": ModelNews("life", 1, b'{"id":"m"}', (b"[1]",), ())}

    services.registry.news = news
    return asked


async def test_events_come_until_the_viewer_leaves(services, seen):
    viewer = Viewer(services)
    await until(lambda: viewer.body.count(b"event: tick") > 2)
    assert viewer.status == 200
    assert b'data: {"application":"app","anew":true,"state":{"id":"m"},"fine":[[1]]' in viewer.body
    await viewer.leave()
    assert seen[0] == {} and seen[1] == {"app": ("life", 1)}
    count = len(seen)
    await asyncio.sleep(0.03)
    assert len(seen) == count


async def test_an_ingress_that_stops_lets_its_viewers_go(services, seen):
    viewer = Viewer(services)
    await until(lambda: b"event: tick" in viewer.body)
    services.draining = True
    await until(lambda: viewer.ended)


async def test_asking_for_the_head_starts_nothing(browser, services, seen):
    answer = await browser.head("/board/events")
    assert answer.status_code == 200 and not seen


async def test_too_many_viewers_are_refused_in_openais_shape(browser, services, seen, monkeypatch):
    monkeypatch.setattr(feed, "MOST_VIEWERS", 0)
    answer = await browser.get("/board/events")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "board_full")
    assert "retry-after" in answer.headers and MOST_VIEWERS > 0


async def test_the_page_has_what_its_script_looks_for(browser):
    page = (await browser.get("/board")).text
    for name in re.findall(r'getElementById\("(\w+)"\)', SCRIPT):
        assert f'id="{name}"' in page
    for part in re.findall(r"data-part=\"(\w+)\"", SCRIPT):
        assert f'data-part="{part}"' in page
    assert "<style" not in page and "style=" not in page and "Sign out" not in page


def test_the_script_reads_points_as_they_are_written():
    tiers = {tier: TierPoint(*range(9 * rank, 9 * rank + 9)) for rank, tier in enumerate(Tier)}
    row = Point(7.0, tiers, {"a": 1}, {"b": 2}, {"r": ReplicaPoint(3, 1, 4)}).to_row()
    places = {}
    for names, numbers in re.findall(r"const \[([A-Z0-9_, ]+)\] = \[([\d, ]+)\]", SCRIPT):
        places |= zip(names.split(", "), map(int, numbers.split(", ")), strict=True)
    assert [row[places[name]] for name in ("AT", "SHEDS", "DOWNGRADES", "REPLICAS")] == [
        7.0, {"a": 1}, {"b": 2}, {"r": [3, 1, 4]},
    ]  # fmt: skip
    fields = {
        "WAITING": "waiting", "OLDEST": "oldest_s", "RUNNING": "running",
        "SUSPENDED": "suspended", "P50": "ttft_p50_s", "P99": "ttft_p99_s",
        "USD": "usd_per_min", "TOKENS": "tokens_per_s", "REQUESTS": "requests_per_s",
    }  # fmt: skip
    for rank, tier in enumerate(Tier):
        values = row[places["OF_TIER"]][rank]
        for name, field in fields.items():
            assert values[places[name]] == getattr(tiers[tier], field)
    assert f"FINE = {{ kept: {SECONDS}, span: {SECONDS}, period: 1 }}" in SCRIPT
    span = int(COARSE * COARSE_S)
    assert f"COARSE = {{ kept: {COARSE}, span: {span}, period: {COARSE_S:g} }}" in SCRIPT
