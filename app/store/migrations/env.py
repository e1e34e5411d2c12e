"""What Alembic runs for every command; the connection is passed in by ``app.store.database``."""

from __future__ import annotations

from alembic import context

from app.store.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # The caller's transaction holds the lock, and ends it.
    transactional_ddl=False,
    # SQLite cannot change a table in place.
    render_as_batch=True,
)
context.run_migrations()
