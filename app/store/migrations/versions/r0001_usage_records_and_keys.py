"""Usage records and API keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Written out here, not taken from app.store.schema: what a step did must not change with it.
Amount = sa.Numeric().with_variant(sa.Text(), "sqlite")
Moment = sa.DateTime(timezone=True).with_variant(sa.String(32), "sqlite")


def upgrade() -> None:
    """Make both tables."""
    op.create_table(
        "usage_records",
        sa.Column("request_id", sa.Text, primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("route", sa.Text, nullable=False),
        sa.Column("stream", sa.Boolean, nullable=False),
        sa.Column("requested_tier", sa.Text),
        sa.Column("served_tier", sa.Text),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("engine", sa.Text, nullable=False),
        sa.Column("replica", sa.Text, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("input_price", Amount),
        sa.Column("cached_input_price", Amount),
        sa.Column("output_price", Amount),
        sa.Column("multiplier", Amount),
        sa.Column("rate_card", sa.Text, nullable=False),
        sa.Column("cost", Amount, nullable=False),
        sa.Column("queue_s", sa.Float, nullable=False),
        sa.Column("ttft_s", sa.Float),
        sa.Column("duration_s", sa.Float, nullable=False),
        sa.Column("arrived", Moment, nullable=False),
        sa.Column("ended", Moment, nullable=False),
        sa.Column("day", sa.Date, nullable=False),
    )
    op.create_index("usage_records_by_tenant", "usage_records", ["tenant", "day"])
    op.create_index("usage_records_by_day", "usage_records", ["day"])
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.Text, primary_key=True),
        sa.Column("secret_hash", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("default_tier", sa.Text, nullable=False),
        sa.Column("tiers", sa.Text, nullable=False),
        sa.Column("rpm", sa.Integer),
        sa.Column("tpm", sa.BigInteger),
        sa.Column("priority_share", Amount),
        sa.Column("created", Moment, nullable=False),
        sa.Column("revoked", Moment),
    )
