import asyncio
import shutil
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import alarms, supervision
from app.config.ingress import IngressSettings
from app.config.journal import JournalSettings
from app.config.model import ModelSettings
from app.contracts.status import Availability, ModelSnapshot
from app.gateway.asgi import build_api
from app.gateway.health import CANNOT_SERVE, STORE_AWAY_S, HealthReason, HealthStatus, Signs, judge
from app.gateway.registry import ModelRegistry
from app.gateway.services import Services
from app.ledger.ledger import Ledger
from app.ledger.segments import SegmentFile
from app.store.database import StoreAway
from app.tenants.access import Access
from app.tenants.keys import KeyTable, create_key
from tests.app.ledger.test_adoption import dead_journal, settled
from tests.support.records import NOON, completed
from tests.support.stores import MemoryStore
from tests.support.waiting import until

pytestmark = pytest.mark.unit

WELL = {Availability.READY: 1}
SIGNS = st.builds(
    Signs,
    started=st.booleans(),
    draining=st.booleans(),
    keys_read=st.booleans(),
    keys_away=st.booleans(),
    unreadable_keys=st.integers(0, 3),
    limits_away=st.booleans(),
    budgets_away=st.booleans(),
    budgets_unread=st.integers(0, 1),
    has_room=st.booleans(),
    store_away_s=st.floats(0, 10 * STORE_AWAY_S),
    journals_set_aside=st.integers(0, 3),
    journals_failing=st.integers(0, 3),
    failures=st.integers(0, 3),
    models=st.dictionaries(st.sampled_from(Availability), st.integers(0, 3)),
)


@given(SIGNS)
def test_it_is_unavailable_exactly_where_it_cannot_serve(signs):
    health = judge(signs)
    cannot = not signs.started or signs.draining or not signs.keys_read or not signs.has_room
    assert (health.code == 503) == cannot == (health.status is HealthStatus.UNAVAILABLE)
    assert (health.status is HealthStatus.OK) == (not health.reasons)
    assert health.status is not HealthStatus.OK or health.code == 200
    ranks = [reason in CANNOT_SERVE for reason in health.reasons]
    assert ranks == sorted(ranks, reverse=True)


@given(SIGNS, SIGNS)
def test_a_reason_comes_from_its_own_sign(one, other):
    """Two ingresses that agree on a sign agree on its reason, whatever else is wrong."""
    both = (set(judge(one).reasons), set(judge(other).reasons))
    signs = {
        "draining": HealthReason.DRAINING,
        "keys_away": HealthReason.KEYS_AWAY,
        "limits_away": HealthReason.LIMITS_AWAY,
        "budgets_away": HealthReason.BUDGETS_AWAY,
        "budgets_unread": HealthReason.BUDGETS_UNREAD,
        "started": HealthReason.STARTING,
        "has_room": HealthReason.LEDGER_UNAVAILABLE,
        "keys_read": HealthReason.KEYS_NEVER_READ,
    }
    for name, reason in signs.items():
        same = getattr(one, name) == getattr(other, name)
        assert same == ((reason in both[0]) == (reason in both[1]))


@pytest.mark.parametrize(
    ("signs", "status", "reasons"),
    [
        (Signs(models=WELL), "ok", ()),
        (Signs(), "degraded", ("no_model_ready",)),
        (Signs(models={Availability.ASLEEP: 2}), "degraded", ("no_model_ready",)),
        (Signs(models=WELL, store_away_s=STORE_AWAY_S - 1), "ok", ()),
        (Signs(models=WELL, store_away_s=STORE_AWAY_S), "degraded", ("store_away",)),
        (Signs(models=WELL, failures=1), "degraded", ("background_failures",)),
        (Signs(models=WELL, unreadable_keys=1), "degraded", ("keys_unreadable",)),
        (Signs(models=WELL, journals_set_aside=1), "degraded", ("journals_set_aside",)),
        (Signs(models=WELL, journals_failing=1), "degraded", ("journals_failing",)),
        (Signs(models=WELL, keys_away=True), "degraded", ("keys_away",)),
        (Signs(models=WELL, limits_away=True), "degraded", ("limits_away",)),
        (Signs(keys_read=False, keys_away=True, models=WELL), "unavailable",
         ("keys_never_read", "keys_away")),
    ],
)  # fmt: skip
def test_codes(signs, status, reasons):
    health = judge(signs)
    assert (health.status, health.reasons) == (status, reasons)


class Keys:
    def __init__(self):
        self.error, self.table_now = None, KeyTable({})

    def table(self):
        if self.error is not None:
            raise self.error
        return self.table_now


class OneModel(ModelRegistry):
    def __init__(self):
        super().__init__(None, discover_s=1)

    def models(self):
        return [ModelSnapshot("secret/name", (), "", 0, ModelSettings(), ())]


@pytest.fixture
def services(monkeypatch):
    monkeypatch.setattr("app.gateway.health_route.PROCESS", supervision.Registry())
    made = Services(OneModel(), None, IngressSettings())
    made.ready.set()
    return made


