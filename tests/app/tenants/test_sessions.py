from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.tenants.keys import create_key
from app.tenants.sessions import SESSION_S, create_session, is_valid, session_key_id

pytestmark = pytest.mark.unit

KEY, TEXT = create_key("acme", created=datetime.now(UTC))
OTHER, _ = create_key("acme", created=datetime.now(UTC))
NOW = 1_800_000_000.0


@given(st.floats(0, 4e9), st.floats(0, 2 * SESSION_S))
def test_a_session_lasts_as_long_as_it_should(began, later):
    token = create_session(KEY, began)
    assert session_key_id(token) == KEY.key_id
    lasts = began + later < int(began) + SESSION_S
    assert is_valid(token, KEY, began + later) == lasts


@given(st.data())
def test_a_token_that_was_changed_is_none(data):
    token = create_session(KEY, NOW)
    at = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.characters(codec="ascii").filter(lambda c: c != token[at]))
    changed = token[:at] + other + token[at + 1 :]
    assert not is_valid(changed, KEY, NOW)
    assert not is_valid(token[:at], KEY, NOW)


@given(st.text(max_size=200))
def test_any_text_may_come(text):
    assert session_key_id(text) is None
    assert not is_valid(text, KEY, NOW)


def test_a_token_is_of_one_key():
    token = create_session(KEY, NOW)
    assert not is_valid(token, OTHER, NOW)
    assert not is_valid(token.replace(KEY.key_id, OTHER.key_id), OTHER, NOW)


def test_a_token_tells_nothing_of_the_key():
    token = create_session(KEY, NOW)
    assert TEXT.rpartition("-")[2] not in token
    assert KEY.secret_hash not in token


def test_nobody_gets_a_longer_session_from_another_clock():
    far = create_session(KEY, NOW + 3600)
    assert not is_valid(far, KEY, NOW)
    assert is_valid(create_session(KEY, NOW + 200), KEY, NOW)
