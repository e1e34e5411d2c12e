import re
from pathlib import Path

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.pricing import FREE
from app.core.tier_decision import (
    RAISED,
    TierDecision,
    TierRights,
    admit,
    admit_raised,
    and_raised,
    decide,
    is_raised,
    keeps_to_tier,
    without_raise,
)
from app.core.tiers import (
    ACCEPTED_VALUES,
    PriorityMode,
    Tier,
    TierOffer,
    TierReason,
    UnknownTierError,
    parse_requested,
)

pytestmark = pytest.mark.unit

offers = st.builds(TierOffer, st.sampled_from(PriorityMode), st.booleans())


def test_when_priority_is_delivered():
    delivered = {
        (mode, honoured)
        for mode in PriorityMode
        for honoured in (False, True)
        if mode.delivers(honoured=honoured)
    }
    in_queue = {(PriorityMode.QUEUE, False), (PriorityMode.QUEUE, True)}
    assert delivered == in_queue | {(PriorityMode.AUTO, True)}


@pytest.mark.parametrize(
    ("value", "tier"),
    [
        (None, None),
        ("auto", None),
        ("default", Tier.DEFAULT),
        ("standard", Tier.DEFAULT),
        ("standard_only", Tier.DEFAULT),
        ("on_demand", Tier.DEFAULT),
        ("priority", Tier.PRIORITY),
        ("fast", Tier.PRIORITY),
        ("performance", Tier.PRIORITY),
        ("flex", Tier.FLEX),
        ("batch", Tier.FLEX),
    ],
)
def test_words_that_have_a_tier_here(value, tier):
    assert parse_requested(value)[::2] == (tier, None)


@pytest.mark.parametrize("value", ["scale", "reserved", "ultrafast"])
@given(offer=offers, default_tier=st.sampled_from(Tier))
def test_premium_words_without_a_tier_here_are_served_as_default(value, offer, default_tier):
    word = parse_requested(value)
    admission = admit(word.tier, default_tier, offer, reason=word.reason)
    assert (admission.tier, admission.reason) == (Tier.DEFAULT, TierReason.NO_SUCH_TIER)
    for queued_as in (Tier.PRIORITY, Tier.DEFAULT):
        decision = decide(
            admission,
            queued_as=queued_as,
            offer=offer,
            native_priority=True,
            route_honoured=True,
            rate_card=FREE,
        )
        assert (decision.served, decision.reason) == (Tier.DEFAULT, TierReason.NO_SUCH_TIER)


def literals_of(package):
    """Return every string that the types of an SDK allow for a request's tier."""
    found = set()
    for path in Path(package.__file__).parent.rglob("*.py"):
        for words in re.findall(r"service_tier: .*?Literal\[(.*?)\]", path.read_text()):
            found |= set(re.findall(r'"(\w+)"', words))
    return found


def test_every_word_that_the_official_sdk_allows_is_served():
    words = literals_of(openai)
    assert words >= {"auto", "scale", "ultrafast"}
    assert words <= set(ACCEPTED_VALUES)


@given(st.sampled_from(TierReason), st.sampled_from([None, *Tier]), st.booleans(), st.booleans())
def test_a_tier_is_lowered_only_where_nobody_insists(reason, requested, strict, required):
    kept = keeps_to_tier(requested, reason, strict=strict, required=required)
    assert kept is not (required or (strict and requested is not None))
    assert keeps_to_tier(requested, None, strict=strict, required=required)


@given(
    st.one_of(
        st.text(), st.integers(), st.booleans(), st.floats(), st.lists(st.text()), st.just({})
    ).filter(lambda value: value not in ACCEPTED_VALUES)
)
def test_anything_else_is_refused_and_the_accepted_values_are_listed(value):
    with pytest.raises(UnknownTierError) as caught:
        parse_requested(value)
    assert all(f"'{accepted}'" in str(caught.value) for accepted in ACCEPTED_VALUES)


def test_tiers_are_ranked_from_the_front_of_the_queue():
    assert sorted(Tier, key=lambda tier: tier.rank) == [Tier.PRIORITY, Tier.DEFAULT, Tier.FLEX]


@given(st.sampled_from(Tier), offers)
def test_a_tier_that_is_not_offered_is_admitted_as_default(wanted, offer):
    admission = admit(wanted, Tier.DEFAULT, offer)
    refused = (wanted is Tier.PRIORITY and offer.priority is PriorityMode.OFF) or (
        wanted is Tier.FLEX and not offer.flex
    )
    assert admission.tier is (Tier.DEFAULT if refused else wanted)
    assert admission.reason is (TierReason.MODEL_DOES_NOT_OFFER_TIER if refused else None)


rights = st.builds(
    lambda tiers, over: TierRights(frozenset(tiers) | {Tier.DEFAULT}, over),
    st.sets(st.sampled_from(Tier)),
    st.booleans(),
)


def outcome(admission):
    return admission.tier, admission.reason


