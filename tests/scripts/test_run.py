"""`scripts/run` looks before it starts: what it sets up, and what keeps it from starting."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

RUN = Path(__file__).parents[2] / "scripts/run"
SAYS = """#!/bin/bash
echo "{name} $*" >>"{log}"
{then}
"""


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a copy of it, whose commands only write that they were called."""
    clone, log = tmp_path / "clone", tmp_path / "log"
    (clone / "scripts").mkdir(parents=True)
    shutil.copy(RUN, clone / "scripts/run")
    (clone / "scripts/activate").write_text(f'FRONTLINE_HOME={tmp_path}; PATH="{tmp_path}:$PATH"\n')

    def command(path, then=""):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SAYS.format(name=path.name, log=log, then=then))
        path.chmod(0o755)

    command(clone / "scripts/setup")
    command(tmp_path / "envs/app/bin/python")

    def start(*arguments, text="applications: []\n", doctor=0, check=0):
        then = f"case $1 in doctor) exit {doctor} ;; check) exit {check} ;; esac"
        command(tmp_path / "frontline", then)
        config = clone / "config.yaml"
        config.write_text(text)
        log.unlink(missing_ok=True)
        ended = subprocess.run(
            [clone / "scripts/run", *arguments, config], capture_output=True, text=True
        )
        return ended, [line.split() for line in log.read_text().splitlines()]

    return start


def test_it_looks_once_and_starts(run):
    ended, calls = run()
    assert ended.returncode == 0, ended.stderr
    assert [name for name, *_ in calls] == ["setup", "frontline", "python"]
    assert calls[1][:2] == ["frontline", "doctor"]


def test_an_error_ends_it_before_anything_is_started(run):
    ended, calls = run(doctor=1)
    assert ended.returncode == 1 and "--anyway" in ended.stderr
    assert [name for name, *_ in calls] == ["setup", "frontline"]


def test_it_starts_anyway_but_never_what_is_no_config(run):
    ended, calls = run("--anyway", doctor=1)
    assert ended.returncode == 0 and [name for name, *_ in calls][-1] == "python"
    ended, calls = run("--anyway", doctor=1, check=1)
    assert ended.returncode == 1 and calls[-1][:2] == ["frontline", "check"]


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ("local.yaml", ["app", "vllm-cpu", "models"]),
        ("three-engines.yaml", ["app", "vllm-cpu", "sglang-cpu", "models"]),
        ("gpu/vllm.yaml", ["app", "vllm"]),
        ("gpu/sglang.yaml", ["app", "sglang"]),
        ("gpu/tensorrt-llm.yaml", ["app", "tensorrt-llm"]),
        ("gpu/tensor-parallel.yaml", ["app", "vllm", "sglang", "tensorrt-llm"]),
        ("gpu/three-engines.yaml", ["app"]),
        ("cluster.yaml", ["app"]),
    ],
)
def test_it_sets_up_what_the_config_names_and_nothing_else(run, config, parts):
    """410afd7 took /models/ of a GPU host for the demo models, and built vLLM for CPUs there."""
    _, calls = run(text=(RUN.parents[1] / "configs" / config).read_text())
    assert calls[0] == ["setup", *parts]
