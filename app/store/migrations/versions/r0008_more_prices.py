"""Cache writes, images and seconds of recordings: their counts and their prices."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

Amount = sa.Numeric().with_variant(sa.Text(), "sqlite")

_FORMER = "key_id, day, ingress, tenant, input_price, cached_input_price, output_price, multiplier"
_FORMER_COUNTS = "prompt_tokens, cached_tokens, completion_tokens"
_NEW_PRICES = ("cache_write_price", "image_price", "audio_second_price")
_NEW_COUNTS = ("cache_write_tokens", "images", "audio_seconds")
_GROUP = f"{_FORMER}, {', '.join(_NEW_PRICES)}"
_COUNTS = (*_FORMER_COUNTS.split(", "), *_NEW_COUNTS)
_COLUMNS = f"{_GROUP}, {', '.join(_COUNTS)}"
_SUMS = ", ".join(f"sum({name})" for name in _COUNTS)
# What was not served has no prices, and costs nothing.
_COUNTED = "served_tier IS NOT NULL AND key_id <> ''"
_ADD = f"ON CONFLICT ({_GROUP}) DO UPDATE SET " + ", ".join(
    f"{name} = spend.{name} + excluded.{name}" for name in _COUNTS
)


def upgrade() -> None:
    """Add the columns, also to the spend: a new table with what the former one has."""
    sqlite = op.get_bind().dialect.name == "sqlite"
    # First, so that no record is written between the two triggers.
    if sqlite:
        op.execute("DROP TRIGGER spend_of_records")
    else:
        op.execute("DROP TRIGGER spend_of_records ON usage_records")
    for name in _NEW_COUNTS:
        op.add_column(
            "usage_records", sa.Column(name, sa.BigInteger, nullable=False, server_default="0")
        )
    for name in _NEW_PRICES:
        op.add_column("usage_records", sa.Column(name, Amount))
    op.drop_index("spend_by_tenant", "spend")
    op.rename_table("spend", "former_spend")
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
        *(sa.Column(name, Amount, primary_key=True) for name in _NEW_PRICES),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in _COUNTS),
    )
    op.execute(
        f"INSERT INTO spend ({_COLUMNS}) SELECT {_FORMER}, 0, 0, 0, {_FORMER_COUNTS}, 0, 0, 0 "
        "FROM former_spend"
    )
    op.drop_table("former_spend")
    op.create_index("spend_by_tenant", "spend", ["tenant", "day"])
    if sqlite:
        _add_trigger_in_sqlite()
    else:
        _add_trigger_in_postgresql()


def _or_zero(name: str, zero: str) -> str:
    # Ingresses from before there were these prices write records without them.
    return f"coalesce({name}, {zero})" if name.removeprefix("new.") in _NEW_PRICES else name


def _add_trigger_in_sqlite() -> None:
    values = ", ".join(_or_zero(f"new.{name}", "'0'") for name in _COLUMNS.split(", "))
    op.execute(
        "CREATE TRIGGER spend_of_records AFTER INSERT ON usage_records "
        "WHEN new.served_tier IS NOT NULL AND new.key_id <> '' "
        f"BEGIN INSERT INTO spend ({_COLUMNS}) VALUES ({values}) {_ADD}; END"
    )


def _add_trigger_in_postgresql() -> None:
    group = ", ".join(_or_zero(name, "0") for name in _GROUP.split(", "))
    op.execute(
        "CREATE OR REPLACE FUNCTION add_spend_of_records() RETURNS trigger LANGUAGE plpgsql "
        f"AS $$ BEGIN INSERT INTO spend ({_COLUMNS}) SELECT {group}, {_SUMS} FROM added "
        # In one order, so that ingresses that write at the same time wait for each other.
        f"WHERE {_COUNTED} GROUP BY {group} ORDER BY {group} {_ADD}; RETURN NULL; END $$"
    )
    op.execute(
        "CREATE TRIGGER spend_of_records AFTER INSERT ON usage_records "
        "REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION add_spend_of_records()"
    )
