import io
import time

import pytest

from app.cli import progress
from app.cli.progress import AFTER_S, EVERY_S, counted, counting, working

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def go_over(stream, clock, items, each_s):
    seen = []
    for item in counted(range(items), "exporting", stream, clock):
        seen.append(item)
        clock.now += each_s
    assert seen == list(range(items))
    return stream.getvalue()


def test_what_is_soon_done_shows_nothing():
    assert go_over(io.StringIO(), Clock(), 1000, AFTER_S / 2000) == ""


def test_lines_come_now_and_then_where_there_is_no_terminal():
    shown = go_over(io.StringIO(), Clock(), 12_800, 0.001).splitlines()
    assert len(shown) == 2 + int((12.8 - AFTER_S) / EVERY_S)
    assert shown[-1] == "exporting: 12,800 records, 1,000/s, 13 s"


def test_a_terminal_shows_one_line_that_changes():
    shown = go_over(Terminal(), Clock(), 12_800, 0.001)
    assert shown.count("\r") > 10 and shown.count("\n") == 1
    assert shown.endswith("exporting: 12,800 records, 1,000/s, 13 s\x1b[K\n")


def test_what_fails_says_how_far_it_came():
    stream, clock = io.StringIO(), Clock()
    with pytest.raises(OSError), counting("moving", stream, clock) as add:
        clock.now = 10.0
        add(500)
        raise OSError
    assert stream.getvalue().splitlines()[-1] == "moving: 500 records, 50/s, 10 s"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["plain", "terminal"])
def test_what_the_database_does_as_a_whole_shows_how_long_it_takes(stream, monkeypatch):
    for name in ("AFTER_S", "EVERY_S", "LIVE_S"):
        monkeypatch.setattr(progress, name, 0.01)
    with working("adding up", stream):
        while stream.getvalue().count("adding up: 0 s") < 2:
            time.sleep(0.01)
    shown = stream.getvalue()
    assert shown.endswith("\n")
    assert shown.count("\n") == (1 if stream.isatty() else shown.count("adding up"))


def test_what_the_database_does_at_once_shows_nothing():
    stream = io.StringIO()
    with pytest.raises(OSError), working("adding up", stream):
        raise OSError
    assert stream.getvalue() == ""
