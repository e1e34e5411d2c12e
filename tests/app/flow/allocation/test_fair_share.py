import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.flow.allocation.fair_share import Share, Want, split

pytestmark = pytest.mark.unit

counts = st.integers(0, 200)
tiers = st.tuples(counts, counts, counts)
ages = st.tuples(*[st.floats(0, 600)] * 3)
wants = st.lists(st.builds(Want, tiers, tiers, ages, counts), min_size=1, max_size=12)


def credits(slots, headroom, *running):
    return [share.credits for share in split(slots, headroom, 10, [Want(t) for t in running])]


@given(st.integers(1, 500), st.integers(0, 100), st.integers(2, 20), wants)
def test_all_slots_are_shared_out_and_no_more_but_for_the_floor(slots, headroom, every, wants):
    headroom = min(headroom, slots // 2)
    shares = split(slots, headroom, every, wants)
    floor = max(0, len(wants) - headroom) if headroom else 0
    assert sum(share.credits for share in shares) == slots + floor
    assert all(share.credits >= share.headroom >= (1 if headroom else 0) for share in shares)


@given(st.integers(1, 500), st.integers(0, 100), wants)
def test_no_lower_tier_gets_what_a_higher_one_lacks(slots, headroom, wants):
    headroom = min(headroom, slots // 2)
    calm = [Want(want.running, want.waiting, want.oldest_s) for want in wants]
    shares = split(slots, headroom, 10, calm)
    left = slots - headroom
    for rank in range(3):
        upto = [sum(want.by_tier[: rank + 1]) for want in calm]
        if sum(upto) <= left:
            for share, wanted in zip(shares, upto, strict=True):
                assert share.credits - share.headroom >= wanted


def test_one_ingress_holds_all():
    assert split(32, 4, 10, [Want((0, 0, 0))]) == [Share(32, 4)]


def test_higher_tiers_come_first_and_what_is_short_is_shared_in_proportion():
    assert credits(100, 0, (50, 100, 0), (0, 100, 0)) == [75, 25]
    assert credits(100, 0, (300, 0, 0), (100, 500, 0)) == [75, 25]
    assert credits(10, 0, (0, 5, 9), (0, 5, 0)) == [5, 5]


def test_a_newcomer_finds_room_where_nobody_lacks_any():
    assert credits(100, 0, (0, 9, 0), (0, 0, 0)) == [92, 8]


def test_more_ingresses_than_headroom_have_one_slot_for_priority_each():
    shares = split(8, 1, 10, [Want((0, 5, 0))] * 8)
    assert [share.headroom for share in shares] == [1] * 8
    assert sorted(share.credits for share in shares) == [1] + [2] * 7


def test_of_equals_the_one_that_has_waited_longest_gets_the_odd_slot():
    wants = [Want((0, 0, 0), (0, 9, 0), (0.0, age, 0.0)) for age in (1.0, 3.0, 2.0)]
    assert [share.credits for share in split(2, 0, 10, wants)] == [0, 1, 1]


def test_the_starving_get_one_slot_in_every_few():
    wants = [Want((500, 0, 0)), Want(waiting=(0, 300, 0), starving=300)]
    assert [share.credits for share in split(100, 0, 10, wants)] == [90, 10]
    assert [share.credits for share in split(4, 0, 10, wants)] == [3, 1]
