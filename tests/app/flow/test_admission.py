import asyncio
import time
from dataclasses import replace

import pytest

from app.config.model import ModelSettings
from app.contracts.credits import Grant
from app.contracts.status import ModelSnapshot, ReplicaStatus, Sleep
from app.core.dialect import Dialect, Route
from app.core.shed_reason import ShedReason
from app.core.tiers import Tier
from app.flow.admission import Admission, ModelGone, Shed
from app.flow.credits import RENEWAL_S
from app.flow.request import QueuedRequest, RequestState
from app.flow.scheduler import Scheduler

pytestmark = pytest.mark.unit


def model(*names, slots=2, **queue):
    dialect = Dialect("vllm", False, dict.fromkeys(Tier, 0), frozenset(Route))
    replicas = tuple(
        ReplicaStatus(name, "pool", f"http://{name}", "key", slots, "1", None, dialect)
        for name in names
    )
    settings = ModelSettings.load({"queue": {"headroom": 0, **queue}}, "user_config")
    return ModelSnapshot("m", (), "me", 0, settings, replicas)


def admission(snapshot):
    made = Admission("ingress")
    made.update(snapshot)
    grant(made, **{replica.replica_id: replica.slots for replica in snapshot.replicas})
    return made


def grant(made, **added):
    demand = made.demand()
    made.receive(Grant("life", demand.number, demand.number, demand.sent_at, added=added))


def new_request(tier=Tier.DEFAULT, **more):
    return QueuedRequest(tier, "tenant", 10, Route.CHAT, **more)


async def standing(made, *requests):
    """Let requests stand in the queue and return their tasks."""
    tasks = [asyncio.create_task(made.admit(one)) for one in requests]
    await asyncio.sleep(0)
    return tasks


async def test_the_replicas_that_have_a_route_change_with_the_model():
    snapshot = model("one", "two")
    one, two = snapshot.replicas
    two = replace(two, dialect=replace(two.dialect, routes=frozenset({Route.EMBEDDINGS})))
    made = admission(replace(snapshot, replicas=(one, two)))
    assert made.lacking(Route.CHAT) == {"two"} and made.serving(Route.CHAT) == [one]
    assert made.lacking(Route.EMBEDDINGS) == set()
    made.update(replace(snapshot, replicas=(two,)))
    assert made.lacking(Route.CHAT) == {"two"} and made.serving(Route.CHAT) == []


async def test_with_room_nobody_waits():
    made = admission(model("one"))
    request = new_request()
    slot = await made.admit(request)
    assert slot.replica.replica_id == "one"
    assert request.placed == request.arrived


async def test_a_freed_slot_goes_to_priority_first():
    made = admission(model("one", slots=1))
    running, first, second = new_request(), new_request(), new_request(Tier.PRIORITY)
    await made.admit(running)
    waiting, jumping = await standing(made, first, second)
    made.end(running, 10)
    assert (await jumping).replica.replica_id == "one"
    assert not waiting.done()
    made.end(second, None)
    assert (await waiting).replica.replica_id == "one"


async def test_a_client_that_leaves_leaves_the_line_at_once():
    made = admission(model("one", slots=1))
    running, leaving, patient = new_request(), new_request(), new_request()
    await made.admit(running)
    gone, waiting = await standing(made, leaving, patient)
    gone.cancel()
    await asyncio.wait([gone])
    made.end(leaving, None)
    made.end(running, 10)
    assert (await waiting).replica.replica_id == "one"
    assert leaving.state is RequestState.ENDED


async def test_a_slot_given_to_a_client_that_has_just_left_is_not_lost():
    made = admission(model("one", slots=1))
    running, leaving, patient = new_request(), new_request(), new_request()
    await made.admit(running)
    gone, waiting = await standing(made, leaving, patient)
    made.end(running, 10)  # the slot is given to `leaving`, which does not hear of it
    gone.cancel()
    await asyncio.wait([gone])
    made.end(leaving, None)
    assert (await waiting).replica.replica_id == "one"


async def test_who_has_waited_too_long_is_shed_without_any_other_event():
    made = admission(model("one", slots=1, default={"max_wait_s": 0.05}))
    await made.admit(new_request())
    late = new_request()
    start = time.monotonic()
    with pytest.raises(Shed) as caught:
        await made.admit(late)
    assert caught.value.request.shed is ShedReason.WAITED_TOO_LONG
    assert 0.04 < time.monotonic() - start < 1
    assert late.retry_after_s > 0


async def test_who_has_not_started_in_time_is_raised_without_any_other_event():
    made = admission(model("one", slots=1))
    running, late = new_request(), new_request(Tier.FLEX, start_within_s=0.05)
    slot = await made.admit(running)
    assert not slot.raised
    [waiting] = await standing(made, late)
    start = time.monotonic()
    while late.tier is Tier.FLEX:
        await asyncio.sleep(0.001)
        assert time.monotonic() < start + 5
    assert time.monotonic() >= start + 0.04
    assert made.state().waiting == {Tier.PRIORITY: 0, Tier.DEFAULT: 1, Tier.FLEX: 0}
    made.end(running, 10)
    slot = await waiting
    assert slot.raised and slot.queued_as is Tier.DEFAULT


