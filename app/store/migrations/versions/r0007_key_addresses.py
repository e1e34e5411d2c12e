"""The addresses from which a key may be used."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column. Keys that are there may be used from everywhere."""
    op.add_column("api_keys", sa.Column("addresses", sa.Text))
