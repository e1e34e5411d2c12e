"""What a key may be used for, until when, and by how many requests at once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

Moment = sa.DateTime(timezone=True).with_variant(sa.String(32), "sqlite")


def upgrade() -> None:
    """Add the columns. Keys that are there may be used for everything, and do not expire."""
    op.add_column("api_keys", sa.Column("models", sa.Text))
    op.add_column("api_keys", sa.Column("routes", sa.Text))
    op.add_column("api_keys", sa.Column("in_flight", sa.Integer))
    op.add_column("api_keys", sa.Column("expires", Moment))
