import asyncio
import contextlib

import orjson
import pytest

from app.contracts.news import ModelNews
from app.core.errors import Unavailable
from app.history.rings import SECONDS
from app.web import feed as feed_module
from app.web.event_stream import EventStream
from app.web.feed import BEHIND, MOST_VIEWERS, BoardFeed
from tests.support.waiting import until

pytestmark = pytest.mark.unit


class Models:
    """Models that add a point whenever they are asked."""

    def __init__(self, *names):
        self.lives = dict.fromkeys(names, "life")
        self.points = {name: [] for name in names}
        self.away = set()
        self.asked = 0
        self.fails = False

    async def news(self, seen):
        self.asked += 1
        if self.fails:
            self.fails = False
            raise RuntimeError("broken")
        return {name: self._news(name, *seen.get(name, ("", 0))) for name in self.lives}

    def _news(self, name, life, number):
        if name in self.away:
            return None
        points = self.points[name]
        points.append(len(points) + 1)
        new = points[number if life == self.lives[name] else 0 :]
        rows = tuple(b"%d" % point for point in new)
        return ModelNews(self.lives[name], len(points), b'{"id":"m"}', rows, ())

    def restart(self, name):
        self.lives[name] += "+"
        self.points[name] = []


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(feed_module, "POINT_S", 0.005)


@contextlib.contextmanager
def viewer(feed):
    one = feed.join()
    try:
        yield one
    finally:
        feed.leave(one)


def events_in(piece):
    for text in piece.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in text.splitlines())
        if "event" in fields:
            yield fields["event"], orjson.loads(fields["data"])


class Page:
    """Keeps what a page keeps."""

    def __init__(self):
        self.rows, self.tick = {}, None

    async def read(self, viewer, enough):
        events = viewer.events()
        async for piece in events:
            for kind, data in events_in(piece):
                if kind == "tick":
                    self.tick = data
                    continue
                known = [] if data["anew"] else self.rows[data["application"]]
                self.rows[data["application"]] = known + data["fine"]
            if enough(self):
                await events.aclose()
                return


def has(count, name="a"):
    return lambda page: len(page.rows.get(name, ())) >= count


async def test_a_viewer_gets_every_point_once_whenever_it_comes():
    models = Models("a", "b")
    feed = BoardFeed(models)
    with viewer(feed) as first:
        one, late = Page(), Page()
        await one.read(first, has(3))
        with viewer(feed) as second:
            await late.read(second, has(6))
        await one.read(first, has(8))
    for page in (one, late):
        for rows in page.rows.values():
            assert rows == list(range(1, len(rows) + 1))
    assert one.tick == {"models": ["a", "b"], "away": []}


async def test_all_viewers_share_one_task_which_ends_with_the_last_of_them():
    models = Models("a")
    feed = BoardFeed(models)
    assert not feed.running
    with viewer(feed) as first, viewer(feed) as second:
        page, other = Page(), Page()
        await asyncio.gather(page.read(first, has(5)), other.read(second, has(5)))
        assert models.asked < 10
        assert feed.running
    assert not feed.running
    asked = models.asked
    await asyncio.sleep(0.03)
    assert models.asked == asked


async def test_a_restarted_model_begins_anew():
    models = Models("a")
    feed = BoardFeed(models)
    with viewer(feed) as one:
        page = Page()
        await page.read(one, has(5))
        models.restart("a")
        await page.read(one, lambda page: page.rows["a"][:1] == [1] and len(page.rows["a"]) < 5)


async def test_a_model_that_is_away_or_gone_is_told():
    models = Models("a", "b")
    feed = BoardFeed(models)
    with viewer(feed) as one:
        page = Page()
        await page.read(one, has(1, "b"))
        models.away.add("b")
        await page.read(one, lambda page: page.tick["away"] == ["b"])
        del models.lives["b"]
        await page.read(one, lambda page: page.tick["models"] == ["a"])


async def test_it_goes_on_after_a_failure():
    models = Models("a")
    feed = BoardFeed(models)
    with viewer(feed) as one:
        page = Page()
        await page.read(one, has(2))
        models.fails = True
        await page.read(one, has(5))
    assert page.rows["a"][:5] == [1, 2, 3, 4, 5]


async def test_viewers_are_bounded():
    feed = BoardFeed(Models())
    viewers = [feed.join() for _ in range(MOST_VIEWERS)]
    with pytest.raises(Unavailable):
        feed.join()
    feed.leave(viewers.pop())
    viewers.append(feed.join())
    for one in viewers:
        feed.leave(one)
    assert not feed.running


async def test_a_viewer_who_does_not_read_is_dropped_alone():
    models = Models("a")
    feed = BoardFeed(models)
    with viewer(feed) as slow, viewer(feed) as quick:
        page = Page()
        await page.read(quick, has(BEHIND + 3))
        assert slow.dropped and not quick.dropped
        pieces = [piece async for piece in slow.events()]
    assert len(pieces) <= BEHIND + 1


async def test_what_is_kept_for_viewers_is_bounded():
    models = Models("a")
    models.points["a"] = list(range(1, 5 * SECONDS))
    feed = BoardFeed(models)
    with viewer(feed) as one:
        page = Page()
        await page.read(one, has(1))
    assert len(page.rows["a"]) == SECONDS


class Browser:
    """The receiving end of an answer."""

    def __init__(self):
        self.sent, self.left, self.reads = [], asyncio.Event(), asyncio.Event()
        self.reads.set()

    async def receive(self):
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        await self.reads.wait()
        self.sent.append(message)

    @property
    def complete(self):
        return self.sent[-1].get("more_body") is False


async def ticks():
    while True:
        yield b"data: x\n\n"
        await asyncio.sleep(0.002)


def stream(ended, goes_on=lambda: True, **more):
    return EventStream(ticks(), goes_on, lambda: ended.append(True), **more)


async def test_a_stream_ends_when_its_browser_leaves():
    browser, ended = Browser(), []
    answer = asyncio.ensure_future(stream(ended)({}, browser.receive, browser.send))
    await until(lambda: len(browser.sent) > 3)
    browser.left.set()
    await answer
    assert ended == [True] and not browser.complete


async def test_a_stream_ends_by_itself_so_that_its_ingress_can():
    browser, ended = Browser(), []
    await stream(ended, longest_s=0.05)({}, browser.receive, browser.send)
    assert ended == [True] and browser.complete
    assert browser.sent[0]["status"] == 200
    assert browser.sent[1]["body"].startswith(b"retry: ")


async def test_a_stream_ends_when_it_may_not_go_on():
    browser, ended, may = Browser(), [], [True, True, False]
    await stream(ended, lambda: may.pop(0))({}, browser.receive, browser.send)
    assert ended == [True] and browser.complete
    assert sum(one.get("body") == b"data: x\n\n" for one in browser.sent) == 2


async def test_a_stream_that_is_not_read_is_broken_off():
    browser, ended = Browser(), []
    answer = asyncio.ensure_future(
        stream(ended, reads_within_s=0.03)({}, browser.receive, browser.send)
    )
    await until(lambda: len(browser.sent) > 3)
    browser.reads.clear()
    await answer
    assert ended == [True] and not browser.complete
