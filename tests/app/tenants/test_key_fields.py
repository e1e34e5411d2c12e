from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.addresses import parse_network
from app.core.dialect import Route
from app.core.tiers import Tier
from app.tenants.key_fields import (
    CHANGEABLE,
    FIELDS,
    MAX_RPM,
    MAX_TPM,
    KeyFieldError,
    changed_key,
    new_key,
)
from app.tenants.keys import KeyLimits, create_key
from app.tenants.scope import KeyScope
from tests.support.records import NOON

pytestmark = pytest.mark.unit

tiers = st.lists(st.sampled_from([*Tier]).map(str), unique=True)
patterns = st.from_regex(r"[a-z*]{1,5}", fullmatch=True)
GOOD = {
    "tenant": st.from_regex(r"[a-z]{1,9}", fullmatch=True),
    "name": st.from_regex(r"[a-z ]{0,9}", fullmatch=True),
    "admin": st.booleans(),
    "default_tier": st.just("default"),
    "tiers": tiers,
    "rpm": st.integers(1, MAX_RPM),
    "tpm": st.integers(1, MAX_TPM),
    "priority_share": st.sampled_from([0, 1, 0.25, "0.333", 0.1]),
    "in_flight": st.integers(1, MAX_RPM),
    "models": st.lists(patterns, min_size=1, max_size=5),
    "routes": st.lists(st.sampled_from([*Route]).map(str), min_size=1),
    "addresses": st.lists(st.ip_addresses().map(str), min_size=1, max_size=5),
    "budgets": st.lists(st.sampled_from(["day=1", "month=2:warn", "total=3"]), unique=True),
    "expires_at": st.integers(0, 4_000_000_000),
}
later = st.fixed_dictionaries({}, optional={name: GOOD[name] for name in sorted(CHANGEABLE)})
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.fixed_dictionaries(GOOD))
def test_a_key_has_the_fields_that_were_given(fields):
    key, text = new_key(fields, NOON)
    assert key.key_id in text and key.secret_hash not in text
    assert (key.tenant, key.name, key.admin) == (fields["tenant"], fields["name"], fields["admin"])
    assert key.tiers == set(map(Tier, fields["tiers"])) | {Tier.DEFAULT}
    share = Decimal(str(fields["priority_share"]))
    assert key.limits == KeyLimits(fields["rpm"], fields["tpm"], share, fields["in_flight"])
    assert key.scope.models == set(fields["models"])
    assert key.scope.routes == set(map(Route, fields["routes"]))
    assert key.scope.addresses == set(map(parse_network, fields["addresses"]))
    assert sorted(map(str, key.budgets)) == sorted(fields["budgets"])
    assert key.expires == datetime.fromtimestamp(fields["expires_at"], UTC)


def test_only_the_tenant_is_required():
    key, _ = new_key({"tenant": "acme"} | dict.fromkeys(FIELDS.keys() - {"tenant"}), NOON)
    plain, _ = create_key("acme", created=NOON)
    same = {name: getattr(plain, name) for name in ("key_id", "secret_hash")}
    assert replace(key, **same) == plain
    with pytest.raises(KeyFieldError, match="a key has a tenant"):
        new_key({}, NOON)


@given(st.fixed_dictionaries(GOOD), later)
def test_a_change_is_what_it_would_have_been_from_the_start(fields, changes):
    """And nothing else changes."""
    fields = fields | {"default_tier": "default"}
    key, _ = new_key(fields, NOON)
    new = changed_key(key, changes)
    other, _ = new_key(fields | changes, NOON)
    same = {name: getattr(key, name) for name in ("key_id", "secret_hash", "budgets")}
    assert new == replace(other, **same)
    assert changed_key(new, changes) == new
    assert changed_key(key, {}) == key


def test_null_removes_what_can_be_removed():
    fields = {
        "tenant": "acme", "rpm": 1, "tpm": 1, "priority_share": 0, "in_flight": 1,
        "models": ["m"], "routes": ["embeddings"], "addresses": ["::1"], "expires_at": 1,
    }  # fmt: skip
    key, _ = new_key(fields, NOON)
    none = changed_key(key, dict.fromkeys(fields.keys() - {"tenant"}))
    assert (none.limits, none.scope, none.expires) == (KeyLimits(), KeyScope(), None)
    for name in ("name", "tiers", "default_tier"):
        with pytest.raises(KeyFieldError, match=name):
            changed_key(key, {name: None})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tenant", "", "has a tenant"), ("tenant", "a\n", "printable"), ("tenant", 1, "a text"),
        ("name", "x" * 101, "at most 100"), ("admin", 1, "true or false"),
        ("tiers", ["fast"], "expected some of priority, default, flex"),
        ("tiers", "flex", "expected some of"), ("default_tier", "fast", "expected one of"),
        ("default_tier", ["flex"], "expected one of"),
        ("rpm", 0, "from 1"), ("rpm", 2**31, "from 1"), ("rpm", True, "whole number"),
        ("rpm", 1.5, "whole number"), ("rpm", "1", "whole number"), ("tpm", 2**63, "from 1"),
        ("priority_share", 1.5, "from 0 to 1"), ("priority_share", "NaN", "from 0 to 1"),
        ("priority_share", "x", "from 0 to 1"), ("priority_share", "0." + "1" * 40, "from 0 to 1"),
        ("models", [], "from 1 to 100"), ("models", ["[a]"], "no id"), ("models", "m", "a list"),
        ("routes", ["chat"], "expected some of chat/completions,"), ("routes", [], "at least one"),
        ("addresses", ["10.0.0.1/8"], "no network"), ("addresses", [], "from 1 to 100"),
        ("addresses", [1], "a list of texts"),
        ("expires_at", "2030-01-01", "Unix seconds"), ("expires_at", -1, "Unix seconds"),
        ("expires_at", 10**30, "Unix seconds"), ("expires_at", True, "Unix seconds"),
        ("budgets", ["1"], "expected day"), ("budgets", ["day=1", "day=2"], "one for each period"),
        ("colour", None, "no such field"), ("secret_hash", "x", "no such field"),
        ("key_id", "x", "no such field"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(field, value, message):
    with pytest.raises(KeyFieldError, match=message) as caught:
        new_key({"tenant": "acme", field: value}, NOON)
    assert caught.value.field == field
    key, _ = create_key("acme", created=NOON)
    with pytest.raises(KeyFieldError) as caught:
        changed_key(key, {field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("changes", [{"tiers": ["default"]}, {"default_tier": "priority"}])
def test_the_default_tier_stays_among_the_tiers(changes):
    key, _ = new_key({"tenant": "a", "tiers": ["flex"], "default_tier": "flex"}, NOON)
    with pytest.raises(KeyFieldError, match=r"default_tier: .* among its tiers"):
        changed_key(key, changes)


@pytest.mark.parametrize("field", sorted(FIELDS.keys() - CHANGEABLE))
def test_some_fields_cannot_be_changed(field):
    key, _ = create_key("acme", created=NOON)
    with pytest.raises(KeyFieldError, match=f"{field}: cannot be changed"):
        changed_key(key, {field: key.tenant})


@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), anything))
def test_whatever_is_sent_makes_a_key_or_names_a_field(fields):
    key, _ = create_key("acme", created=NOON)
    for make in (lambda: new_key(fields, NOON), lambda: changed_key(key, fields)):
        try:
            make()
        except KeyFieldError as error:
            assert error.field in FIELDS
