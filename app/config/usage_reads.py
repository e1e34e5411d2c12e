"""How much of an ingress and of the database ``GET /v1/usage`` may take."""

from __future__ import annotations

from pydantic import Field

from app.core.settings import Settings


class UsageSettings(Settings):
    """Bounds of ``GET /v1/usage``, for each ingress."""

    max_reads: int = Field(
        default=2,
        gt=0,
        le=16,
        description="Readings at once, each with a thread and a database connection of its own; "
        "others get 429. Two keep the database mostly free for records.",
    )
    max_reads_per_tenant: int = Field(
        default=1,
        gt=0,
        description="Of these, how many may be one tenant's, so that no tenant takes all.",
    )
    max_days: int = Field(
        default=366,
        gt=0,
        description="Longest time in one answer, in days; longer ones get 400. A year's bill fits.",
    )
    max_rows: int = Field(
        default=10_000,
        gt=0,
        description="Most groups that the database may find, counted apart for each price; more "
        "get 400. A year by day, model and tier is some thousands.",
    )
    timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="Longest time that the database may take, after which it is stopped and the "
        "request gets 400. Clients and proxies rarely wait longer for a page of totals.",
    )
