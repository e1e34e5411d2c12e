"""The contract suite and bursts of priority over one installed engine; see scripts/gpu_check."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))

from app.core.paths import expand_path  # noqa: E402
from app.core.settings import SettingsError  # noqa: E402
from app.ledger.record import now_utc  # noqa: E402
from deployments.engines.registry import ADAPTERS  # noqa: E402
from scripts import gpu_check_report  # noqa: E402
from scripts.gpu_check_presets import PRESETS, preset  # noqa: E402
from scripts.gpu_check_report import Stage  # noqa: E402

SUITE = REPO / "tests" / "engines" / "test_contract.py"

CONTEXT = {"vllm": "max_model_len", "sglang": "context_length", "tensorrt_llm": "max_seq_len"}
"""The engine argument for the longest prompt and answer: the suite sends a prompt that exceeds
4096 tokens, and answers of 3000."""


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    pool = _pool(options)
    if problem := _missing_gpu(options) or _missing_engine(options, pool) or _bad_pool(pool):
        print(f"gpu_check: {problem}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="frontline-gpu-check-") as folder:
        file = Path(folder) / "pool.json"
        subject = options.preset.subject if options.preset else ""
        gpus = 0 if options.cpu else options.gpus
        file.write_text(json.dumps({"pool": pool, "gpus": gpus, "subject": subject}))
        return _run(file, pool, options)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check",
        description="Run the contract suite and bursts of priority over an installed engine. "
        f"{', '.join(PRESETS)} need no GPU, no --model and no --python: they try the check.",
    )
    parser.add_argument("engine", choices=[*ADAPTERS, *PRESETS])
    parser.add_argument("--model", help="folder or name of a chat model")
    parser.add_argument("--python", help="the engine's interpreter (default: this one)")
    parser.add_argument("--slots", type=int, help="requests at once (default: 8)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of the engine (default: 1)")
    parser.add_argument("--cpu", action="store_true", help="run it without a GPU, to try the check")
    parser.add_argument(
        "--engine-arg", action="append", default=[], metavar="K=V", help="V is read as YAML"
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="K=V", help="a variable for the engine"
    )
    parser.add_argument(
        "--preemptions", type=int,
        help="how often requests are suspended at least (default: 100; 20 without a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "-k", dest="only", default="", help="only tests that match, as pytest's, and no load"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE",
        help="the report, as Markdown, and as JSON beside it (default: gpu-check-ENGINE.md here)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    options.preset = preset(options.engine) if options.engine in PRESETS else None
    if options.preset:
        options.cpu = True
    elif not options.model:
        parser.error("the following arguments are required: --model")
    if options.preemptions is None:
        options.preemptions = 20 if options.preset else 100
    if options.report is None:
        options.report = Path(f"gpu-check-{options.engine}.md")
    return options


def _pool(options: argparse.Namespace) -> dict[str, Any]:
    base: dict[str, Any] = dict(options.preset.pool) if options.preset else {}
    engine = base.get("engine", options.engine)
    args = {name: yaml.safe_load(value) for name, value in _pairs(options.engine_arg)}
    args = base.get("engine_args", {}) | args
    if name := CONTEXT.get(engine):
        args = {name: 4096, **args}
    return {
        "name": "pool",
        "engine": engine,
        "model": options.model or base["model"],
        "python": options.python or base.get("python"),
        "slots": options.slots or base.get("slots", 8),
        "engine_args": args,
        "environment": base.get("environment", {}) | dict(_pairs(options.env)),
    }


def _pairs(given: list[str]) -> list[tuple[str, str]]:
    pairs = [one.partition("=") for one in given]
    if bad := [name for name, separator, _ in pairs if not separator]:
        sys.exit(f"gpu_check: expected K=V, got {bad[0]!r}")
    return [(name, value) for name, _, value in pairs]


def _missing_gpu(options: argparse.Namespace) -> str | None:
    if options.cpu:
        return None
    seen = shutil.which("nvidia-smi") and subprocess.run(
        ["nvidia-smi", "--list-gpus"], capture_output=True, text=True
    )
    count = len(seen.stdout.splitlines()) if seen and seen.returncode == 0 else 0
    if count >= options.gpus:
        return None
    return f"{options.gpus} GPU(s) wanted, {count} found on this machine; --cpu runs without"


def _missing_engine(options: argparse.Namespace, pool: Mapping[str, Any]) -> str | None:
    engine = pool["engine"]
    if engine == "simulated":
        return None
    python = _python(pool)
    look = f"import importlib.util as u, sys; sys.exit(u.find_spec({engine!r}) is None)"
    environment = os.environ | dict(pool["environment"])
    install = f"; scripts/setup {options.preset.setup}" if options.preset else "; see --python"
    try:
        found = subprocess.run([python, "-c", look], env=environment).returncode == 0
    except OSError as error:
        return f"{python} cannot be run: {error.strerror}{install if options.preset else ''}"
    return None if found else f"{engine} is not installed for {python}{install}"


def _python(pool: Mapping[str, Any]) -> str:
    return expand_path(pool["python"]) if pool["python"] else sys.executable


def _bad_pool(pool: Mapping[str, Any]) -> str | None:
    # Imports Ray, for two seconds: what is missing is said without.
    from deployments.model import build

    try:
        build({"id": "checked", "pools": [dict(pool)]})
    except SettingsError as error:
        return str(error)
    return None


def _run(file: Path, pool: Mapping[str, Any], options: argparse.Namespace) -> int:
    print(f"gpu_check: {options.engine} with {pool['model']}", flush=True)
    at, stages = now_utc(), []
    began = time.monotonic()
    status = _run_suite(file, options)
    stages.append(Stage("contract suite, preemption", status == 0, time.monotonic() - began))
    if not options.only:
        print("gpu_check: bursts of priority while default requests fill the engine", flush=True)
        began = time.monotonic()
        bursts = _run_bursts(file, pool, options)
        stages.append(Stage("bursts", bursts == 0, time.monotonic() - began))
        status = bursts or status
    seconds = sum(stage.seconds for stage in stages)
    stages.append(Stage("all, with two starts of the engine", status == 0, seconds))
    _write(file.parent, pool, options, at, stages)
    return status


def _write(
    folder: Path, pool: Mapping[str, Any], options: argparse.Namespace, at: datetime,
    stages: list[Stage],
) -> None:  # fmt: skip
    """Write the report, whatever of the check has run."""
    junit, engine, bursts = (
        folder / name for name in ("suite.xml", "engine.json", "burst-pool.json")
    )
    groups = gpu_check_report.sections(SUITE.read_text())
    report = gpu_check_report.Report(
        at=at,
        engine={
            "name": options.engine,
            "model": Path(pool["model"]).name if pool["model"].startswith(("/", "$"))
            else pool["model"],
            "slots": pool["slots"],
            **(json.loads(engine.read_text()) if engine.exists() else {"started": False}),
        },
        versions=gpu_check_report.about(pool, _python(pool), REPO, look_for_gpus=not options.cpu),
        stages=stages,
        checks=gpu_check_report.read_suite(junit.read_text(), groups) if junit.exists() else (),
        bursts=json.loads(bursts.read_text()) if bursts.exists() else {},
    )  # fmt: skip
    options.report.parent.mkdir(parents=True, exist_ok=True)
    beside = options.report.with_suffix(".json")
    beside.write_text(json.dumps(gpu_check_report.to_json(report), indent=1) + "\n")
    options.report.write_text(gpu_check_report.to_markdown(report))
    print(f"gpu_check: {options.report} and {beside.name} have the report", flush=True)


def _run_suite(file: Path, options: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "pytest", str(SUITE), "--contract-pool", str(file)]
    # A large model may take long to start: only the tests themselves are timed.
    # -s: the long test tells how far it is.
    command += ["-v", "-s", "--tb=short", "-r", "fE", "-o", "timeout_func_only=true"]
    command += ["--junitxml", str(file.parent / "suite.xml"), "-o", "junit_duration_report=call"]
    command += ["-k", options.only] if options.only else []
    environment = os.environ | {"FRONTLINE_PREEMPTIONS": str(options.preemptions)}
    return subprocess.run(command, cwd=REPO, env=environment).returncode


def _run_bursts(file: Path, pool: Mapping[str, Any], options: argparse.Namespace) -> int:
    bench = REPO / "scripts" / "bench" / "contention.py"
    command = [sys.executable, str(bench), "--pool", str(file), "--check", "--max-requests", "5000"]
    command += ["--clients", str(3 * pool["slots"]), "--out", str(file.parent)]
    command += options.preset.bursts if options.preset else ()
    # The whole check is contained already.
    environment = os.environ | {"FRONTLINE_BENCH_CONTAINED": "1"}
    return subprocess.run(command, cwd=REPO, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