async def test_who_does_not_want_to_wait_is_shed_at_once():
    made = admission(model("one", slots=1))
    await made.admit(new_request())
    with pytest.raises(Shed) as caught:
        await made.admit(new_request(fail_fast=True))
    assert caught.value.request.shed is ShedReason.FAIL_FAST


async def test_who_waits_for_a_model_that_no_node_can_run_is_told_without_any_other_event(
    monkeypatch,
):
    monkeypatch.setattr("app.flow.scheduler.GIVE_UP_S", 0.05)
    made = admission(model())
    nowhere = replace(model(), pools=("pool",), missing={"pool": "GPU: 1"})
    early, patient = await standing(made, new_request(), new_request(Tier.FLEX))
    made.update(nowhere)
    start = time.monotonic()
    with pytest.raises(Shed) as caught:
        await early
    assert caught.value.request.shed is ShedReason.NOT_OFFERED
    assert 0.04 < time.monotonic() - start < 1
    with pytest.raises(Shed):
        await patient


async def test_a_look_that_finds_no_node_once_turns_nobody_away(monkeypatch):
    monkeypatch.setattr("app.flow.scheduler.GIVE_UP_S", 0.05)
    made = admission(model())
    [waiting] = await standing(made, new_request())
    made.update(replace(model(), pools=("pool",), missing={"pool": "GPU: 1"}))
    made.update(replace(model(), pools=("pool",)))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    made.update(model("one"))
    grant(made, one=1)
    assert (await waiting).replica.replica_id == "one"


async def test_who_is_displaced_is_told():
    one = {"max_waiting": 1}
    made = admission(model("one", slots=1, flex=one, default=one, priority=one))
    await made.admit(new_request())
    [waiting] = await standing(made, new_request())
    [jumping] = await standing(made, new_request(Tier.PRIORITY))
    with pytest.raises(Shed) as caught:
        await waiting
    assert caught.value.request.shed is ShedReason.DISPLACED
    jumping.cancel()


async def test_a_new_replica_takes_the_backlog():
    made = admission(model("one", slots=1))
    await made.admit(new_request())
    waiting = await standing(made, new_request(), new_request())
    made.update(model("one", "two", slots=1))
    grant(made, two=1)
    done, _ = await asyncio.wait(waiting, timeout=1, return_when=asyncio.FIRST_COMPLETED)
    assert [task.result().replica.replica_id for task in done] == ["two"]
    for task in waiting:
        task.cancel()


async def test_a_request_whose_replica_is_lost_is_placed_on_another():
    made = admission(model("one", "two", slots=1))
    request = new_request()
    first = await made.admit(request)
    second = await made.admit_again(request)
    assert {first.replica.replica_id, second.replica.replica_id} == {"one", "two"}


async def test_a_request_whose_only_replica_is_lost_is_told_at_once():
    made = admission(model("one", slots=2))
    request = new_request()
    await made.admit(request)
    with pytest.raises(Shed) as caught:
        await asyncio.wait_for(made.admit_again(request), 5)
    assert caught.value.request.shed is ShedReason.NO_OTHER_REPLICA


async def test_a_request_that_waits_for_another_replica_is_told_when_that_goes():
    made = admission(model("one", slots=2))
    request = new_request()
    await made.admit(request)
    made.update(model("one", "two", slots=2))
    again = asyncio.create_task(made.admit_again(request))
    await asyncio.sleep(0)
    made.update(model("one", slots=2))
    with pytest.raises(Shed) as caught:
        await asyncio.wait_for(again, 5)
    assert caught.value.request.shed is ShedReason.NO_OTHER_REPLICA


async def test_whether_a_request_could_go_elsewhere():
    made = admission(model("one", "two", slots=1))
    request = new_request()
    await made.admit(request)
    assert made.has_another(request)
    await made.admit_again(request, suspend=False)
    assert not made.has_another(request), "it has failed on one of them, and runs on the other"


async def test_priority_that_waits_hastens_the_renewal(monkeypatch):
    for pause in ("admission.RENEWAL_S", "credits.RENEWAL_S", "credits.URGENT_S"):
        monkeypatch.setattr(f"app.flow.{pause}", 30.0)
    made = admission(model("one", slots=1))
    await made.admit(new_request())
    renewal = asyncio.create_task(made.wait_for_renewal())
    await asyncio.sleep(0.03)
    assert not renewal.done()
    start = time.monotonic()
    await standing(made, new_request(Tier.PRIORITY))
    await renewal
    assert time.monotonic() - start < 5


async def test_who_waits_for_a_model_that_is_removed_is_told():
    made = admission(model("one", slots=1))
    await made.admit(new_request())
    [waiting] = await standing(made, new_request())
    made.close()
    with pytest.raises(ModelGone):
        await waiting


