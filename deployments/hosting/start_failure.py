"""Finds out from an engine's log, status and error why it has failed to start. Pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from typing import Final

from app.contracts.findings import Finding, Level
from app.contracts.start import StartFailure, StartProblem
from app.core.settings import SettingsError
from deployments.engines.base import EngineContractError
from deployments.process.supervisor import EngineNotStarted

KEPT_LINES: Final = 20
"""Lines of the log that are shown: a traceback's end, and not much of what led to it."""

_SIGNS: Final = tuple(
    (problem, re.compile(pattern))
    for problem, pattern in (
        (StartProblem.DISK_FULL, r"No space left on device"),
        (
            StartProblem.NO_GPU,
            r"Found no NVIDIA driver|libcuda\.so|CUDA driver version is insufficient"
            r"|NVML Shared Library Not Found|[Nn]o CUDA-capable device|No CUDA GPUs are available"
            r"|Failed to infer device type|forward compatibility was attempted",
        ),
        (
            StartProblem.OUT_OF_MEMORY,
            r"OutOfMemoryError|[Oo]ut of memory|No available memory for the cache blocks"
            r"|is less than desired GPU memory utilization|larger than the (available|maximum)"
            r"|Not enough (GPU )?memory|MemoryError|Cannot allocate memory|bad_alloc",
        ),
        (StartProblem.PORT_IN_USE, r"[Aa]ddress already in use|EADDRINUSE"),
        (StartProblem.MISSING_MODULE, r"No module named \S+|ModuleNotFoundError"),
        (
            StartProblem.BAD_OPTION,
            r"unrecognized arguments?:|error: argument |invalid choice: |[Nn]o such option"
            r"|the following arguments are required|unexpected keyword argument"
            r"|Extra inputs are not permitted",
        ),
        (
            StartProblem.MISSING_MODEL,
            r"Repo(sitory)? ?[Nn]ot ?[Ff]ound|does not appear to have a file named"
            r"|not a valid model identifier|HFValidationError|LocalEntryNotFoundError"
            r"|OfflineModeIsEnabled|Can't load (the )?(tokenizer|config|model)"
            r"|(No such file|not found).{0,200}config\.json|[Mm]odel (path|folder) .*not exist",
        ),
    )
)
"""What engines and their libraries write; the first that is found in the log's end counts. What
names a cause exactly comes before what may follow from it."""

_ADVICE: Final = {
    StartProblem.CANNOT_RUN: "check `python` of the pool: it must be the interpreter of the "
    "engine's environment, on this node",
    StartProblem.MISSING_MODULE: "install the engine in the environment of the pool's `python`, or "
    "name the interpreter of one that has it",
    StartProblem.BAD_OPTION: "correct `engine_args` of the pool; `frontline plan CONFIG` shows the "
    "command line",
    StartProblem.NO_GPU: "run `nvidia-smi` on this node; give the pool `num_gpus` in its "
    "deployment's `ray_actor_options`",
    StartProblem.OUT_OF_MEMORY: "lower `slots` or the longest context in `engine_args`, take a "
    "smaller model, or give it more GPUs; see whether another process has the memory",
    StartProblem.MISSING_MODEL: "check `model` of the pool: a folder on this node, or a name that "
    "it can download (`HF_HUB_OFFLINE`, `HF_TOKEN` in `environment`)",
    StartProblem.PORT_IN_USE: "end what listens there; `frontline doctor` shows it",
    StartProblem.DISK_FULL: "make room on this node's disk",
    StartProblem.TIMEOUT: "raise `startup_timeout_s` of the pool if the log shows that it was "
    "still loading",
    StartProblem.NOT_AS_REQUIRED: "see docs/engines.md for the versions that were tried",
    StartProblem.ENDED: "read the engine's log",
}


class EngineEnded(RuntimeError):
    """An engine ended before it was ready; ``returncode`` is its status, or minus its signal."""

    def __init__(self, returncode: int | None) -> None:
        how = f"ended with status {returncode}"
        if returncode is not None and returncode < 0:
            how = f"was ended by signal {-returncode}"
        super().__init__(f"it {how} before it was ready")
        self.returncode = returncode


class EngineNotReady(TimeoutError):
    """An engine did not become ready in time."""


def explain(
    pool: str,
    error: Exception,
    tail: str,
    *,
    log: str = "",
    node: str = "",
    findings: Sequence[Finding] = (),
) -> StartFailure:
    """Return why a start failed.

    What was found before the start explains what neither the error nor the log does, and is quoted
    in any case.

    Args:
        pool: the pool's name.
        error: what the start was ended by.
        tail: the end of the engine's log.
        log: the path of the log.
        node: the address of the node.
        findings: what was found on the node before the start.
    """
    problem, detail = _problem(error, tail)
    advice = _ADVICE[problem]
    notable = [one for one in findings if one.level is not Level.OK]
    if known := _known_before(problem, notable):
        problem, advice = known.problem or problem, known.fix
        detail = f"{detail}; {known.what}: {known.why}"
    lines = tuple(tail.splitlines()[-KEPT_LINES:])
    found = tuple(map(str, notable))
    return StartFailure(pool, problem, detail, advice, log, node, lines, found)


def _known_before(problem: StartProblem, findings: Sequence[Finding]) -> Finding | None:
    """Return the finding that explains a failed start; ``None`` if none does."""
    errors = [one for one in findings if one.problem is not None]
    if problem is StartProblem.ENDED:
        return next(iter(errors), None)
    return next((one for one in errors if one.problem is problem), None)


def _problem(error: Exception, tail: str) -> tuple[StartProblem, str]:
    summary = _first_line(error)
    match error:
        case EngineEnded():
            return _of_end(error.returncode, tail, summary)
        case EngineNotStarted() | SettingsError():
            return StartProblem.CANNOT_RUN, summary
        case EngineNotReady():
            return StartProblem.TIMEOUT, summary
        case EngineContractError():
            return StartProblem.NOT_AS_REQUIRED, summary
    return StartProblem.ENDED, summary


def _of_end(returncode: int | None, tail: str, summary: str) -> tuple[StartProblem, str]:
    for problem, sign in _SIGNS:
        if found := _line_of(sign, tail):
            return problem, f"{summary}: {found}"
    if returncode == -signal.SIGKILL:
        # The kernel's way of ending what takes the machine's memory.
        return StartProblem.OUT_OF_MEMORY, f"{summary}, maybe for want of memory"
    return StartProblem.ENDED, summary


def _line_of(sign: re.Pattern[str], tail: str) -> str:
    """Return the last line that has a sign; empty if none has."""
    return next((line.strip() for line in reversed(tail.splitlines()) if sign.search(line)), "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
