"""Whether a key is an admin key."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column. Keys that are there are not admin keys."""
    op.add_column(
        "api_keys", sa.Column("admin", sa.Boolean, nullable=False, server_default=sa.false())
    )
