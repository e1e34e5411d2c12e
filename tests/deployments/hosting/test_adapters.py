"""The adapters of a running engine, as they are wanted at last."""

import asyncio
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import alarms
from app.contracts.adapters import WantedAdapter
from app.upstream.http1 import ConnectionLost
from deployments.hosting.adapters import LINGER_S, RETRY_S, AdapterKeeper

pytestmark = pytest.mark.unit

A, B = WantedAdapter("a", "/a"), WantedAdapter("b", "/b")


class Engine:
    """An engine that loads what is on its disk, and a clock."""

    def __init__(self, *folders):
        self.folders, self.loaded, self.now, self.calls = set(folders), {}, 0.0, []
        self.lost = 0
        self.keeper = AdapterKeeper(
            self.load, self.unload, self.listed, "engine", clock=lambda: self.now
        )

    async def _answer(self, what):
        self.calls.append(what)
        if self.lost:
            self.lost -= 1
            raise ConnectionLost("gone")

    async def load(self, lora):
        await self._answer(("load", lora.name))
        assert lora.name not in self.loaded, "the engine would refuse it"
        if lora.path not in self.folders:
            return f"no adapter at {lora.path}"
        self.loaded[lora.name] = lora.path
        return ""

    async def unload(self, name):
        await self._answer(("unload", name))
        return "" if self.loaded.pop(name, None) else "no such adapter"

    async def listed(self):
        return frozenset({"model", *self.loaded})

    async def at(self, now):
        self.now = now
        await self.keeper.settle()
        return self.keeper.serving


def raised(name):
    return alarms.PROCESS.counts().get(name, 0)


async def test_what_is_wanted_is_loaded_and_what_is_not_lingers_unserved():
    engine = Engine("/a", "/b")
    engine.keeper.want((A,))
    assert await engine.at(0) == {"a"}
    engine.keeper.want((B,))
    assert engine.keeper.serving == set(), "no ingress sends it requests any more"
    assert await engine.at(1) == {"b"}
    assert engine.loaded.keys() == {"a", "b"}, "requests that were placed before find it"
    engine.keeper.want(())
    engine.keeper.want((B,))
    assert await engine.at(LINGER_S) == {"b"}
    assert engine.loaded == {"b": "/b"}
    assert engine.calls == [("load", "a"), ("load", "b"), ("unload", "a")]


async def test_an_adapter_that_is_wanted_again_in_time_is_not_loaded_again():
    engine = Engine("/a")
    engine.keeper.want((A,))
    await engine.at(0)
    engine.keeper.want(())
    engine.keeper.want((A,))
    assert engine.keeper.serving == {"a"}
    assert await engine.at(100) == {"a"}
    assert engine.calls == [("load", "a")]


async def test_another_folder_of_the_same_name_is_loaded_once_the_first_is_gone():
    engine, moved = Engine("/a", "/new"), WantedAdapter("a", "/new")
    engine.keeper.want((A,))
    await engine.at(0)
    engine.keeper.want((moved,))
    assert await engine.at(1) == set()
    await engine.at(1 + LINGER_S)
    assert await engine.at(1 + LINGER_S) == {"a"}
    assert engine.loaded == {"a": "/new"}


async def test_a_failed_load_is_told_and_tried_again_and_concerns_no_other(caplog):
    engine, before = Engine("/b"), raised("adapter not loaded")
    engine.keeper.want((A, B))
    with caplog.at_level(logging.ERROR):
        assert await engine.at(0) == {"b"}
    assert raised("adapter not loaded") == before + 1
    failed, loaded = engine.keeper.states
    assert (failed.wanted, failed.loaded, failed.why_not) == (A, False, "no adapter at /a")
    assert (loaded.wanted, loaded.loaded, loaded.why_not) == (B, True, "")
    engine.folders.add("/a")
    assert await engine.at(RETRY_S - 1) == {"b"}
    assert await engine.at(RETRY_S) == {"a", "b"}
    assert not any(one.why_not for one in engine.keeper.states)


async def test_a_variable_that_is_not_set_is_a_failure_like_others(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    engine = Engine()
    engine.keeper.want((WantedAdapter("a", "${NOT_SET}/a"),))
    assert await engine.at(0) == set()
    [state] = engine.keeper.states
    assert "NOT_SET" in state.why_not and not engine.calls


async def test_a_load_whose_answer_was_lost_is_done_anew():
    """The engine has it, and would refuse to load it twice."""
    engine = Engine("/a")
    engine.loaded["a"] = "/another"
    engine.keeper.want((A,))
    assert await engine.at(0) == {"a"}
    assert engine.loaded == {"a": "/a"}
    assert engine.calls == [("unload", "a"), ("load", "a")]


async def test_an_engine_that_does_not_list_it_afterwards_has_not_loaded_it():
    engine = Engine("/a")

    async def listed():
        return frozenset({"model"})

    engine.keeper = AdapterKeeper(engine.load, engine.unload, listed, "engine")
    engine.keeper.want((A,))
    await engine.keeper.settle()
    [state] = engine.keeper.states
    assert not state.loaded and "does not list" in state.why_not


async def test_an_unload_whose_answer_is_lost_is_tried_again():
    engine, before = Engine("/a"), raised("adapter not unloaded")
    engine.keeper.want((A,))
    await engine.at(0)
    engine.keeper.want(())
    engine.lost = 1
    await engine.at(LINGER_S)
    assert raised("adapter not unloaded") == before + 1
    await engine.at(LINGER_S + RETRY_S)
    assert not engine.loaded


@given(
    steps=st.lists(
        st.tuples(
            st.lists(st.sampled_from([A, B, WantedAdapter("a", "/2")]), unique_by=lambda w: w.name),
            st.floats(0, 40),
            st.integers(0, 1),
        )
    )
)
async def test_at_last_the_engine_has_what_is_wanted(steps):
    engine = Engine("/a", "/b", "/2")
    for wanted, after_s, lost in steps:
        engine.keeper.want(tuple(wanted))
        engine.lost = lost
        serving = await engine.at(engine.now + after_s)
        assert {name: engine.loaded[name] for name in serving}.items() <= {
            (one.name, one.path) for one in wanted
        }
    engine.lost = 0
    for _ in range(4):
        await engine.at(engine.now + RETRY_S)
    wanted = {one.name: one.path for one in (steps[-1][0] if steps else ())}
    assert engine.loaded == wanted
    assert engine.keeper.serving == wanted.keys()


async def test_it_does_so_by_itself():
    engine = Engine("/a")
    running = asyncio.create_task(engine.keeper.run())
    engine.keeper.want((A,))
    async with asyncio.timeout(10):
        while engine.keeper.serving != {"a"}:
            await asyncio.sleep(0)
    running.cancel()