@given(st.sampled_from(Tier), offers, rights)
def test_a_tier_that_the_key_may_not_use_is_admitted_as_default(wanted, offer, rights):
    offered, reason = outcome(admit(wanted, Tier.DEFAULT, offer))
    admitted, why = outcome(admit(wanted, Tier.DEFAULT, offer, rights))
    if offered is not wanted:
        assert (admitted, why) == (offered, reason)
    elif wanted not in rights.tiers:
        assert (admitted, why) == (Tier.DEFAULT, TierReason.KEY_MAY_NOT_USE_TIER)
    elif wanted is Tier.PRIORITY and rights.over_share:
        assert (admitted, why) == (Tier.DEFAULT, TierReason.OVER_PRIORITY_SHARE)
    else:
        assert (admitted, why) == (wanted, None)


@given(
    st.none() | st.sampled_from(Tier),
    st.sampled_from(Tier),
    offers,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    rights,
)
def test_priority_is_decided_only_when_it_is_delivered(
    requested, default, offer, native, honoured, lowered, rights
):
    honoured = honoured and native
    admitted = admit(requested, default, offer, rights)
    queued_as = Tier.DEFAULT if admitted.tier is Tier.PRIORITY and lowered else admitted.tier
    decision = decide(
        admitted,
        queued_as=queued_as,
        offer=offer,
        native_priority=native,
        route_honoured=honoured,
        rate_card=FREE,
    )
    wanted = requested or default
    assert decision.requested is requested
    if decision.served is Tier.PRIORITY:
        assert wanted is Tier.PRIORITY and not lowered
        assert Tier.PRIORITY in rights.tiers and not rights.over_share
        assert offer.priority is PriorityMode.QUEUE or (
            offer.priority is PriorityMode.AUTO and honoured
        )
    assert decision.served in (wanted, Tier.DEFAULT), "a tier is lowered to default or kept"
    assert (decision.reason is None) == (decision.served is wanted)


def test_the_reason_tells_a_deaf_route_from_a_deaf_engine():
    def reason(native: bool) -> TierReason | None:
        return decide(
            admit(Tier.PRIORITY, Tier.DEFAULT, TierOffer()),
            queued_as=Tier.PRIORITY,
            offer=TierOffer(),
            native_priority=native,
            route_honoured=False,
            rate_card=FREE,
        ).reason

    assert reason(native=True) is TierReason.ROUTE_DOES_NOT_HONOUR_PRIORITY
    assert reason(native=False) is TierReason.NO_REPLICA_HONOURS_PRIORITY


@given(st.sampled_from(Tier), offers, offers, st.booleans())
def test_a_tier_that_is_withdrawn_while_a_request_waits_is_not_served(wanted, before, now, native):
    admitted = admit(wanted, Tier.DEFAULT, before)
    decision = decide(
        admitted,
        queued_as=admitted.tier,
        offer=now,
        native_priority=native,
        route_honoured=native,
        rate_card=FREE,
    )
    assert now.offers(decision.served) and before.offers(decision.served)


def test_a_decision_never_changes_and_never_lowers_without_a_reason():
    decision = TierDecision(Tier.FLEX, Tier.FLEX, None, FREE)
    with pytest.raises(AttributeError):
        decision.served = Tier.DEFAULT  # type: ignore[misc]
    with pytest.raises(AssertionError):
        TierDecision(Tier.PRIORITY, Tier.DEFAULT, None, FREE)


@given(
    st.none() | st.sampled_from(Tier),
    st.sampled_from(Tier),
    st.sampled_from([Tier.DEFAULT, Tier.PRIORITY]),
    offers,
    offers,
    rights,
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_a_raised_request_gets_what_it_asked_for_or_default(
    requested, usual, to, offer, now, rights_, native, honoured, fell_back
):
    admitted = admit(requested, usual, offer, rights_)
    raised = admit_raised(admitted, to, offer, rights_)
    if raised is None:
        # There is nothing better for it.
        assert admitted.tier.rank <= admit(to, Tier.DEFAULT, offer, rights_).tier.rank
        return
    assert raised.tier in (to, Tier.DEFAULT) and raised.tier.rank < admitted.tier.rank
    assert (raised.reason is None) is (raised.tier is to)
    decision = decide(
        raised,
        queued_as=Tier.DEFAULT if fell_back else raised.tier,
        offer=now,
        native_priority=native,
        route_honoured=native and honoured,
        rate_card=FREE,
        raised=True,
    )
    assert decision.requested is requested and decision.raised
    assert decision.served in (to, Tier.DEFAULT), "never dearer than it asked for"
    if decision.served is Tier.PRIORITY:
        assert Tier.PRIORITY in rights_.tiers and not rights_.over_share and not fell_back
        assert now.priority.delivers(honoured=native and honoured)
    assert is_raised(decision.why)
    cut = without_raise(decision.why)
    assert cut == (decision.reason and decision.reason.value)
    assert (cut is None) is (decision.served is to)


@given(st.none() | st.sampled_from(["client_gone", *TierReason, "start_within_passed_by"]))
def test_the_word_for_raised_is_told_from_others(reason):
    assert not is_raised(reason) and without_raise(reason) == reason
    assert is_raised(RAISED) and without_raise(RAISED) is None
    if reason is not None:
        assert is_raised(and_raised(reason)) and without_raise(and_raised(reason)) == reason
