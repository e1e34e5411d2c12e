"""How often the engine has suspended a request."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column. Of requests that are there already, and of older ingresses, it is unknown."""
    op.add_column("usage_records", sa.Column("preemptions", sa.Integer))
