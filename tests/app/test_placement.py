import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config import ModelSettings
from app.dialect import Dialect, Route
from app.placement import SUSPENSION_S, Placer
from app.snapshot import ModelSnapshot, ReplicaStatus
from app.tiers import Tier

pytestmark = pytest.mark.unit

PRIORITIES = dict.fromkeys(Tier, 0)


def replica(name, *, native=True, slots=4):
    routes = frozenset(Route) if native else frozenset()
    dialect = Dialect("vllm", priority_values=PRIORITIES, priority_routes=routes)
    return ReplicaStatus(name, "pool", "http://x", "secret", slots, "1", 100, dialect)


def placer(*replicas, priority="auto"):
    settings = ModelSettings.load({"tiers": {"priority": priority}}, "user_config")
    return Placer(ModelSnapshot("m", (), "me", 0, settings, tuple(replicas)))


def test_priority_goes_where_it_is_honoured_even_if_busier():
    native, plain = replica("native"), replica("plain", native=False)
    floor = placer(native, plain)
    with floor.place(native), floor.place(native):
        assert floor.choose(Route.CHAT, Tier.PRIORITY, 0.0) is native
        assert floor.choose(Route.CHAT, Tier.DEFAULT, 0.0) is plain


def test_priority_falls_back_to_what_is_there():
    plain = replica("plain", native=False)
    assert placer(plain).choose(Route.CHAT, Tier.PRIORITY, 0.0) is plain


def test_when_the_line_is_delivery_every_replica_will_do():
    native, plain = replica("native"), replica("plain", native=False)
    floor = placer(native, plain, priority="line")
    with floor.place(native):
        assert floor.choose(Route.CHAT, Tier.PRIORITY, 0.0) is plain


@given(st.lists(st.integers(1, 8), min_size=1, max_size=5), st.integers(0, 40))
def test_load_is_spread_by_share_of_slots(slots, requests):
    replicas = [replica(str(i), slots=n) for i, n in enumerate(slots)]
    floor = placer(*replicas)
    for _ in range(requests):
        floor.place(floor.choose(Route.CHAT, Tier.DEFAULT, 0.0)).__enter__()
    shares = [floor.running(r) / r.slots for r in replicas]
    assert max(shares) - min(shares) <= 1 / min(slots) + 1e-9


def test_a_lost_replica_is_left_alone_for_a_while_and_then_tried_again():
    one, other = replica("one"), replica("other")
    floor = placer(one, other)
    with floor.place(other):
        floor.report_lost(one, now=10.0)
        assert floor.choose(Route.CHAT, Tier.DEFAULT, 10.1) is other
        assert floor.choose(Route.CHAT, Tier.DEFAULT, 10.0 + SUSPENSION_S) is one
    assert floor.choose(Route.CHAT, Tier.DEFAULT, 10.1, without=frozenset({"other"})) is None


def test_nothing_is_left_of_requests_that_ended():
    one = replica("one")
    floor = placer(one)
    with pytest.raises(KeyError), floor.place(one):
        raise KeyError
    assert floor.running(one) == 0


def test_a_status_does_not_show_its_key():
    assert "secret" not in repr(replica("one"))
