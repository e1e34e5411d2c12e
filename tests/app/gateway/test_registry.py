import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from app.config.model import ModelSettings
from app.contracts.credits import Grant, Renewal
from app.contracts.news import ModelNews
from app.contracts.source import SourceAway
from app.contracts.status import ModelSnapshot, ReplicaStatus
from app.contracts.traffic import Outcome, Traffic
from app.core import errors
from app.core.dialect import Dialect, Route
from app.core.tiers import Tier
from app.flow.admission import Admission
from app.flow.credits import RENEWAL_S
from app.gateway.models_route import model_entries, model_entry
from app.gateway.registry import ModelRegistry

pytestmark = pytest.mark.unit


def snapshot(name, *aliases, native=True, ready=True, tiers=None, simulated=False):
    routes = frozenset(Route) if native else frozenset()
    dialect = Dialect("vllm", simulated, dict.fromkeys(Tier, 0), routes)
    replicas = (ReplicaStatus("r", "p", "http://x", "secret", 4, "1", 512, dialect),)
    settings = ModelSettings.load(
        {"rate_card": {"input": 1, "output": 2}, "tiers": tiers or {}}, "user_config"
    )
    return ModelSnapshot(name, aliases, "me", 7, settings, replicas if ready else ())


class FakeSource:
    """Models as a test sets them."""

    def __init__(self):
        self.models = {}
        self.broken = False
        self.reports = []
        self.silent, self.asked = set(), set()
        self.wake = asyncio.Event()

    async def applications(self):
        if self.broken:
            raise ConnectionError
        return set(self.models)

    async def renew(self, application, demand, report, known):
        if self.broken:
            raise ConnectionError
        self.asked.add(application)
        if application in self.silent:
            raise TimeoutError
        self.reports.append(report)
        model = self.models[application]
        version = str(id(model))
        grant = Grant("life", demand.number, demand.number, demand.sent_at, added={"r": 1})
        return Renewal(version, None if known == version else model, grant)

    async def news(self, application, life, number):
        if application in self.silent:
            raise SourceAway
        return ModelNews(life or "life", number + 1, b"{}", (), ())

    async def wait_for_wakeup(self, application, ingress):
        await self.wake.wait()
        self.wake.clear()
        return True


@asynccontextmanager
async def following(source, **settings):
    registry = ModelRegistry(source, discover_s=0.005, **settings)
    registry.start()
    try:
        yield registry
    finally:
        await registry.stop()


async def eventually(condition):
    async with asyncio.timeout(2):
        while not condition():
            await asyncio.sleep(0.002)


async def test_models_come_change_and_go():
    source = FakeSource()
    async with following(source) as registry:
        source.models["app"] = snapshot("org/m", "m")
        await eventually(lambda: registry.find("m"))
        admission = registry.find("org/m")
        assert admission is registry.find("m")

        source.models["app"] = snapshot("org/m", "m2")
        await eventually(lambda: registry.find("m2"))
        assert registry.find("m2") is admission, "what runs in it is still counted"
        assert registry.find("m") is None

        del source.models["app"]
        await eventually(lambda: registry.find("org/m") is None)
        assert registry.models() == []


async def test_what_is_known_stands_while_serve_is_away():
    source = FakeSource()
    source.models["app"] = snapshot("m")
    async with following(source) as registry:
        await eventually(lambda: registry.find("m"))
        source.broken = True
        await asyncio.sleep(0.05)
        assert registry.find("m")
        source.broken = False
        source.models["app"] = snapshot("m", "alias")
        await eventually(lambda: registry.find("alias"))


async def test_a_snapshot_that_could_not_be_applied_is_asked_for_again(monkeypatch):
    monkeypatch.setattr("app.supervision.FIRST_PAUSE_S", 0.01)
    source, update, failures = FakeSource(), Admission.update, [RuntimeError()]

    def fail_once(self, snapshot):
        if failures:
            raise failures.pop()
        update(self, snapshot)

    monkeypatch.setattr(Admission, "update", fail_once)
    source.models["app"] = snapshot("m")
    async with following(source) as registry:
        await eventually(lambda: registry.find("m"))


async def test_an_ingress_can_wait_until_it_knows_every_model():
    source = FakeSource()
    source.models = {"a": snapshot("m"), "b": snapshot("n")}
    async with following(source) as registry:
        await registry.wait_known(2)
        assert len(registry.models()) == 2
    source.broken = True
    async with following(source) as registry:
        start = time.monotonic()
        await registry.wait_known(0.1)
        assert time.monotonic() - start < 5 and registry.models() == []


