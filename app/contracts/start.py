"""Why an engine has failed to start, as a plain value. Pure.

``EngineReplica`` creates it and puts it into the text of its error. Serve keeps that text in its
status of the deployment, where the Model and ``frontline status`` find it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final, Self
from urllib.parse import quote

import orjson

from app.contracts.grown import set_grown_state


class StartProblem(StrEnum):
    """What keeps an engine from starting."""

    CANNOT_RUN = "cannot_run"
    """Its interpreter cannot be run."""
    MISSING_MODULE = "missing_module"
    """Its environment lacks a module."""
    BAD_OPTION = "bad_option"
    """It does not accept an option."""
    NO_GPU = "no_gpu"
    """It finds no GPU, or no driver that fits."""
    OUT_OF_MEMORY = "out_of_memory"
    """The model or its KV cache does not fit into memory."""
    MISSING_MODEL = "missing_model"
    """It does not find the model."""
    PORT_IN_USE = "port_in_use"
    """Another process has its port."""
    DISK_FULL = "disk_full"
    """The disk is full."""
    TIMEOUT = "timeout"
    """It was not ready in time."""
    NOT_AS_REQUIRED = "not_as_required"
    """It runs, and does not behave as Frontline requires."""
    ENDED = "ended"
    """It ended for a reason that is not known."""


REASONS: Final = {
    StartProblem.CANNOT_RUN: "its command cannot be run",
    StartProblem.MISSING_MODULE: "a module is missing in its environment",
    StartProblem.BAD_OPTION: "it does not accept one of its options",
    StartProblem.NO_GPU: "it finds no GPU, or no driver that fits",
    StartProblem.OUT_OF_MEMORY: "it is out of memory",
    StartProblem.MISSING_MODEL: "it does not find the model",
    StartProblem.PORT_IN_USE: "its port is in use",
    StartProblem.DISK_FULL: "the disk is full",
    StartProblem.TIMEOUT: "it was not ready in time",
    StartProblem.NOT_AS_REQUIRED: "it does not behave as required",
    StartProblem.ENDED: "it ended before it was ready",
}
"""Each problem in words that may be shown to clients."""

_MARK: Final = "frontline-start-failure: "
_FOUND: Final = re.compile(re.escape(_MARK) + r"(\{.*\})")


@dataclass(frozen=True, slots=True)
class StartFailure:
    """A start that has failed. Only ``reason`` is for clients: the rest names paths.

    Attributes:
        pool: the pool of the replica.
        problem: what kept the engine from starting.
        detail: what happened, in a line, for the operator.
        advice: what to do about it.
        log: the path of the engine's log; empty if there is none.
        node: the address of its node.
        lines: the last lines of the log.
        found: what was found on the node before the start, a line each.
    """

    pool: str
    problem: StartProblem
    detail: str
    advice: str
    log: str = ""
    node: str = ""
    lines: tuple[str, ...] = ()
    found: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Why it failed, in a few words without paths or addresses."""
        return REASONS[self.problem]

    def report(self) -> str:
        """Return all of it for the operator, in several lines."""
        where = f" on {self.node}" if self.node else ""
        parts = [f"the engine of pool {self.pool!r}{where} failed to start: {self.detail}"]
        parts += [f"  what to do: {self.advice}"]
        parts += [f"  before the start: {one}" for one in self.found]
        if self.log:
            parts += [f"  its log is {self.log}, which ends:"]
        return "\n".join([*parts, *(f"  | {line}" for line in self.lines)])

    def to_text(self) -> str:
        """Return a text for people that ``find_failure`` finds this failure in."""
        return f"{self.report()}\n{_MARK}{orjson.dumps(asdict(self)).decode()}"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the failure that was written as JSON.

        Raises:
            ValueError: it is none.
        """
        return cls.from_fields(orjson.loads(text))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Return the failure with these fields, as JSON has them.

        Raises:
            ValueError: it is none.
        """
        try:
            problem, lines = StartProblem(fields["problem"]), tuple(fields["lines"])
            found = tuple(fields.get("found", ()))
            return cls(**{**fields, "problem": problem, "lines": lines, "found": found})
        except (KeyError, TypeError) as error:
            raise ValueError("not a start failure") from error


def find_failure(text: str) -> StartFailure | None:
    """Return the failure in a text, such as Serve's message; ``None`` if there is none."""
    found = _FOUND.findall(text)
    try:
        return StartFailure.from_json(found[-1]) if found else None
    except ValueError:
        # Of another version, or cut.
        return None


@dataclass(frozen=True, slots=True)
class StartReport:
    """How the start of one replica goes, for ``scripts/run`` and ``frontline status``.

    Attributes:
        model: the model's id.
        pool: the pool of the replica.
        began: when it began, in Unix seconds.
        usual_s: how long the pool's last start took on this machine; ``None`` if unknown.
        phase: what the engine is doing, such as ``loading weights 40 %``; empty if unknown.
        ready: whether the engine is ready.
        failure: why it failed, if it did.
    """

    model: str
    pool: str
    began: float
    usual_s: float | None = None
    phase: str = ""
    ready: bool = False
    failure: StartFailure | None = None

    @property
    def ended(self) -> bool:
        """Whether the start is over: the engine is ready, or the start has failed."""
        return self.ready or self.failure is not None

    def to_json(self) -> bytes:
        """Return the report as JSON."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the report that was written as JSON.

        Raises:
            ValueError: it is none.
        """
        fields = orjson.loads(text)
        try:
            failure = fields.pop("failure")
            told = None if failure is None else StartFailure.from_fields(failure)
            return cls(**fields, failure=told)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError("not a start report") from error


@dataclass(frozen=True, slots=True)
class PoolStart:
    """What one engine that is starting does, for everybody.

    Attributes:
        phase: such as ``loading weights 40 %``; empty if unknown.
        began: when the start began, in Unix seconds.
        usual_s: how long the pool's last start took on that machine; ``None`` if unknown.
        pool: the pool of its replica.
    """

    phase: str
    began: float
    usual_s: float | None = None
    pool: str = ""

    __setstate__ = set_grown_state

    @staticmethod
    def note_prefix(application: str) -> str:
        """Return what the names of an application's notes in Ray's key-value store begin with."""
        # Serve accepts a slash in the name of an application.
        return f"start/{quote(application, safe='')}/"

    @classmethod
    def note_name(cls, application: str, replica_id: str) -> str:
        """Return the name of a replica's note in Ray's key-value store."""
        return f"{cls.note_prefix(application)}{replica_id}"

    @classmethod
    def from_note(cls, note: bytes) -> Self:
        """Return the start in a note of ``note_of``.

        Raises:
            ValueError: it is of another version.
        """
        try:
            return cls(**orjson.loads(note)["start"])
        except (KeyError, TypeError) as error:
            raise ValueError("not a note of a start") from error


def note_of(report: StartReport, at: float) -> bytes | None:
    """Return a report as a note, which differs at every time ``at``, in Unix seconds.

    ``None`` once the start has ended: then there is no note of it.
    """
    if report.ended:
        return None
    start = PoolStart(report.phase, report.began, report.usual_s, report.pool)
    return orjson.dumps({"at": at, "start": asdict(start)})
