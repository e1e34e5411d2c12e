"""How the ledger keeps its records, as the operator set it."""

from __future__ import annotations

from pydantic import Field

from app.core.settings import Settings


class JournalSettings(Settings):
    """The journal: where an ingress writes records before the store has them."""

    folder: str = Field(
        default="${FRONTLINE_HOME}/ledger/journal",
        description="Folder for the journals of a node's ingresses, on a local disk that outlives "
        "them; a network file system does not do. `~` and environment variables are expanded on "
        "the node.",
    )
    max_mb: int = Field(
        default=256,
        ge=8,
        description="Most that the journals of a node may take, in MiB. While the store is away "
        "they fill up; then requests get 503 rather than service that nobody bills. The default "
        "holds some 350,000 requests: an hour at 100 a second.",
    )
    segment_mb: int = Field(
        default=8,
        ge=1,
        le=256,
        description="Size of one file of a journal, in MiB. Its space is taken from the disk "
        "before it is needed, and given back when the store has all of it: small files follow "
        "the load, and 8 MiB still hold more than ten thousand requests.",
    )
    commit_window_ms: float = Field(
        default=0.0,
        ge=0,
        le=50,
        description="How long a record waits for others to be written with it, in milliseconds. "
        "None by default: while one write is under way the next batch gathers by itself.",
    )
    progress_tokens: int = Field(
        default=256,
        gt=0,
        description="A stream's progress is written down after so many tokens: what an ingress "
        "that is killed can lose of a stream's bill.",
    )
    progress_s: float = Field(
        default=1.0,
        gt=0,
        description="And at the latest after so many seconds, so that slow streams lose little.",
    )
    flush_interval_s: float = Field(
        default=1.0,
        gt=0,
        description="How often records move from the journal to the store. Usage lags by as much; "
        "a transaction costs the same for one record as for hundreds, so at a hundred requests a "
        "second those of a second cost half as much each as those of a quarter.",
    )
    adopt_interval_s: float = Field(
        default=5.0,
        gt=0,
        description="How often an ingress looks for journals that a dead one has left.",
    )

    @property
    def max_bytes(self) -> int:
        """``max_mb`` in bytes."""
        return self.max_mb * 1024 * 1024

    @property
    def segment_bytes(self) -> int:
        """``segment_mb`` in bytes."""
        return self.segment_mb * 1024 * 1024
