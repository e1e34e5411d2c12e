from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from app.config.ingress import IngressSettings
from app.config.journal import JournalSettings
from app.config.model import ModelSettings
from app.contracts.traffic import Attainment
from app.core.errors import InvalidKey
from app.core.pricing import TokenUsage
from app.core.shed_reason import ShedReason
from app.core.tier_decision import DOWNGRADE_REASONS
from app.core.tiers import Tier, TierReason
from app.flow.admission import Shed
from app.gateway.services import Services
from app.gateway.telemetry import Telemetry
from app.ledger.ledger import Ledger
from app.ledger.record import State, UsageRecord
from app.observe.catalogue import METRICS, Source
from app.observe.observers import Ended, Refused
from app.tenants.budget_webhook import Outcome
from tests.app.flow.test_admission import admission, model, new_request
from tests.support import records
from tests.support.metrics import MemoryMetrics
from tests.support.stores import MemoryStore

pytestmark = pytest.mark.unit


class OneModel:
    """A registry of one model."""

    def __init__(self, made):
        self._made = made

    def find(self, model):
        return self._made if model == "m" else None

    def admissions(self):
        return [self._made]

    def models(self):
        return [self._made.snapshot]


@pytest.fixture
async def world(tmp_path):
    """A model with two slots, an ingress's services, and where its metrics go."""
    made = admission(model("one", default={"max_waiting": 1}))
    services = Services(OneModel(made), None, IngressSettings())
    services.ledger = Ledger(tmp_path, JournalSettings(folder=str(tmp_path)), MemoryStore())
    backend = MemoryMetrics()
    yield made, services, Telemetry(services, backend).exporter, backend
    await services.ledger.close()


SLO = {"frontline_slo_requests_total", "frontline_slo_objective", "frontline_slo_ttft_seconds"}
LATER = {"frontline_refused_requests_total"}
"""There once something was refused: neither routes nor codes are known in advance."""


async def test_every_metric_is_there_before_the_first_request(world):
    _, _, exporter, backend = world
    await exporter.push()
    own = [one for one in METRICS if one.source in (Source.INGRESS, Source.PROCESS)]
    names = {name.removeprefix("ray_") for one in own for name in one.series}
    assert backend.names() == names - SLO - LATER
    for tier in Tier:
        for reason in ShedReason:
            assert backend.of("frontline_sheds_total", model="m", tier=tier, reason=reason) == 0
        assert backend.of("frontline_cost_usd_total", model="m", tier=tier) == 0
    for reason in DOWNGRADE_REASONS:
        labels = {"model": "m", "requested_tier": "priority", "reason": reason}
        assert backend.of("frontline_downgrades_total", **labels) == 0


async def test_requests_are_counted_by_tier_and_reason(world):
    _, services, exporter, backend = world
    lowered = records.completed(served=Tier.DEFAULT)
    limited = UsageRecord.not_served(
        records.origin(), State.REFUSED, "rate_limit_exceeded", queue_s=0.0, ended=records.NOON
    )
    for record in (lowered, records.completed(), limited):
        services.observers.ended(Ended(record, 200))
    error = InvalidKey(given=True)
    services.observers.refused(Refused("r", "embeddings", "", error.status, error.code))
    services.observers.refused(Refused("r", "embeddings", "", 404, "model_not_found"))
    await exporter.push()
    of = backend.of
    requests = {"model": "m", "requested_tier": "priority", "state": "completed"}
    assert of("frontline_requests_total", served_tier="default", **requests) == 1
    assert of("frontline_requests_total", served_tier="priority", **requests) == 1
    reason = TierReason.NO_REPLICA_HONOURS_PRIORITY
    down = {"model": "m", "requested_tier": "priority", "reason": reason}
    assert of("frontline_downgrades_total", **down) == 1
    assert of("frontline_limits_refused_total", model="m", reason="rate_limit_exceeded") == 1
    assert of("frontline_keys_refused_total") == 1
    labels = {"route": "embeddings", "status": "404", "reason": "model_not_found"}
    assert of("frontline_refused_requests_total", **labels) == 1
    tokens = [
        of("frontline_tokens_total", model="m", tier="default", kind=kind)
        for kind in ("input", "cached_input", "cache_write", "output")
    ]
    assert tokens == [600, 400, 0, 250]
    assert of("frontline_cost_usd_total", model="m", tier="default") == float(lowered.cost)
    assert of("frontline_queue_wait_seconds_sum", model="m", tier="default") == 0.25


