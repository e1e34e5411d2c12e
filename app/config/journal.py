"""Settings of the journal, which holds usage records until the database has them."""

from __future__ import annotations

from pydantic import Field

from app.core.settings import Settings


class JournalSettings(Settings):
    """The journal: an ingress writes records there before they are in the store."""

    folder: str = Field(
        default="${FRONTLINE_HOME}/ledger/journal",
        description="Folder for the journals of a node's ingresses. It must be on a local disk "
        "that outlives the ingresses; a network file system is not suitable. `~` and environment "
        "variables are expanded on the node.",
    )
    max_mb: int = Field(
        default=256,
        ge=8,
        description="Most disk space for the journals of a node, in MiB. They fill up while the "
        "store is unreachable. Once they are full, requests get 503, so that nothing is served "
        "unbilled. The default holds some 350,000 requests: an hour at 100 a second.",
    )
    segment_mb: int = Field(
        default=8,
        ge=1,
        le=256,
        description="Size of one journal file, in MiB. Its disk space is allocated before it is "
        "needed, and freed once the store has all its records. Small files follow the load, and 8 "
        "MiB still hold more than ten thousand requests.",
    )
    commit_window_ms: float = Field(
        default=0.0,
        ge=0,
        le=50,
        description="How long a record waits to be written together with others, in milliseconds. "
        "0 by default: the next batch gathers while a write is in progress.",
    )
    progress_tokens: int = Field(
        default=256,
        gt=0,
        description="A stream's progress is recorded after this many tokens. It bounds what a "
        "killed ingress can lose of a stream's bill.",
    )
    progress_s: float = Field(
        default=1.0,
        gt=0,
        description="A stream's progress is recorded after this many seconds at the latest, so "
        "that slow streams lose little.",
    )
    flush_interval_s: float = Field(
        default=1.0,
        gt=0,
        description="How often records move from the journal to the store, in seconds. Usage lags "
        "by as much. A transaction costs the same for one record as for hundreds. At a hundred "
        "requests a second, flushing once a second costs half as much per record as flushing four "
        "times a second.",
    )
    adopt_interval_s: float = Field(
        default=5.0,
        gt=0,
        description="How often an ingress looks for journals left by dead ingresses, in seconds.",
    )

    @property
    def max_bytes(self) -> int:
        """``max_mb`` in bytes."""
        return self.max_mb * 1024 * 1024

    @property
    def segment_bytes(self) -> int:
        """``segment_mb`` in bytes."""
        return self.segment_mb * 1024 * 1024