async def test_a_name_is_unknown_only_once_every_model_has_told_its_own():
    source = FakeSource()
    source.models = {"a": snapshot("m")}
    source.broken = True
    async with following(source) as registry:
        with pytest.raises(errors.Unavailable):
            registry.require("m")
        source.broken = False
        await eventually(lambda: registry.find("m"))
        assert registry.require("m") is registry.find("m")
        with pytest.raises(errors.ModelNotFound):
            registry.require("n")

        source.silent.add("b")
        source.models["b"] = snapshot("n")
        await eventually(lambda: "b" in source.asked)
        with pytest.raises(errors.Unavailable) as raised:
            registry.require("n")
        assert raised.value.status == 503 and raised.value.headers["retry-after"] == "1"
        assert registry.require("m"), "the others are served meanwhile"
        source.silent.clear()
        await eventually(lambda: registry.find("n"))


async def test_a_model_that_never_tells_its_name_does_not_make_every_name_possible():
    source = FakeSource()
    source.models, source.silent = {"b": snapshot("n")}, {"b"}
    async with following(source, nameless_s=0.05) as registry:
        await eventually(lambda: "b" in source.asked)
        await asyncio.sleep(0.06)
        with pytest.raises(errors.ModelNotFound):
            registry.require("n")


async def test_not_every_renewal_carries_a_report():
    source = FakeSource()
    source.models["app"] = snapshot("m")
    async with following(source):
        await eventually(lambda: len(source.reports) >= 3)
    assert source.reports[0] is not None
    assert source.reports[1:3] == [None, None], "they are a quarter of a second apart"


async def test_an_ingress_renews_at_once_when_the_model_asks_for_it():
    source = FakeSource()
    source.models["app"] = snapshot("m")
    async with following(source) as registry:
        await eventually(lambda: registry.find("m"))
        for _ in range(3):
            # Between two renewals, or the next one might be taken for the answer.
            renewals = len(source.reports)
            await eventually(lambda renewals=renewals: len(source.reports) > renewals)
            renewals = len(source.reports)
            source.wake.set()
            async with asyncio.timeout(RENEWAL_S / 2):
                while len(source.reports) == renewals:
                    await asyncio.sleep(0.002)


async def test_a_name_claimed_twice_goes_to_an_id_before_an_alias():
    source = FakeSource()
    source.models = {"a": snapshot("first", "second"), "b": snapshot("second")}
    async with following(source) as registry:
        await eventually(lambda: len(registry.models()) == 2)
        assert registry.find("second").snapshot.id == "second"


@pytest.mark.parametrize(
    ("model", "tiers"),
    [
        (snapshot("m"), ["priority", "default", "flex"]),
        (snapshot("m", native=False), ["default", "flex"]),
        (snapshot("m", native=False, tiers={"priority": "queue"}), ["priority", "default", "flex"]),
        (snapshot("m", tiers={"priority": "off", "flex": False}), ["default"]),
        (snapshot("m", ready=False), []),
    ],
)
def test_the_list_tells_what_would_be_served_now(model, tiers):
    entry = model_entry(model)
    assert entry["service_tiers"] == tiers
    assert ("priority" in entry["metadata"]["tags"]) == ("priority" in tiers)
    if tiers:
        assert list(entry["metadata"]["pricing"]) == tiers


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [([], False), ([True], True), ([True, True], True), ([True, False], False), ([False], False)],
)
def test_the_list_shows_whether_all_replicas_for_priority_preempt(replicas, expected):
    model = snapshot("m")
    [native], [plain] = model.replicas, snapshot("m", native=False).replicas
    preempting = replace(native, dialect=replace(native.dialect, preempts=True))
    made = [preempting if preempts else native for preempts in replicas]
    for more in ([], [plain]):
        entry = model_entry(replace(model, replicas=(*made, *more)))
        assert entry["metadata"]["preempts"] is expected


def test_an_entry_has_prices_by_tier_context_and_engines():
    entry = model_entry(snapshot("m", "alias", simulated=True))
    metadata = entry["metadata"]
    assert (entry["object"], entry["created"], entry["owned_by"]) == ("model", 7, "me")
    assert metadata["pricing"]["default"]["input_tokens"] == 1
    assert metadata["pricing"]["priority"]["output_tokens"] == 3
    assert metadata["pricing"]["priority"]["cache_read_tokens"] == 1.5
    assert "long_context" not in metadata["pricing"]["default"]
    assert metadata["context_length"] == 512
    assert metadata["engines"] == ["vllm"]
    assert metadata["aliases"] == ["alias"]
    assert "simulated" in metadata["tags"]
    assert "secret" not in str(entry)


def everything(name):
    return True


def test_an_entry_has_at_the_top_what_clients_of_other_servers_read():
    model = snapshot("m", "alias", "other")
    for entry in model_entries(model, everything, aliases=True):
        assert entry["context_length"] == entry["max_model_len"] == model.context_length
        assert entry["service_tiers"] == ["priority", "default", "flex"]


