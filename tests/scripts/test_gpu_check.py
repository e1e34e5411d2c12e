"""scripts/gpu_check says plainly and early what is missing; the rest is the contract suite."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

CHECK = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


TIERS = "test_a_clients_own_priority_never_reaches_the_engine"
JUNIT = f'<testsuite><testcase name="{TIERS}[checked]"/></testsuite>'


def check(*arguments, path="/nonexistent"):
    ended = subprocess.run(
        [sys.executable, CHECK, *arguments],
        env={**os.environ, "PATH": str(path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return ended.returncode, ended.stderr


@pytest.fixture
def one_gpu(tmp_path):
    """A folder with an nvidia-smi that lists one GPU."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "GPU 0: NVIDIA H100 (UUID: GPU-0)"\n')
    tool.chmod(0o755)
    return tmp_path


def test_without_a_gpu_it_ends_at_once():
    status, words = check("vllm", "--model", "m")
    assert status == 2
    assert words == "gpu_check: 1 GPU(s) wanted, 0 found on this machine; --cpu runs without\n"


def test_with_fewer_gpus_than_wanted_it_ends_at_once(one_gpu):
    status, words = check("vllm", "--model", "m", "--gpus", "2", path=one_gpu)
    assert status == 2 and "2 GPU(s) wanted, 1 found" in words


def test_an_engine_that_is_not_installed_is_named(one_gpu):
    status, words = check("tensorrt_llm", "--model", "m", path=one_gpu)
    assert status == 2 and "tensorrt_llm is not installed for" in words
    status, words = check("vllm", "--model", "m", "--cpu", "--python", "/nowhere/python")
    assert status == 2 and "/nowhere/python cannot be run" in words


def test_the_suite_is_followed_by_bursts_unless_tests_are_chosen(monkeypatch, tmp_path):
    module = importlib.import_module("scripts.gpu_check")
    runs, real = [], subprocess.run

    def run(command, env=None, **options):
        if sys.executable != command[0] or command[1] == "-c":
            return real(command, env=env, **options)  # the report asks for versions
        runs.append((command, env))
        if "pytest" in command:
            Path(command[command.index("--junitxml") + 1]).write_text(JUNIT)
        return subprocess.CompletedProcess(command, 3 if "pytest" in command else 0)

    monkeypatch.setattr(module.subprocess, "run", run)
    path = tmp_path / "reports" / "first.md"
    arguments = ["simulated", "--model", "/models/m", "--cpu", "--slots", "4", "--preemptions", "7"]
    arguments += ["--report", str(path)]
    assert module.main(arguments) == 3, "the suite's own status"
    (suite, environment), (bursts, _) = runs
    page, plain = path.read_text(), json.loads(path.with_suffix(".json").read_text())
    assert "# simulated: NOT ALL HELD" in page and "| model | m |" in page
    assert "| contract suite, preemption | did not hold |" in page and "| bursts | held |" in page
    assert plain["groups"] == {"Tiers": {"held": 1}} and not plain["held"]
    assert "/models" not in page, "no folders of the machine"
    assert "pytest" in suite and environment["FRONTLINE_PREEMPTIONS"] == "7"
    assert (
        "--pool" in bursts and "--check" in bursts and bursts[bursts.index("--clients") + 1] == "12"
    )
    runs.clear()
    module.main([*arguments, "-k", "shape"])
    assert len(runs) == 1


def test_a_model_is_wanted_unless_the_engine_brings_one(monkeypatch, tmp_path):
    status, words = check("vllm")
    assert status == 2 and "required: --model" in words
    module = importlib.import_module("scripts.gpu_check")
    runs = []

    def run(command, env=None, **options):
        runs.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(module.subprocess, "run", run)
    arguments = ["stand-in", "--slots", "2", "--report", str(tmp_path / "r.md")]
    assert module.main(arguments) == 0
    [bursts] = [command for command in runs if "--pool" in command]
    assert bursts[bursts.index("--clients") + 1] == "6" and "--bursts" in bursts
    page = (tmp_path / "r.md").read_text()
    assert "# stand-in: NOT ALL HELD" in page, "no test has run"
    assert "| started | False |" in page


def test_an_engine_of_the_cpu_that_is_not_set_up_is_named(monkeypatch):
    monkeypatch.setenv("FRONTLINE_HOME", "/nowhere")
    status, words = check("sglang-cpu")
    assert status == 2 and "scripts/setup sglang-cpu" in words


def test_a_bad_engine_argument_is_named():
    status, words = check("simulated", "--model", "m", "--cpu", "--engine-arg", "pace=1")
    assert status == 2 and "engine_args.pace" in words
    status, words = check("simulated", "--model", "m", "--cpu", "--engine-arg", "pace")
    assert status == 1 and "expected K=V, got 'pace'" in words
