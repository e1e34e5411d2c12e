import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from alembic import command
from sqlalchemy import Column, MetaData, Table, make_url, text

from app.core.addresses import parse_network
from app.core.dialect import Route
from app.core.tiers import Tier
from app.store.database import connect, migrate
from app.store.schema import api_keys
from app.tenants.key_store import KeyStore
from app.tenants.keys import KeyLimits, create_key
from app.tenants.scope import KeyScope
from tests.support.records import NOON

pytestmark = pytest.mark.unit


@pytest.fixture
def store(engine):
    migrate(engine)
    return KeyStore(engine)


def test_keys_come_back_as_they_were(store):
    limits = KeyLimits(rpm=60, tpm=10**12, priority_share=Decimal("0.333"), in_flight=7)
    networks = frozenset(map(parse_network, ["10.0.0.0/8", "fd00::1", "192.0.2.7"]))
    routes = frozenset({Route.CHAT, Route.EMBEDDINGS})
    scope = KeyScope(frozenset({"acme/*", "m"}), routes, networks)
    full, text = create_key(
        "acme", name="é", default_tier=Tier.FLEX, tiers=[Tier.FLEX], limits=limits, scope=scope,
        expires=NOON + timedelta(days=1), budgets=["day=0.5:warn", "total=1000"], created=NOON,
    )  # fmt: skip
    plain, _ = create_key("acme", admin=True, created=NOON)
    store.add(full)
    store.add(plain)
    assert store.all() == sorted([full, plain], key=lambda key: key.key_id)
    assert store.table().find(text, NOON) == full


def test_keys_of_an_older_version_are_read_at_once(engine, monkeypatch):
    upgrade = command.upgrade
    monkeypatch.setattr(command, "upgrade", lambda config, _: upgrade(config, "0002"))
    migrate(engine)
    monkeypatch.undo()
    key, sent = create_key("acme", created=NOON)
    values = {
        "key_id": key.key_id, "secret_hash": key.secret_hash, "tenant": "acme", "name": "",
        "default_tier": "default", "tiers": "priority,default,flex", "created": NOON,
    }  # fmt: skip
    old = Table("api_keys", MetaData(), *(Column(name, api_keys.c[name].type) for name in values))
    with engine.begin() as connection:
        connection.execute(old.insert(), values)
    assert KeyStore(engine).table().find(sent, NOON) == key


def test_a_key_is_revoked_once(store):
    key, text = create_key("acme", created=NOON)
    store.add(key)
    assert store.revoke(key.key_id, NOON)
    assert not store.revoke(key.key_id, NOON)
    assert not store.revoke("nobody", NOON)
    assert store.table().find(text, NOON) is None
    assert [each.revoked for each in store.all()] == [NOON]


def test_two_changes_at_once_are_made_one_after_the_other(store):
    """Neither undoes the other."""
    key, _ = create_key("acme", created=NOON)
    store.add(key)

    def more(old):
        time.sleep(0.001)
        return replace(old, limits=replace(old.limits, rpm=(old.limits.rpm or 0) + 1))

    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: store.change(key.key_id, more), range(12)))
    assert sorted(one.limits.rpm for one in made) == list(range(1, 13))
    assert store.get(key.key_id).limits.rpm == 12


def test_a_change_that_fails_changes_nothing(store):
    key, _ = create_key("acme", created=NOON)
    store.add(key)

    def fail(old):
        raise KeyError

    with pytest.raises(KeyError):
        store.change(key.key_id, fail)
    assert store.get(key.key_id) == key
    assert store.get("nobody") is store.change("nobody", fail) is None


BAD: dict[str, list[Any]] = {
    "secret_hash": ["x", "", b"bytes"],
    "tenant": ["", "x" * 101, "a\x00b", b"bytes\xff\x00"],
    "name": ["x" * 101, "\n"],
    "default_tier": ["premium", "", "priority"],
    "tiers": ["", "premium", "flex", "default,", b"\x00\xff"],
    "rpm": ["many", 0, -1, 1.5, "", b"\x01"],
    "tpm": ["1k", 0, 10.25],
    "priority_share": ["0,5", "NaN", "2", "-1", "", "Infinity", b"1/2"],
    "admin": ["maybe", 2, "", b"1"],
    "models": ["", "a,,b", "[a-z]", "x" * 201, b"m"],
    "routes": ["", "chat", "chat/completions,", b"messages"],
    "in_flight": ["many", 0, -1, 1.5],
    "addresses": ["", "10.0.0.1/8", "10.0.0.0/8,", "office", "10.0.0.0/8;::1", b"::1"],
    "expires": ["tomorrow", "", "2026-01-01T00:00:00", b"now"],
    "created": ["yesterday", "", 12, "2026-01-01T00:00:00", b"now"],
}


OPTIONAL = {
    *("rpm", "tpm", "priority_share", "in_flight"),
    *("models", "routes", "addresses", "expires", "revoked"),
}


@pytest.mark.parametrize(("column", "value"), [(c, v) for c in BAD for v in BAD[c]])
def test_a_row_that_cannot_be_read_is_refused_alone(tmp_path, column, value):
    engine = connect(make_url(f"sqlite:///{tmp_path}/usage.db"))
    migrate(engine)
    store = KeyStore(engine)
    made = [create_key("acme", created=NOON, tiers=[]) for _ in range(3)]
    for key, _ in made:
        store.add(key)
    bad, good = made[1], (made[0], made[2])
    with engine.begin() as connection:
        statement = text(f"UPDATE api_keys SET {column} = :value WHERE key_id = :id")
        connection.execute(statement, {"value": value, "id": bad[0].key_id})
    table = store.table()
    assert table.find(bad[1], NOON) is None
    assert [table.find(sent, NOON) for _, sent in good] == [key for key, _ in good]
    assert list(table.unreadable) == [bad[0].key_id]
    assert bad[0].secret_hash not in str(table.unreadable)
    assert {key.key_id for key in store.all()} == {key.key_id for key, _ in good}
    engine.dispose()


def test_a_row_that_is_null_where_nothing_may_be_is_refused_alone(tmp_path):
    engine = connect(make_url(f"sqlite:///{tmp_path}/usage.db"))
    columns = [*BAD, "key_id", "revoked"]
    migrate(engine)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE api_keys"))
        connection.execute(text(f"CREATE TABLE api_keys ({', '.join(columns)})"))
    store = KeyStore(engine)
    good, sent = create_key("acme", created=NOON)
    store.add(good)
    required = [c for c in columns if c not in OPTIONAL]
    for column in required:
        store.add(create_key("acme", created=NOON)[0])
        with engine.begin() as connection:
            connection.execute(
                text(f"UPDATE api_keys SET {column} = NULL WHERE rowid = last_insert_rowid()")
            )
    assert store.table().find(sent, NOON) == good
    assert list(store.table().by_id) == [good.key_id]
    engine.dispose()
