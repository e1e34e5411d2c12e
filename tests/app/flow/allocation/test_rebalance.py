import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.flow.allocation.fair_share import Want
from app.flow.allocation.rebalance import IngressHoldings, balance

pytestmark = pytest.mark.unit

counts = st.integers(0, 40)
tiers = st.tuples(counts, counts, counts)


@st.composite
def standings(draw):
    running = draw(tiers)
    ages = draw(st.tuples(*[st.floats(0, 600)] * 3))
    waiting = (draw(st.sampled_from([0, 0, 1, 9])), *draw(tiers)[1:])
    want = Want(running, waiting, ages, draw(counts))
    in_use = sum(running)
    return IngressHoldings(want, in_use + draw(st.integers(0, 10)), in_use)


def standing(held, *, default=0, priority=0, waiting=(0, 0, 0), age=0.0):
    ages = tuple(age if some else 0.0 for some in waiting)
    want = Want((priority, default, 0), waiting, ages)
    return IngressHoldings(want, held, priority + default)


def terms(*standings, slots, headroom=0, room=0):
    return balance(standings, slots=slots, headroom=headroom, every=10, room=room)


@given(st.lists(standings(), min_size=1, max_size=8), st.integers(0, 8), st.integers(0, 20))
def test_terms_are_consistent(standings, headroom, room):
    slots = max(2 * headroom, sum(one.held for one in standings) + room, 1)
    made = terms(*standings, slots=slots, headroom=headroom, room=room)
    for one, now in zip(made, standings, strict=True):
        assert one.up_to >= now.held, "a grant takes nothing away"
        assert one.at_most >= one.up_to or one.up_to == now.held, "what is added may be kept"
        assert one.up_to <= now.held + room
        assert 0 <= one.keep <= one.headroom


@given(st.lists(standings(), min_size=2, max_size=8), st.integers(0, 20))
def test_more_pressing_needs_are_served_first(standings, room):
    slots = sum(one.held for one in standings) + room or 1
    made = terms(*standings, slots=slots, headroom=min(4, slots // 2), room=room)
    waits = [one.want.waiting[0] > 0 for one in standings]
    short = sum(
        max(0, one.in_use + one.want.waiting[0] - one.held)
        for one, waiting in zip(standings, waits, strict=True)
        if waiting
    )
    if short >= room:
        for one, now, waiting in zip(made, standings, waits, strict=True):
            assert waiting or one.up_to == now.held


def test_what_is_free_is_for_the_one_whose_priority_waits():
    waits = standing(5, default=5, waiting=(3, 0, 0))
    low = standing(5, default=5, waiting=(0, 9, 0))
    made = terms(waits, low, slots=12, headroom=2, room=2)
    assert [one.up_to for one in made] == [7, 5]


def test_while_nobody_waits_credits_are_moved_only_if_they_are_far_from_the_shares():
    made = terms(standing(12, default=3), standing(8, default=3), slots=20)
    assert [one.at_most for one in made] == [12, 10]
    assert [one.up_to for one in made] == [12, 8]
    made = terms(standing(18, default=3), standing(2, default=2), slots=20)
    assert made[0].at_most < 18


def test_free_slots_go_to_where_requests_wait_but_not_the_headroom():
    busy = standing(10, default=10, waiting=(0, 5, 0), age=1.0)
    idle = standing(10, default=4)
    assert [one.at_most for one in terms(busy, idle, slots=20, headroom=2)][1] == 5


def test_slots_in_use_are_given_up_only_for_clearly_older_requests():
    young = standing(15, default=15, waiting=(0, 50, 0), age=10.0)
    for age, given_up in ((10.5, False), (20.0, True)):
        old = standing(5, default=5, waiting=(0, 50, 0), age=age)
        made = terms(young, old, slots=20)
        assert (made[0].at_most < 15) is given_up


def test_low_headroom_is_lent_half_of_what_others_have():
    low, rich = standing(10, default=10), standing(14, default=10)
    made = terms(low, rich, slots=24, headroom=8)
    assert made[0].urgent and not made[1].urgent
    assert made[1].at_most == 12 and made[1].keep == 2


def test_everything_free_is_lent_where_priority_waits():
    low, rich = standing(10, default=10, waiting=(9, 0, 0)), standing(14, default=10)
    made = terms(low, rich, slots=24, headroom=8)
    # Four free ones, and the next nine that come free.
    assert (made[1].at_most, made[1].keep) == (14 - 4 - 9, 0)


def test_of_several_the_one_with_most_free_slots_lends():
    made = terms(
        standing(10, default=10, waiting=(1, 0, 0)),
        standing(12, default=10),
        standing(13, default=10),
        slots=35,
        headroom=3,
    )
    assert [one.at_most for one in made][1:] == [11, 11]
    made = terms(
        standing(10, default=10, waiting=(1, 0, 0)),
        standing(19, default=10),
        standing(12, default=10),
        slots=41,
    )
    assert made[1].at_most <= 18 and made[2].at_most >= 12


def test_priority_is_not_taken_from_priority():
    made = terms(
        standing(10, priority=10, waiting=(5, 0, 0), age=0.1),
        standing(10, priority=10, waiting=(5, 0, 0), age=0.2),
        slots=20,
    )
    assert all(one.at_most >= 10 for one in made)
