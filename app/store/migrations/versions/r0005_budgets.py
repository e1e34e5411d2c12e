"""Budgets of keys and tenants, and what they have spent, by the ingress that recorded it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

Amount = sa.Numeric().with_variant(sa.Text(), "sqlite")

_GROUP = "key_id, day, ingress, tenant, input_price, cached_input_price, output_price, multiplier"
_TOKENS = ("prompt_tokens", "cached_tokens", "completion_tokens")
_COLUMNS = f"{_GROUP}, {', '.join(_TOKENS)}"
_SUMS = ", ".join(f"sum({name})" for name in _TOKENS)
# What was not served has no prices, and costs nothing.
_COUNTED = "served_tier IS NOT NULL AND key_id <> ''"
_ADD = f"ON CONFLICT ({_GROUP}) DO UPDATE SET " + ", ".join(
    f"{name} = spend.{name} + excluded.{name}" for name in _TOKENS
)


def upgrade() -> None:
    """Add the tables and the column, and have each record added to the spend as it is written."""
    op.add_column("usage_records", sa.Column("ingress", sa.Text, nullable=False, server_default=""))
    op.create_table(
        "budgets",
        sa.Column("owner", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("period", sa.Text, primary_key=True),
        sa.Column("usd", Amount, nullable=False),
        sa.Column("hard", sa.Boolean, nullable=False),
    )
    op.create_table(
        "spend",
        sa.Column("key_id", sa.Text, primary_key=True),
        sa.Column("day", sa.Date, primary_key=True),
        sa.Column("ingress", sa.Text, primary_key=True),
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("input_price", Amount, primary_key=True),
        sa.Column("cached_input_price", Amount, primary_key=True),
        sa.Column("output_price", Amount, primary_key=True),
        sa.Column("multiplier", Amount, primary_key=True),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in _TOKENS),
    )
    op.create_index("spend_by_tenant", "spend", ["tenant", "day"])
    op.execute(
        f"INSERT INTO spend ({_COLUMNS}) SELECT {_GROUP}, {_SUMS} FROM usage_records "
        f"WHERE {_COUNTED} GROUP BY {_GROUP}"
    )
    if op.get_bind().dialect.name == "sqlite":
        _add_trigger_in_sqlite()
    else:
        _add_trigger_in_postgresql()


def _add_trigger_in_sqlite() -> None:
    values = ", ".join(f"new.{name}" for name in _COLUMNS.split(", "))
    op.execute(
        "CREATE TRIGGER spend_of_records AFTER INSERT ON usage_records "
        "WHEN new.served_tier IS NOT NULL AND new.key_id <> '' "
        f"BEGIN INSERT INTO spend ({_COLUMNS}) VALUES ({values}) {_ADD}; END"
    )


def _add_trigger_in_postgresql() -> None:
    op.execute(
        "CREATE FUNCTION add_spend_of_records() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"INSERT INTO spend ({_COLUMNS}) SELECT {_GROUP}, {_SUMS} FROM added "
        # In one order, so that ingresses that write at the same time wait for each other.
        f"WHERE {_COUNTED} GROUP BY {_GROUP} ORDER BY {_GROUP} {_ADD}; RETURN NULL; END $$"
    )
    op.execute(
        "CREATE TRIGGER spend_of_records AFTER INSERT ON usage_records "
        "REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION add_spend_of_records()"
    )
