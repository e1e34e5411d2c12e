import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.tenants.priority_share import PriorityShare, PriorityShares

pytestmark = pytest.mark.unit


@given(
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.lists(
        st.tuples(
            st.booleans(),
            st.floats(0, 5),
            st.sampled_from(["served", "lowered", "replayed", "shed", "waits"]),
        ),
        max_size=200,
    ),
    st.integers(1, 3),
)
def test_priority_keeps_to_its_share_at_all_ingresses_together(share, requests, ingresses):
    shares = [PriorityShare() for _ in range(ingresses)]
    now, total, priority, waiting = 1000.0, 0, 0, []
    for place, (wants, pause, outcome) in enumerate(requests):
        now += pause / 60
        part = shares[place % ingresses].enter(share, now, wants=wants)
        if outcome == "waits":
            waiting.append(part)
            continue
        if outcome != "shed":
            served = part.allowed and outcome != "lowered"
            part.decide(now, priority=served)
            if outcome == "replayed":
                served = False
                part.decide(now, priority=served)
            total, priority = total + 1, priority + served
        part.end()
        assert priority <= share * total + 2 * ingresses
    for part in waiting:
        part.end()
    # Whatever became of those that waited, it is counted by now.
    allowed = shares[0].enter(share, now + 120, wants=True).allowed
    assert allowed is (share > 0)
    if share == 0.0:
        assert priority == 0


def test_only_what_was_served_as_priority_counts_towards_a_share():
    book = PriorityShare()

    def asked(outcome):
        part = book.enter(0.5, 1000.0, wants=True)
        if outcome is not None:
            part.decide(1000.0, priority=outcome and part.allowed)
        part.end()
        return part.allowed

    # No engine delivers it: all are served as default, and none uses up the share.
    assert [asked(False) for _ in range(10)] == [True] * 10
    # Those that are turned away count neither way.
    assert [asked(None) for _ in range(10)] == [True] * 10
    assert [asked(True) for _ in range(13)] == [True] * 11 + [False, True]


class Requests(RuleBasedStateMachine):
    """Requests that wait, leave and are decided in any order, within one minute."""

    def __init__(self):
        super().__init__()
        self.book, self.waiting = PriorityShare(), []
        self.decided = self.priority = 0

    @rule(share=st.just(0.25), wants=st.booleans(), count=st.integers(1, 20))
    def arrive(self, share, wants, count):
        self.waiting += [self.book.enter(share, 1000.0, wants=wants) for _ in range(count)]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data):
        self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1))).end()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), lowered=st.booleans())
    def decide(self, data, lowered):
        part = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        part.decide(1000.0, priority=part.allowed and not lowered)
        part.end()
        self.decided += 1
        self.priority += part.allowed and not lowered

    @invariant()
    def priority_keeps_to_its_share_of_what_was_decided(self):
        assert self.priority <= math.ceil(0.25 * self.decided) + 1


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_requests_that_wait_and_leave_enlarge_no_share():
    book = PriorityShare()
    waiting = [book.enter(0.1, 1000.0, wants=False) for _ in range(1000)]
    asked = [book.enter(0.1, 1000.0, wants=True) for _ in range(100)]
    assert sum(part.allowed for part in asked) == 1
    for part in waiting + asked:
        part.end()


@given(
    st.sampled_from([0.0, 0.3, 1.0]),
    st.lists(
        st.tuples(st.integers(0, 2), st.booleans(), st.sampled_from([0.1, 20, 70, 130])),
        max_size=40,
    ),
)
def test_shares_that_are_forgotten_let_no_more_through(share, requests):
    """Beside shares that remember everything; some requests end after minutes."""
    forgetting, remembering = PriorityShares(), {}
    now, waiting = 1000.0, []
    for number, wants, pause in requests:
        now += pause
        one = forgetting.enter(f"{number}", share, now, wants=wants)
        two = remembering.setdefault(number, PriorityShare()).enter(share, now, wants=wants)
        assert one.allowed == two.allowed
        waiting.append((one, two))
        if len(waiting) > number:
            for part in waiting.pop(0):
                part.decide(now, priority=part.allowed)
                part.end()
                part.end()
    for one, two in waiting:
        one.end()
        two.end()
    forgetting.enter("other", share, now + 200, wants=False)
    assert len(forgetting) == 1, "59dfe9e: each was remembered for ever"
