"""What a look at a machine finds before an engine is started there, as plain values. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from app.contracts.start import StartProblem


class Level(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """The engine will not start."""
    WARNING = "warning"
    """It may not start, or not serve what is asked of it."""
    OK = "ok"
    """Nothing to do."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding.

    Attributes:
        level: how bad it is.
        what: what was found.
        why: why it matters; empty if all is well.
        fix: what to do about it; empty if all is well.
        problem: what keeps the engine from starting, for an error.
    """

    level: Level
    what: str
    why: str = ""
    fix: str = ""
    problem: StartProblem | None = None

    def __str__(self) -> str:
        why = f": {self.why}" if self.why else ""
        fix = f". Fix: {self.fix}" if self.fix else ""
        return f"{self.level}: {self.what}{why}{fix}"


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found about one pool.

    Attributes:
        findings: the findings.
        gpus_here: how many GPUs the machine shows.
        exports_spans: whether the engine's environment has what it needs to send spans.
        fits: how many requests of a usual length fit into the engine's memory, by arithmetic;
            ``None`` if that cannot be computed.
    """

    findings: tuple[Finding, ...]
    gpus_here: int = 0
    exports_spans: bool = False
    fits: int | None = None


def error(what: str, why: str, fix: str, problem: StartProblem) -> Finding:
    """Return the finding of what keeps an engine from starting."""
    return Finding(Level.ERROR, what, why, fix, problem)


def warning(what: str, why: str, fix: str) -> Finding:
    """Return the finding of what may go wrong."""
    return Finding(Level.WARNING, what, why, fix)


def ok(what: str) -> Finding:
    """Return the finding of what is as it should be."""
    return Finding(Level.OK, what)


def has_error(findings: Iterable[Finding]) -> bool:
    """Return whether one of the findings keeps an engine from starting."""
    return any(finding.level is Level.ERROR for finding in findings)