@pytest.fixture
async def ask(services):
    transport = httpx.ASGITransport(build_api(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://10.0.0.5:8000") as client:

        async def get(path="/health", **headers):
            async with asyncio.timeout(1):
                answer = await client.get(path, headers=headers)
            return answer.status_code, answer.json()

        yield get


@pytest.mark.parametrize("prefix", ["", "/v1/openai"])
async def test_liveness_says_only_that_the_event_loop_runs(services, ask, prefix):
    services.ready.clear()
    services.draining = True
    assert await ask(f"{prefix}/livez") == (200, {"status": "alive"})
    code, body = await ask(f"{prefix}/health")
    assert (code, body["reasons"]) == (503, ["starting", "draining", "no_model_ready"])


async def test_models_are_named_to_who_may_see_them(services, ask):
    code, body = await ask()
    assert (code, body["status"], body["model_states"]) == (200, "degraded", {"starting": 1})
    assert "models" not in body, "DNS rebinding would find this ingress by another name"
    assert (await ask(host="localhost"))[1]["models"] == {"secret/name": "starting"}
    keys = Keys()
    key, text = create_key("acme", created=NOON)
    keys.table_now = KeyTable.of([key])
    services.settings = IngressSettings(auth="keys")
    services.access = Access("one", keys, None)
    services.access.start()
    try:
        await until(lambda: services.access.keys_read)
        assert "models" not in (await ask(host="localhost"))[1]
        wrong = text[:-1] + ("1" if text.endswith("0") else "0")
        assert "models" not in (await ask(authorization=f"Bearer {wrong}"))[1]
        assert (await ask(authorization=f"Bearer {text}"))[1]["models"]
    finally:
        await services.access.stop()


async def test_keys_that_were_never_read_and_keys_that_are_away(services, ask, monkeypatch):
    monkeypatch.setattr("app.tenants.key_cache.REFRESH_S", 0.02)
    monkeypatch.setattr("app.tenants.key_cache.SOONEST_S", 0.01)
    keys = Keys()
    keys.error = StoreAway("gone")
    services.access = access = Access("one", keys, None)
    access.start()
    try:
        await until(lambda: access.keys_away)
        code, body = await ask(authorization="Bearer fl-" + "0" * 16 + "-" + "0" * 64)
        assert (code, body["reasons"][0]) == (503, "keys_never_read")
        keys.error, keys.table_now = None, KeyTable.of([], {"bad": "no key"})
        await until(lambda: access.keys_read)
        assert (await ask())[1]["reasons"][0] == "keys_unreadable"
        keys.error = StoreAway("gone")
        await until(lambda: access.keys_away)
        code, body = await ask()
        assert (code, body["reasons"][:2]) == (200, ["keys_away", "keys_unreadable"])
    finally:
        await access.stop()


async def test_journals_that_are_set_aside_or_cannot_be_moved(services, ask, tmp_path, monkeypatch):
    """59dfe9e: only the log knew of them."""
    alarms_of_test = alarms.Alarms()
    monkeypatch.setattr(alarms, "PROCESS", alarms_of_test)
    damaged = dead_journal(tmp_path, [b"no frame\n", *settled(completed("b"))], "1" * 32)
    stuck = dead_journal(tmp_path, settled(completed("a")), "2" * 32)
    (stuck / "00000002.journal").mkdir()
    settings = JournalSettings(flush_interval_s=0.01, adopt_interval_s=0.01)
    services.ledger = ledger = Ledger(tmp_path, settings, MemoryStore())
    try:
        await until(lambda: ledger.journals_set_aside and ledger.journals_failing)
        code, body = await ask()
        assert (code, body["reasons"][:2]) == (200, ["journals_set_aside", "journals_failing"])
        assert alarms_of_test.counts() == {"journal set aside": 1, "journal not moved": 1}
        for journal in (damaged.with_name(f"{damaged.name}.damaged"), stuck):
            shutil.rmtree(journal)
        await until(lambda: not ledger.journals_set_aside and not ledger.journals_failing)
        assert (await ask())[1]["reasons"] == ["no_model_ready"]
    finally:
        await ledger.close()


def refuse(segment, data):
    raise OSError("the disk is broken")


async def test_a_store_that_is_away_and_a_ledger_that_refuses(services, ask, tmp_path, monkeypatch):
    store = MemoryStore()
    store.away = True
    settings = JournalSettings(flush_interval_s=0.02)
    services.ledger = ledger = Ledger(tmp_path, settings, store)
    try:
        await until(lambda: ledger.store_away_s(time.monotonic()))
        assert "store_away" not in (await ask())[1]["reasons"]
        monkeypatch.setattr("app.gateway.health.STORE_AWAY_S", 0.0)
        code, body = await ask()
        assert (code, body["reasons"][0]) == (200, "store_away")
        monkeypatch.setattr("app.gateway.health.STORE_AWAY_S", STORE_AWAY_S)
        store.away = False
        await until(lambda: not ledger.store_away_s(time.monotonic()))
        with monkeypatch.context() as failing:
            failing.setattr(SegmentFile, "write", refuse)
            settling = asyncio.create_task(ledger.settle(completed("late")))
            await until(lambda: not ledger.has_room)
            code, body = await ask()
            assert (code, body["status"], body["reasons"][0]) == (
                503, "unavailable", "ledger_unavailable",
            )  # fmt: skip
        await settling
        assert (await ask())[0] == 200
    finally:
        await ledger.close()


async def test_background_work_that_failed_is_told_without_its_name(services, ask, monkeypatch):
    registry = supervision.Registry()
    monkeypatch.setattr("app.gateway.health_route.PROCESS", registry)
    registry.failed("inner works", RuntimeError("/secret/path"))
    code, body = await ask()
    assert (code, body["reasons"][0]) == (200, "background_failures")
    assert "inner" not in str(body) and "secret" not in str(body)
