"""The report of scripts/gpu_check: what held on which versions and GPU. Pure, but for ``about``."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tomllib
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from deployments.engines.base import Launch
from deployments.engines.registry import adapter_named
from deployments.preflight.gather import gather_environment, gather_host

HELD, FAILED, SKIPPED = "held", "did not hold", "not checked"
_OUTCOMES: Final = {"failure": FAILED, "error": FAILED, "skipped": SKIPPED}
_SECTION: Final = re.compile(r"\n\n# ([^\n]+)\n\n|\n(?:async )?def (test_\w+)\(")
_MOST_WORDS: Final = 300
_MIB: Final = 1 << 20
_BURST_TIMES: Final = {
    "idle_p50": "TTFT p50, idle engine",
    "idle_p99": "TTFT p99, idle engine",
    "ttft_p50": "TTFT p50, engine full",
    "ttft_p99": "TTFT p99, engine full",
    "longest_pause": "longest pause of an answer",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One test of the contract suite.

    Attributes:
        group: the section of the suite that it is in.
        name: what it is about, in words.
        outcome: ``HELD``, ``FAILED`` or ``SKIPPED``.
        seconds: how long it ran, without the start of the engine.
        why: why it failed or was skipped; empty otherwise.
    """

    group: str
    name: str
    outcome: str
    seconds: float
    why: str = ""

    @property
    def test(self) -> str:
        """What it is about, without the variant that it is called with."""
        return self.name.partition(" (")[0]


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the check: its name, whether all of it held, and how long it took in seconds."""

    name: str
    held: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Report:
    """All that is reported.

    Attributes:
        at: when the check began.
        engine: the engine: as it was asked for, and what it reported of itself.
        versions: what it ran on, by name.
        stages: the parts of the check, in order.
        checks: the tests of the contract suite.
        bursts: what contention.py wrote about bursts of priority; empty if they were not sent.
    """

    at: datetime
    engine: Mapping[str, Any]
    versions: Mapping[str, str]
    stages: Sequence[Stage]
    checks: Sequence[Check] = ()
    bursts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        """Whether everything held that was checked, and something was."""
        return bool(self.checks) and all(stage.held for stage in self.stages)


def sections(source: str) -> dict[str, str]:
    """Return the section of each test in the source of the suite: a comment line of its own."""
    found, section = {}, "Contract"
    for title, test in _SECTION.findall(source):
        section = title or section
        if test:
            found[test] = section
    return found


def read_suite(junit: str, groups: Mapping[str, str]) -> list[Check]:
    """Return the tests in a report of pytest's, in the order in which they ran.

    Args:
        junit: pytest's ``--junitxml``.
        groups: the section of each test function.

    Raises:
        ET.ParseError: it is none.
    """
    # Written by pytest a moment ago, and by nobody else: no entities to expand.
    cases = ET.fromstring(junit).iter("testcase")
    return [_check(case, groups) for case in cases]


def _check(case: ET.Element, groups: Mapping[str, str]) -> Check:
    function, _, variant = case.get("name", "").partition("[")
    variant = variant.rstrip("]").removeprefix("checked").strip("-")
    words = function.removeprefix("test_").replace("_", " ")
    outcome, why = HELD, ""
    for child in case:
        if child.tag in _OUTCOMES:
            outcome = _OUTCOMES[child.tag]
            why = " ".join((child.get("message") or "").split())[:_MOST_WORDS]
    return Check(
        groups.get(function, "Contract"),
        f"{words} ({variant})" if variant else words,
        outcome,
        float(case.get("time") or 0),
        why.removeprefix("Skipped: "),
    )


def to_json(report: Report) -> dict[str, Any]:
    """Return the report as plain values."""
    return {
        "at": report.at.isoformat(timespec="seconds"),
        "held": report.held,
        "engine": dict(report.engine),
        "versions": dict(report.versions),
        "stages": [asdict(stage) for stage in report.stages],
        "groups": {
            group: dict(Counter(check.outcome for check in checks))
            for group, checks in _by_group(report.checks).items()
        },
        "checks": [asdict(check) for check in report.checks],
        "bursts": {name: report.bursts.get(name, []) for name in ("rows", "goals")},
    }


def to_markdown(report: Report) -> str:
    """Return the report as a page of Markdown."""
    lines = [
        f"# {report.engine.get('name')}: {'all held' if report.held else 'NOT ALL HELD'}",
        "",
        f"`scripts/gpu_check`, {report.at:%Y-%m-%d %H:%M} UTC.",
        "",
        *_table(("engine", ""), report.engine.items()),
        *_table(("version", ""), report.versions.items()),
        *_table(
            ("stage", "", "s"),
            [(one.name, _word(one.held), f"{one.seconds:.0f}") for one in report.stages],
        ),
        *_groups(report.checks),
        *_not_held(report.checks),
        *_bursts(report.bursts),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _word(held: bool) -> str:
    return HELD if held else FAILED


def _by_group(checks: Iterable[Check]) -> dict[str, list[Check]]:
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.group, []).append(check)
    return groups


def _groups(checks: Sequence[Check]) -> list[str]:
    if not checks:
        return ["The contract suite did not run.", ""]
    rows = []
    for group, members in _by_group(checks).items():
        counts = Counter(check.outcome for check in members)
        seconds = sum(check.seconds for check in members)
        rows.append((group, *(counts[one] for one in (HELD, FAILED, SKIPPED)), f"{seconds:.1f}"))
    return _table(("contract", HELD, FAILED, SKIPPED, "s"), rows)


def _not_held(checks: Sequence[Check]) -> list[str]:
    """Return what did not hold, and what was not checked, each once for all its variants."""
    counts = Counter(
        (one.outcome, one.group, one.name if one.outcome == FAILED else one.test, one.why)
        for one in checks
        if one.outcome != HELD
    )
    rows = [(*row, number) for row, number in sorted(counts.items())]
    return _table(("outcome", "group", "what", "why", "times"), rows) if rows else []


def _bursts(bursts: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for row in bursts.get("rows", ()):
        figures: list[tuple[object, ...]] = [
            (words, f"{row[name]:.3f} s" if row.get(name) is not None else "-")
            for name, words in _BURST_TIMES.items()
        ]
        figures.append(("first tokens of bursts", row["count"]))
        figures.append(("tokens/s of all tiers, without and with bursts",
                        f"{row['all_alone'] or 0:.1f}, {row['all_with'] or 0:.1f}"))  # fmt: skip
        figures.append(("whole answers among those that a burst met",
                        f"{row['whole']} of {row['met']}"))  # fmt: skip
        figures.append(("preemptions", "-" if row["preemptions"] is None else row["preemptions"]))
        figures.append(("failed requests", row["errors"]))
        lines += _table((f"bursts of priority ({row['endpoint']})", ""), figures)
    if goals := bursts.get("goals"):
        rows = [(goal["what"], goal["measured"], _word(goal["met"])) for goal in goals]
        lines += _table(("goal", "measured", ""), rows)
    elif lines:
        lines += ["The engine does not preempt, so bursts have no goals.", ""]
    return lines


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    cells = ["| " + " | ".join(_cell(one) for one in row) + " |" for row in (head, *rows)]
    return [cells[0], "|" + "---|" * len(head), *cells[1:], ""]


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def about(
    pool: Mapping[str, Any], python: str, repo: Path, *, look_for_gpus: bool
) -> dict[str, str]:
    """Return the versions of everything that the engine runs on, by name.

    Args:
        pool: the pool that is checked.
        python: the engine's interpreter.
        repo: Frontline's folder.
        look_for_gpus: whether to ask the driver for its GPUs.
    """
    environment = os.environ | dict(pool["environment"])
    host = gather_host(environment, look_for_gpus=look_for_gpus)
    found = {
        "Frontline": _frontline(repo),
        "Frontline's Python": platform.python_version(),
        "engine's Python": _python(python, environment),
    }
    launch = Launch(
        pool["model"], "m", "127.0.0.1", 0, pool["slots"], "", python, pool["engine_args"]
    )
    needs = adapter_named(pool["engine"]).needs(launch, environment)
    if needs is not None:
        installed = gather_environment(python, needs, environment)
        found |= {
            f"package {needs.module}": installed.version or "unknown",
            "torch": installed.torch or "none",
            "torch's CUDA": installed.torch_cuda or "none",
        }
    gpus = [f"{gpu.name} ({gpu.total // _MIB} MiB)" for gpu in host.gpus]
    found |= {
        "GPU": "; ".join(gpus) or "no GPU",
        "driver": host.driver or "none",
        "driver's CUDA": ".".join(map(str, host.cuda)) or "none",
        "processors": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}, glibc "
        f"{'.'.join(map(str, host.glibc)) or 'unknown'}",
    }
    return found


def _frontline(repo: Path) -> str:
    """Return Frontline's version, with its revision where git knows it."""
    version = str(tomllib.loads((repo / "pyproject.toml").read_text())["project"]["version"])
    command = ["git", "-C", str(repo), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return version
    revision = told.stdout.strip() if told.returncode == 0 else ""
    return f"{version} ({revision})" if revision else version


def _python(python: str, environment: Mapping[str, str]) -> str:
    command = [python, "-c", "import platform; print(platform.python_version())"]
    try:
        told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return told.stdout.strip() or "unknown"