def test_an_entry_lists_the_routes_of_its_engines():
    model = snapshot("m")
    [one] = model.replicas
    dialect = replace(one.dialect, routes=frozenset({Route.MESSAGES, Route.CHAT}))
    other = replace(one, dialect=replace(one.dialect, routes=frozenset({Route.EMBEDDINGS})))
    made = replace(model, replicas=(replace(one, dialect=dialect), other))
    assert model_entry(made)["metadata"]["routes"] == ["chat/completions", "embeddings", "messages"]
    assert model_entry(replace(model, replicas=()))["metadata"]["routes"] == []


@pytest.mark.parametrize("aliases", [True, False])
def test_aliases_are_listed_where_that_is_set(aliases):
    entries = model_entries(snapshot("m", "alias", "other"), everything, aliases=aliases)
    assert [entry["id"] for entry in entries] == ["m", *(["alias", "other"] if aliases else [])]
    assert all(entry["metadata"] == entries[0]["metadata"] for entry in entries)


async def test_news_come_of_every_model_that_answers():
    source = FakeSource()
    source.models = {"a": snapshot("a"), "b": snapshot("b")}
    async with following(source) as registry:
        await eventually(lambda: len(registry.models()) == 2)
        source.silent.add("b")
        news = await registry.news({"a": ("life", 7)})
    assert (news["a"].life, news["a"].number, news["b"]) == ("life", 8, None)


async def test_the_traffic_of_a_model_is_reported_until_the_model_has_it():
    source, traffic = FakeSource(), Traffic()
    source.models = {"a": snapshot("a")}

    def sent():
        reports = [one.traffic for one in source.reports if one is not None]
        return [counts.requests for counts in reports if counts is not None]

    async with following(source) as registry:
        registry.traffic = {"a": traffic}.__getitem__
        await eventually(sent)
        traffic.add(Outcome(None, None, "shed", "queue_full"), None)
        await eventually(lambda: len(sent()) > 1)
    assert sent() == [0, 1]


def test_an_entry_has_the_prices_of_long_prompts():
    model = snapshot("m")
    long = {"above": 4000, "input": 10, "output": 20}
    card = {"rate_card": {"input": 1, "output": 2, "long_context": long}}
    entry = model_entry(replace(model, settings=ModelSettings.load(card, "user_config")))
    assert entry["metadata"]["pricing"]["priority"]["long_context"] == {
        "above": 4000, "input_tokens": 15, "output_tokens": 30, "cache_read_tokens": 15,
        "cache_write_tokens": 15,
    }  # fmt: skip


def test_an_entry_has_the_prices_of_images_and_recordings_where_there_are_some():
    model = snapshot("m")
    assert not {"image", "audio_second"} & model_entry(model)["metadata"]["pricing"]["flex"].keys()
    card = {"rate_card": {"input": 1, "output": 2, "cache_write": 4, "image": 3, "audio_second": 5}}
    entry = model_entry(replace(model, settings=ModelSettings.load(card, "user_config")))
    assert entry["metadata"]["pricing"]["priority"] == {
        "input_tokens": 1.5, "output_tokens": 3, "cache_read_tokens": 1.5, "cache_write_tokens": 6,
        "image": 4.5, "audio_second": 7.5,
    }  # fmt: skip


def test_an_adapter_has_an_entry_of_its_own_with_its_prices_routes_and_parent():
    settings = {"adapter_rate_cards": {"tuned": {"input": 7, "output": 9}}}
    model = snapshot("m", "alias")
    [one] = model.replicas
    dialect = replace(one.dialect, adapters={"tuned", "plain"}, adapter_routes={Route.CHAT})
    made = replace(
        model,
        adapters=("tuned", "plain", "late"),
        replicas=(replace(one, dialect=dialect),),
        settings=ModelSettings.load({"rate_card": {"input": 1, "output": 2}} | settings, ""),
    )
    entries = {entry["id"]: entry for entry in model_entries(made, everything, aliases=True)}
    assert list(entries) == ["m", "alias", "tuned", "plain", "late"]
    parents = [entry["parent"] for entry in entries.values()]
    assert parents == [None, None, "m", "m", "m"]
    prices = [one["metadata"]["pricing"]["default"]["input_tokens"] for one in entries.values()]
    assert prices == [1, 1, 7, 1, 1]
    routes = {name: entry["metadata"]["routes"] for name, entry in entries.items()}
    assert routes["tuned"] == routes["plain"] == ["chat/completions"]
    assert routes["late"] == [] and "completions" in routes["m"]
    assert [one["id"] for one in model_entries(made, {"tuned"}.__contains__, aliases=True)] == [
        "tuned"
    ]