async def test_who_loses_its_engine_to_the_removal_of_its_model_is_told():
    made = admission(model("one", slots=1))
    running = new_request()
    await made.admit(running)
    made.close()
    with pytest.raises(ModelGone):
        await made.admit_again(running)


async def test_a_nudge_makes_the_renewal_due():
    made = admission(model("one", slots=1))
    renewal = asyncio.create_task(made.wait_for_renewal())
    await asyncio.sleep(0)
    made.renew_now()
    async with asyncio.timeout(0.1):
        await renewal
    renewal = asyncio.create_task(made.wait_for_renewal())
    await asyncio.sleep(0.03)
    assert not renewal.done()
    renewal.cancel()


async def test_a_request_waits_for_a_model_that_sleeps():
    awake = model("one")
    made = Admission("ingress")
    made.update(replace(awake, replicas=(), sleep=Sleep(tuple(Tier), start_s=30.0)))
    [waiting] = await standing(made, new_request(Tier.PRIORITY))
    with pytest.raises(Shed) as caught:
        await made.admit(new_request(fail_fast=True))
    assert caught.value.request.retry_after_s == 30.0
    waking = replace(awake, replicas=(), sleep=Sleep(tuple(Tier), waking=True, start_s=30.0))
    for _ in range(2):
        made.update(waking)
        await asyncio.sleep(0.05)
    with pytest.raises(Shed) as caught:
        await made.admit(new_request(fail_fast=True))
    assert 25.0 < caught.value.request.retry_after_s <= 29.9, "it has begun to start"
    made.update(awake)
    grant(made, one=2)
    assert (await waiting).replica.replica_id == "one"


async def test_what_comes_and_what_ends_is_counted_once():
    made = admission(model("one", slots=1))
    served, shed, leaving = new_request(), new_request(fail_fast=True), new_request(Tier.PRIORITY)
    await made.admit(served)
    with pytest.raises(Shed):
        await made.admit(shed)
    [gone] = await standing(made, leaving)
    gone.cancel()
    await asyncio.wait([gone])
    await asyncio.sleep(0.05)
    for one in (shed, leaving, served, served):
        made.end(one, None)
    report = made.report()
    assert report.arrived == {Tier.PRIORITY: 1, Tier.DEFAULT: 2, Tier.FLEX: 0}
    assert report.finished == {Tier.PRIORITY: 0, Tier.DEFAULT: 1, Tier.FLEX: 0}
    assert 0.05 <= report.served_s[Tier.DEFAULT] < 5


async def test_a_suspect_is_told_until_the_model_has_heard_of_it():
    made = admission(model("one"))
    made.suspect("one", Route.CHAT)
    first = made.demand()
    assert first.suspects == {"one": Route.CHAT}
    made.renewal_failed(first)
    grant(made)
    assert made.demand().suspects == {}
    made.suspect("one", Route.CHAT)
    before = made.demand()
    made.suspect("two", Route.CHAT)
    made.receive(Grant("life", before.number, before.number, before.sent_at))
    assert made.demand().suspects == {"two": Route.CHAT}


async def test_a_suspect_is_told_soon_though_there_is_nothing_else_to_say():
    made = admission(model("one"))
    demand = made.demand()
    made.receive(Grant("life", demand.number, demand.number, demand.sent_at, headroom=0))
    renewal = asyncio.create_task(made.wait_for_renewal())
    await asyncio.sleep(1.2 * RENEWAL_S)
    assert not renewal.done(), "there is nothing to say"
    made.suspect("one", Route.CHAT)
    async with asyncio.timeout(RENEWAL_S):
        await renewal
    assert made.demand().suspects == {"one": Route.CHAT}


async def test_a_replica_that_goes_as_its_suspension_ends_takes_nobody_with_it(monkeypatch):
    monkeypatch.setattr("app.flow.scheduler.SUSPENSION_S", 0.01)
    made = admission(model("one", slots=1))
    made.update(model("one", "two", slots=1))
    first, second = new_request(), new_request()
    await made.admit(first)
    [waiting] = await standing(made, second)
    again = asyncio.create_task(made.admit_again(first))
    await asyncio.sleep(0)
    # The event loop stands still, so that the snapshot comes before the timer.
    time.sleep(0.02)  # noqa: ASYNC251
    made.update(model("two", slots=2))
    grant(made, two=2)
    async with asyncio.timeout(2):
        assert {(await task).replica.replica_id for task in (waiting, again)} == {"two"}


async def test_who_was_called_is_told_though_the_gate_fails(monkeypatch):
    made = admission(model("one", slots=1))
    first, second = new_request(), new_request()
    await made.admit(first)
    [waiting] = await standing(made, second)
    end = Scheduler.end

    def fail(*arguments):
        end(*arguments)
        raise RuntimeError

    monkeypatch.setattr(Scheduler, "end", fail)
    with pytest.raises(RuntimeError):
        made.end(first, None)
    async with asyncio.timeout(2):
        assert (await waiting).replica.replica_id == "one"
