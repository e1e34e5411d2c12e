"""Settings of ``GET /v1/usage``: how much of an ingress and of the database it may take."""

from __future__ import annotations

from pydantic import Field

from app.core.settings import Settings


class UsageSettings(Settings):
    """Bounds of ``GET /v1/usage``, for each ingress."""

    max_reads: int = Field(
        default=2,
        gt=0,
        le=16,
        description="Most concurrent usage queries, each with its own thread and database "
        "connection; further ones get 429. Two keep the database mostly free for records.",
    )
    max_reads_per_tenant: int = Field(
        default=1,
        gt=0,
        description="Most of these that one tenant may run, so that no tenant takes all.",
    )
    max_days: int = Field(
        default=366,
        gt=0,
        description="Longest period in one answer, in days; longer ones get 400. A year's bill "
        "fits.",
    )
    max_rows: int = Field(
        default=10_000,
        gt=0,
        description="Most groups that the database may find, counted separately for each price; "
        "more get 400. A year by day, model and tier is a few thousand.",
    )
    timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="Longest time for the database, in seconds. Then the query is stopped and the "
        "request gets 400. Clients and proxies rarely wait longer for a page of totals.",
    )
