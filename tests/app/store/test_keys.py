from decimal import Decimal

import pytest

from app.keys import Limits, create_key
from app.store.database import migrate
from app.store.keys import KeyStore
from app.tiers import Tier
from tests.app.ledger.records import NOON

pytestmark = pytest.mark.unit


@pytest.fixture
def store(engine):
    migrate(engine)
    return KeyStore(engine)


def test_keys_come_back_as_they_were(store):
    limits = Limits(rpm=60, tpm=10**12, priority_share=Decimal("0.333"))
    full, text = create_key(
        "acme", name="é", default_tier=Tier.FLEX, tiers=[Tier.FLEX], limits=limits, created=NOON
    )
    plain, _ = create_key("acme", created=NOON)
    store.add(full)
    store.add(plain)
    assert store.all() == sorted([full, plain], key=lambda key: key.key_id)
    assert store.table().find(text) == full


def test_a_key_is_revoked_once(store):
    key, text = create_key("acme", created=NOON)
    store.add(key)
    assert store.revoke(key.key_id, NOON)
    assert not store.revoke(key.key_id, NOON)
    assert not store.revoke("nobody", NOON)
    assert store.table().find(text) is None
    assert [each.revoked for each in store.all()] == [NOON]