async def test_what_is_billed_besides_tokens_is_counted_by_tier(world):
    _, services, exporter, backend = world
    await exporter.push()
    at = {"model": "m", "tier": "priority"}
    names = ("frontline_images_total", "frontline_audio_seconds_total")
    assert [backend.of(name, **at) for name in names] == [0, 0], "there from the start"
    for usage in (
        TokenUsage(1000, 400, 250, 300, images=2),
        TokenUsage(10, 0, 5, audio_seconds=7),
        TokenUsage(10, 5, 5),
    ):
        services.observers.ended(Ended(records.completed(usage=usage), 200))
    services.observers.ended(Ended(records.shed(), 429))
    flex = records.completed(served=Tier.FLEX, usage=TokenUsage(1, 0, 1, images=1))
    services.observers.ended(Ended(flex, 200))
    await exporter.push()
    assert [backend.of(name, **at) for name in names] == [2, 7]
    assert backend.of(names[0], model="m", tier="flex") == 1
    kinds = ("input", "cached_input", "cache_write", "output")
    tokens = [backend.of("frontline_tokens_total", kind=kind, **at) for kind in kinds]
    assert tokens == [315, 405, 300, 260], "each token of a prompt is of one kind"
    assert sum(tokens[:3]) == services.tallies.of("m").tier(Tier.PRIORITY).prompt_tokens


async def test_alerts_of_budgets_are_counted(world):
    _, services, exporter, backend = world
    services.budgets = SimpleNamespace(alerts=Counter({(80, True): 2}), away=False, unread=0)
    await exporter.push()
    of = partial(backend.of, "frontline_budget_alerts_total")
    assert [of(percent=each, mode="hard") for each in ("50", "80", "100")] == [0, 2, 0]
    assert of(percent="80", mode="warn") == 0
    services.budget_webhook.counts[Outcome.GIVEN_UP] += 3
    await exporter.push()
    of = partial(backend.of, "frontline_budget_webhook_total")
    assert [of(outcome=each.value) for each in Outcome] == [0, 0, 3, 0]


async def test_the_queue_is_shown_as_it_is(world):
    made, _, exporter, backend = world
    running = [new_request(), new_request(Tier.PRIORITY)]
    for one in running:
        await made.admit(one)
    with pytest.raises(Shed):
        await made.admit(new_request(fail_fast=True))
    await exporter.push()
    assert backend.of("frontline_running", model="m", tier="priority") == 1
    assert backend.of("frontline_credits", model="m", pool="pool") == 2
    assert backend.of("frontline_slots", model="m", pool="pool", state="taken") == 2
    assert backend.of("frontline_slots", model="m", pool="pool", state="free") == 0
    assert backend.of("frontline_sheds_total", model="m", tier="default", reason="fail_fast") == 1
    made.close()


async def test_attainment_is_counted_for_tiers_with_an_objective(world):
    made, services, exporter, backend = world
    settings = ModelSettings.load({"slo": {"priority": {"ttft_ms": 400, "p": 0.95}}}, "user_config")
    made.update(replace(made.snapshot, settings=settings))
    await exporter.push()
    name, labels = "frontline_slo_requests_total", {"model": "m", "tier": "priority"}
    assert [backend.of(name, met=met, **labels) for met in ("true", "false")] == [0, 0]
    assert backend.of("frontline_slo_objective", **labels) == 0.95
    assert backend.of("frontline_slo_ttft_seconds", **labels) == 0.4
    # The first byte came after half a second; the second is default's, which has no objective.
    for record in (records.completed(), records.completed(served=Tier.DEFAULT), records.shed()):
        services.observers.ended(Ended(record, 200))
    await exporter.push()
    assert [backend.of(name, met=met, **labels) for met in ("true", "false")] == [0, 2]
    assert services.tallies.of("m").slo == {Tier.PRIORITY: Attainment(0, 2)}
