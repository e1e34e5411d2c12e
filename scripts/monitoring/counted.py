"""How much a counter has grown in a window, its first sample included, in PromQL. Pure."""

from __future__ import annotations


def counted(counter: str, window: str, before: str = "1h") -> str:
    """Return the expression for what a counter has counted within a window, by series.

    ``increase`` sees what lies between two samples. What a process counts before Prometheus reads
    it for the first time is lost to it: an alarm at its start, or a request turned away in its
    first seconds. A series that is new in the window counts whole here.

    Args:
        counter: its selector, such as ``name{label="value"}``.
        window: a PromQL duration.
        before: a PromQL duration. A series is new if it has no sample in so long before the window,
            so that a missed scrape makes no series new.
    """
    new = f"{counter} unless present_over_time({counter}[{before}] offset {window})"
    return f"({new}) or increase({counter}[{window}])"
