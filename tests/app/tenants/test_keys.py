from datetime import timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.tiers import Tier
from app.tenants.keys import ApiKey, KeyLimits, KeyTable, bearer, create_key, key_id_of
from tests.support.records import NOON

pytestmark = pytest.mark.unit


def make(**values) -> tuple[ApiKey, str]:
    return create_key("acme", created=NOON, **values)


def test_a_key_works_until_it_is_revoked():
    key, text = make()
    assert KeyTable.of([key]).find(text, NOON) is key
    revoked = ApiKey(**{name: getattr(key, name) for name in ApiKey.__slots__} | {"revoked": NOON})
    assert KeyTable.of([revoked]).find(text, NOON) is None


@given(st.timedeltas(timedelta(days=-9), timedelta(days=9)))
def test_a_key_works_until_it_expires(after):
    key, text = make(expires=NOON)
    table = KeyTable.of([key])
    works = after < timedelta(0)
    assert key.works(NOON + after) is works
    assert table.find(text, NOON + after) is table.get(key.key_id, NOON + after)
    assert (table.find(text, NOON + after) is key) is works


def test_nothing_but_the_whole_key_works():
    key, text = make()
    other, _ = make()
    table = KeyTable.of([key, other])
    assert table.find(text.replace(key.key_id, other.key_id), NOON) is None
    for place in range(len(text)):
        changed = text[:place] + ("0" if text[place] != "0" else "1") + text[place + 1 :]
        assert table.find(changed, NOON) is None
    for wrong in ("", text[:-1], text + "0", text.upper(), f" {text}", f"{text}\n"):
        assert table.find(wrong, NOON) is None


@given(st.text())
def test_anything_may_be_sent(text):
    assert KeyTable.of([make()[0]]).find(text, NOON) is None
    assert key_id_of(text) is None


def test_what_is_stored_and_shown_does_not_work_as_a_key():
    key, text = make()
    secret = text.rsplit("-", 1)[1]
    assert secret not in repr(key) and secret != key.secret_hash
    assert key.secret_hash not in repr(key)
    assert KeyTable.of([key]).find(f"fl-{key.key_id}-{key.secret_hash}", NOON) is None
    assert key_id_of(text) == key.key_id


def test_keys_are_all_different():
    assert len({make()[1] for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ("Bearer fl-1", "fl-1"),
        ("bearer  fl-1 ", "fl-1"),
        ("Basic fl-1", None),
        ("Bearer ", None),
        ("fl-1", None),
        ("", None),
        (None, None),
    ],
)
def test_the_authorization_header(header, text):
    assert bearer(header) == text


def test_a_key_may_use_its_default_tier_and_default():
    key, _ = make(tiers=[Tier.FLEX], default_tier=Tier.FLEX)
    assert key.tiers == {Tier.FLEX, Tier.DEFAULT}
    with pytest.raises(ValueError, match="among its tiers"):
        make(tiers=[Tier.FLEX], default_tier=Tier.PRIORITY)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rpm": 0}, "rpm"),
        ({"tpm": -1}, "tpm"),
        ({"priority_share": Decimal("1.1")}, "priority_share"),
        ({"priority_share": Decimal("-0.1")}, "priority_share"),
    ],
)
def test_limits_have_bounds(values, message):
    with pytest.raises(ValueError, match=message):
        KeyLimits(**values)


@pytest.mark.parametrize("name", ["x" * 101, "a\nb", "a\0b", "\x1b[31m"])
def test_names_are_printable(name):
    with pytest.raises(ValueError, match="printable"):
        make(name=name)
    with pytest.raises(ValueError, match="printable"):
        create_key(name, created=NOON)
