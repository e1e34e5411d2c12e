from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.addresses import is_within
from app.core.dialect import Route
from app.core.tiers import Tier
from app.tenants.key_fields import CHANGEABLE, new_key
from app.tenants.key_rights import beyond
from app.tenants.keys import create_key
from tests.support.records import NOON

pytestmark = pytest.mark.unit

MODELS = st.from_regex(r"[ab*]{1,4}", fullmatch=True)
NETWORKS = st.sampled_from(
    ["10.0.0.0/8", "10.1.0.0/16", "10.1.1.1", "0.0.0.0/0", "11.0.0.0/8", "::/0", "fd00::/8", "::1"]
)
fields = st.fixed_dictionaries(
    {"tenant": st.just("acme")},
    optional={
        "models": st.lists(MODELS, min_size=1, max_size=3),
        "routes": st.lists(st.sampled_from(["embeddings", "rerank", "score"]), min_size=1),
        "addresses": st.lists(NETWORKS, min_size=1, max_size=3),
        "tiers": st.lists(st.sampled_from([*Tier]).map(str)),
        "rpm": st.integers(1, 3),
        "tpm": st.integers(1, 3),
        "in_flight": st.integers(1, 3),
        "priority_share": st.sampled_from([0, 0.5, 1]),
        "expires_at": st.integers(1, 3),
        "budgets": st.lists(st.sampled_from(["day=1", "month=2", "total=3:warn"]), unique=True),
    },
)
ids = st.from_regex(r"[ab]{0,6}", fullmatch=True)


def make(given):
    return new_key(given, NOON)[0]


@given(fields)
def test_a_key_is_not_beyond_itself(given):
    assert beyond(make(given), make(given)) is None


@given(fields)
def test_an_unbounded_key_may_give_everything_and_get_nothing_that_is_bounded(given):
    key, plain = make(given), create_key("ops", created=NOON)[0]
    assert beyond(key, plain) is None
    no_bound = {"tenant", "budgets", "tiers"}
    assert (beyond(plain, key) is None) <= (given.keys() <= no_bound)


@given(fields, fields, fields)
def test_rights_are_passed_on_no_further_than_they_were_given(one, two, three):
    """Who is within a second key, which is within a third, is within the third."""
    a, b, c = map(make, (one, two, three))
    if beyond(a, b) is None and beyond(b, c) is None:
        assert beyond(a, c) is None


@given(fields, fields, ids, st.sampled_from([*Route]), st.ip_addresses(), st.sampled_from([*Tier]))
def test_a_key_within_another_may_do_nothing_that_the_other_may_not(
    one, two, model, route, address, tier
):
    key, giver = make(one), make(two)
    if beyond(key, giver) is None:
        assert key.scope.allows_model(model) <= giver.scope.allows_model(model)
        assert key.scope.allows_route(route) <= giver.scope.allows_route(route)
        assert key.scope.allows_address(address) <= giver.scope.allows_address(address)
        assert (tier in key.tiers) <= (tier in giver.tiers)


@given(st.lists(MODELS, min_size=1), st.lists(MODELS, min_size=1), ids)
def test_patterns_of_models_are_compared_as_patterns(narrow, wide, model):
    narrower, wider = make({"tenant": "a", "models": narrow}), make({"tenant": "a", "models": wide})
    if beyond(narrower, wider) is None and any(fnmatchcase(model, one) for one in narrow):
        assert any(fnmatchcase(model, one) for one in wide)


@given(st.lists(NETWORKS, min_size=1), st.lists(NETWORKS, min_size=1), st.ip_addresses())
def test_networks_are_compared_as_networks(narrow, wide, address):
    inner = make({"tenant": "a", "addresses": narrow}).scope.addresses
    outer = make({"tenant": "a", "addresses": wide}).scope.addresses
    within = beyond(
        make({"tenant": "a", "addresses": narrow}), make({"tenant": "a", "addresses": wide})
    )
    if within is None and is_within(address, inner):
        assert is_within(address, outer)


@pytest.mark.parametrize(
    ("field", "own", "more", "less"),
    [
        ("models", ["a/*"], ["a/*", "b"], ["a/b*", "a/c"]),
        ("routes", ["score"], ["score", "rerank"], ["score"]),
        ("addresses", ["10.0.0.0/8"], ["0.0.0.0/0"], ["10.1.0.0/16"]),
        ("tiers", ["flex"], ["priority"], ["default"]),
        ("rpm", 5, 6, 5),
        ("tpm", 5, 6, 4),
        ("in_flight", 5, 6, 5),
        ("priority_share", 0.5, 0.6, 0.4),
        ("expires_at", 50, 51, 50),
        ("budgets", ["day=5"], ["day=6"], ["day=4", "month=100"]),
        ("budgets", ["day=5"], ["day=5:warn"], ["day=5"]),
    ],
)
def test_every_right_is_compared(field, own, more, less):
    giver = make({"tenant": "ops", field: own})
    assert beyond(make({"tenant": "acme", field: more}), giver) == field
    assert beyond(make({"tenant": "acme", field: less}), giver) is None
    assert beyond(make({"tenant": "acme"}), giver) == field


def test_there_is_a_rule_for_every_field_that_gives_rights():
    """A field that is added to keys must not be forgotten here."""
    without = {"name", "default_tier"}
    tested = {"models", "routes", "addresses", "tiers", "rpm", "tpm", "in_flight"}
    assert CHANGEABLE - without == tested | {"priority_share", "expires_at"}
