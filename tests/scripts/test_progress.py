import asyncio
import io
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from scripts.bench import fill, guard_attacks, ledger
from scripts.bench.progress import EVERY_S, steps

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def run(items, took_s, *, terminal=False, **more):
    """Take each item for its time; return the items and what was shown."""
    clock, shown = Clock(), io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=100)
    got = []
    for item, seconds in zip(steps(items, "work", console, clock=clock, **more), took_s):  # noqa: B905
        got.append(item)
        clock.now += seconds
    return got, shown.getvalue()


def test_without_a_terminal_there_are_plain_lines():
    _, shown = run(range(4), [6.0, 1.0, 200.0, 1.0, 0])
    assert shown.splitlines() == [
        "work: 1 of 4, 6 s, about 18 s left",
        "work: 3 of 4, 3 min, about 69 s left",
    ]


def test_what_is_quick_shows_nothing():
    assert run(range(100), [EVERY_S / 200] * 101)[1] == ""


def test_on_a_terminal_there_is_a_bar_with_what_is_left():
    got, shown = run(iter("abcd"), [6.0] * 5, terminal=True, total=4)
    assert got == list("abcd") and "work" in shown and "4/4" in shown and "left" in shown


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=50), st.booleans())
def test_every_item_comes_once_and_there_are_few_lines(took_s, terminal):
    items = list(range(len(took_s)))
    got, shown = run(items, [*took_s, 0], terminal=terminal)
    assert got == items
    if not terminal:
        assert len(shown.splitlines()) <= sum(took_s) / EVERY_S


def test_an_error_of_a_step_ends_it():
    with pytest.raises(ValueError):
        for _ in steps([1, 2], "work", Console(file=io.StringIO(), force_terminal=True)):
            raise ValueError


class Idle:
    """A load that asks for nothing."""

    def __init__(self, *_, **__):
        self.answers, self.open = [], []

    async def ask_for_ever(self, *_):
        await asyncio.sleep(60)

    async def close(self):
        pass


async def nothing(*_):
    return "nothing"


async def run_ledger():
    await ledger.measure_all(None, 40)


async def run_attacks():
    url = httpx.URL("http://nowhere")
    targets = [guard_attacks.Target(name, url, {}, "m") for name in ("server", "guard")]
    await guard_attacks.attack_all(targets)


async def run_fill():
    contenders = [SimpleNamespace(endpoint=SimpleNamespace(name=name)) for name in "ab"]
    trials = await fill.run_fill(contenders, None, 2, 0.0, lambda text: None)
    assert all(sum(map(len, one.windows.values())) == len(fill.ORDER) for one in trials)


@pytest.mark.parametrize(
    ("benchmark", "what", "count"),
    [(run_ledger, "ledger", 12), (run_attacks, "attacks", 12), (run_fill, "fill", 10)],
    ids=["ledger", "guard_attacks", "fill"],
)
async def test_a_benchmark_of_minutes_shows_how_far_it_is(
    monkeypatch, capsys, benchmark, what, count
):
    """a94f7f2: these showed nothing but results."""
    monkeypatch.setattr("scripts.bench.progress.EVERY_S", 0.0)
    for name in ("unary", "measure", "measure_paced"):
        monkeypatch.setattr(ledger, name, nothing)
    attacks = [lambda target: nothing()] * len(guard_attacks.ATTACKS)
    for attack in attacks:
        attack.__name__ = "attack"
    monkeypatch.setattr(guard_attacks, "ATTACKS", attacks)
    monkeypatch.setattr(fill, "Load", Idle)
    await benchmark()
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in shown] == [
        f"{what}: {done} of {count}" for done in range(1, count)
    ]
