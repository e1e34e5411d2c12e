"""Settings of the access log."""

from __future__ import annotations

from pydantic import Field

from app.core.settings import Settings


class AccessLogSettings(Settings):
    """The access log: one line of JSON for each inference request, without its text."""

    enabled: bool = Field(
        default=True,
        description="Whether the log is written. On, because it answers the first question after "
        "a complaint: what became of this request. It costs some 10 µs of CPU a request, 1 µs of "
        "it on the event loop, and at most `max_mb` times `files` of disk.",
    )
    sample: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of requests that are logged, chosen by request id. All, because an "
        "ingress writes less than 1 MB a second at 1,000 requests a second.",
    )
    problems_always: bool = Field(
        default=True,
        description="Whether requests that were refused, shed, cut off, failed, or served at "
        "another tier than requested are logged whatever `sample` is. These are the ones that are "
        "searched for.",
    )
    folder: str | None = Field(
        default=None,
        description="Folder of the log files, one for each ingress: "
        "`access_APPLICATION_DEPLOYMENT_REPLICA.log`. `~` and environment variables are expanded "
        "on the node. Not set: the folder of Serve's own logs (`logging_config.logs_dir`, by "
        "default `/tmp/ray/session_latest/logs/serve`), which Ray's dashboard and `ray logs` show.",
    )
    max_mb: int = Field(
        default=100,
        ge=1,
        description="Size at which a file is rotated, in MiB. The default holds some 150,000 "
        "requests.",
    )
    files: int = Field(
        default=5,
        ge=1,
        description="Most files of one ingress, the current one included. Older lines are deleted.",
    )

    @property
    def max_bytes(self) -> int:
        """``max_mb`` in bytes."""
        return self.max_mb * 1024 * 1024
