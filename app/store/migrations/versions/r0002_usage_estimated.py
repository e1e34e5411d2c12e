"""Whether the tokens of a record are an estimate."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column. Records that are there were counted by engines."""
    op.add_column(
        "usage_records",
        sa.Column("usage_estimated", sa.Boolean, nullable=False, server_default=sa.false()),
    )
