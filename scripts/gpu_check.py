"""The contract suite and bursts of priority over one installed engine; see scripts/gpu_check."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))

from app.core.settings import SettingsError  # noqa: E402
from deployments.engines.registry import ADAPTERS  # noqa: E402

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
        file.write_text(json.dumps({"pool": pool, "gpus": 0 if options.cpu else options.gpus}))
        return _run(file, options)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check",
        description="Run the contract suite and bursts of priority over an installed engine.",
    )
    parser.add_argument("engine", choices=list(ADAPTERS))
    parser.add_argument("--model", required=True, help="folder or name of a chat model")
    parser.add_argument("--python", help="the engine's interpreter (default: this one)")
    parser.add_argument("--slots", type=int, default=8, help="requests at once (default: 8)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of the engine (default: 1)")
    parser.add_argument("--cpu", action="store_true", help="run it without a GPU, to try the check")
    parser.add_argument(
        "--engine-arg", action="append", default=[], metavar="K=V", help="V is read as YAML"
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="K=V", help="a variable for the engine"
    )
    parser.add_argument(
        "--preemptions", type=int, default=100, help="how often requests are suspended at least"
    )
    parser.add_argument(
        "-k", dest="only", default="", help="only tests that match, as pytest's, and no load"
    )
    return parser.parse_args(arguments)


def _pool(options: argparse.Namespace) -> dict[str, Any]:
    args = {name: yaml.safe_load(value) for name, value in _pairs(options.engine_arg)}
    if name := CONTEXT.get(options.engine):
        args = {name: 4096, **args}
    return {
        "name": "pool",
        "engine": options.engine,
        "model": options.model,
        "python": options.python,
        "slots": options.slots,
        "engine_args": args,
        "environment": dict(_pairs(options.env)),
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
    if options.engine == "simulated":
        return None
    python = options.python or sys.executable
    look = f"import importlib.util as u, sys; sys.exit(u.find_spec({options.engine!r}) is None)"
    environment = os.environ | dict(pool["environment"])
    try:
        found = subprocess.run([python, "-c", look], env=environment).returncode == 0
    except OSError as error:
        return f"{python} cannot be run: {error.strerror}"
    return None if found else f"{options.engine} is not installed for {python}; see --python"


def _bad_pool(pool: Mapping[str, Any]) -> str | None:
    # Imports Ray, for two seconds: what is missing is said without.
    from deployments.model import build

    try:
        build({"id": "checked", "pools": [dict(pool)]})
    except SettingsError as error:
        return str(error)
    return None


def _run(file: Path, options: argparse.Namespace) -> int:
    print(f"gpu_check: {options.engine} with {options.model}", flush=True)
    status = _run_suite(file, options)
    if options.only:
        return status
    print("gpu_check: bursts of priority while default requests fill the engine", flush=True)
    return _run_bursts(file, options) or status


def _run_suite(file: Path, options: argparse.Namespace) -> int:
    suite = REPO / "tests" / "engines" / "test_contract.py"
    command = [sys.executable, "-m", "pytest", str(suite), "--contract-pool", str(file)]
    # A large model may take long to start: only the tests themselves are timed.
    # -s: the long test tells how far it is.
    command += ["-v", "-s", "--tb=short", "-r", "fE", "-o", "timeout_func_only=true"]
    command += ["-k", options.only] if options.only else []
    environment = os.environ | {"FRONTLINE_PREEMPTIONS": str(options.preemptions)}
    return subprocess.run(command, cwd=REPO, env=environment).returncode


def _run_bursts(file: Path, options: argparse.Namespace) -> int:
    bench = REPO / "scripts" / "bench" / "contention.py"
    command = [sys.executable, str(bench), "--pool", str(file), "--check", "--max-requests", "5000"]
    command += ["--clients", str(3 * options.slots), "--out", str(file.parent)]
    # The whole check is contained already.
    environment = os.environ | {"FRONTLINE_BENCH_CONTAINED": "1"}
    return subprocess.run(command, cwd=REPO, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
