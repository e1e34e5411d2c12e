import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.ingress import BodyLimits
from app.gateway.body_memory import BodyMemory, HeldMemory, NoRoom

pytestmark = pytest.mark.unit

MIB = 1024 * 1024
LIMITS = BodyLimits(longest=4 * MIB, tenant=6 * MIB, total=10 * MIB)
BESIDE = 24 * 4096
"""What a body may take beside its bytes."""


def held(memory, tenant="t"):
    return HeldMemory(memory, tenant)


steps = st.lists(
    st.tuples(st.integers(0, 5), st.none() | st.integers(0, 5 * MIB)), min_size=1, max_size=40
)


@given(steps)
def test_no_bound_is_ever_broken_and_everything_comes_back(steps):
    memory = BodyMemory()
    requests = [held(memory, tenant) for tenant in ("a", "a", "a", "b", "b", "")]
    for number, length in steps:
        if length is None:
            requests[number].release()
        else:
            requests[number].hold(length, LIMITS)
        assert memory.used == sum(memory.used_by(tenant) for tenant in ("a", "b", ""))
        assert 0 <= memory.used <= LIMITS.total + BESIDE
        assert max(memory.used_by("a"), memory.used_by("b")) <= LIMITS.tenant + BESIDE
    for request in requests:
        request.release()
    assert memory.used == 0


@given(st.integers(0, 5 * MIB), st.sampled_from(["a", ""]))
def test_only_a_body_that_never_fits_is_too_large(length, tenant):
    reason = held(BodyMemory(), tenant).hold(length, LIMITS)
    assert reason is (NoRoom.TOO_LARGE if length > LIMITS.longest else None)


def test_the_longest_body_is_what_its_tenant_may_take():
    limits = BodyLimits(longest=64 * MIB, tenant=6 * MIB, total=10 * MIB)
    assert held(BodyMemory()).hold(6 * MIB, limits) is None
    assert held(BodyMemory()).hold(6 * MIB + 1, limits) is NoRoom.TOO_LARGE
    assert held(BodyMemory(), "").hold(10 * MIB, limits) is None
    assert held(BodyMemory(), "").hold(10 * MIB + 1, limits) is NoRoom.TOO_LARGE


def test_one_tenant_leaves_room_for_another():
    memory = BodyMemory()
    assert [held(memory).hold(3 * MIB, LIMITS) for _ in range(2)] == [None, NoRoom.TENANT]
    assert held(memory, "other").hold(3 * MIB, LIMITS) is None
    assert held(memory, "third").hold(4 * MIB, LIMITS) is NoRoom.INGRESS


def test_a_body_that_grows_counts_once():
    memory = BodyMemory()
    request = held(memory)
    for length in (MIB, 2 * MIB, 3 * MIB):
        assert request.hold(length, LIMITS) is None
    assert memory.used == 3 * MIB + BESIDE
    request.release()
    request.release()
    assert memory.used == 0


def test_short_bodies_count_as_what_they_are_parsed():
    memory = BodyMemory()
    assert held(memory).hold(1000, LIMITS) is None
    assert memory.used == 25 * 1000
