"""docs/gpu.md: its table of sizes is recomputed, and its failures are those that are explained."""

import re
from pathlib import Path

import pytest
import yaml

from app.contracts.start import StartProblem
from deployments.engines.registry import adapter_named
from deployments.hosting.start_failure import EngineEnded, EngineNotReady, explain
from deployments.preflight.memory import fit, kv_room, weight_bytes
from deployments.process.supervisor import EngineNotStarted
from scripts.gpu_table import GPUS, MODELS, PAGE, filled

pytestmark = pytest.mark.unit

REPO = PAGE.parents[1]
TEXT = PAGE.read_text()
CONFIGS = sorted((REPO / "configs/gpu").glob("*.yaml"))
FAILURES = re.findall(
    r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", TEXT.partition("## Common failures")[2], re.M
)[1:]
WITHOUT_A_LOG = {
    "the interpreter does not exist": EngineNotStarted("cannot run"),
    "it takes longer than `startup_timeout_s`": EngineNotReady("it was not ready"),
    "it crashes, for whatever reason": EngineEnded(139),
}
SERVED = {
    "Qwen/Qwen3-8B": "Qwen3-8B", "Qwen/Qwen3-14B": "Qwen3-14B", "Qwen/Qwen3-32B": "Qwen3-32B",
}  # fmt: skip
"""The models of the configurations whose sizes the table has."""


def test_the_table_of_sizes_is_what_the_doctor_computes():
    assert filled(TEXT) == TEXT, "run scripts/gpu_table.py"


@pytest.mark.parametrize(("what", "line", "said"), FAILURES)
def test_each_failure_is_explained_in_these_words(what, line, said):
    error = WITHOUT_A_LOG.get(what, EngineEnded(1))
    tail = "" if line == "none" else f"starting\n{line.strip('`')}\n"
    failure = explain("pool", error, tail)
    assert failure.reason == said and failure.advice


def test_every_kind_of_failure_is_there():
    said = {row[2] for row in FAILURES}
    missing = {one for one in StartProblem if explain_kind(one) not in said}
    # It starts, and does not behave: scripts/gpu_check's business.
    assert missing == {StartProblem.NOT_AS_REQUIRED}


def explain_kind(problem):
    from app.contracts.start import REASONS

    return REASONS[problem]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_says_which_gpu_it_is_for_and_its_slots_fit_there(path):
    text = path.read_text()
    head = text.partition("proxy_location")[0]
    size = re.search(r"(\d+) GB", head)
    assert size, "which GPU is it for?"
    memory = next(mib for name, mib in GPUS.items() if name.startswith(f"{size.group(1)} GB"))
    for application in yaml.safe_load(text)["applications"]:
        for pool in (application.get("args") or {}).get("pools", ()):
            if model := MODELS.get(SERVED.get(application["args"]["id"], "")):
                needs = adapter_named(pool["engine"]).needs(launch_of(pool), {})
                weights = weight_bytes(model.weights, model.shape, needs)
                fits = fit(kv_room(memory << 20, weights, needs), model.shape, needs)
                assert fits is not None and fits.longest >= 1
                if pool["slots"] != "auto":
                    assert fits.usual >= pool["slots"], (pool["name"], fits.usual)


def launch_of(pool):
    from app.config.model import PoolSettings
    from deployments.hosting.launch import make_launch

    settings = PoolSettings.model_validate({**pool, "model": "m", "python": None})
    return make_launch("m", settings, host="127.0.0.1", port=0)


def test_versions_are_those_that_setup_installs():
    row = re.search(r"^\| version that .*?\|(.*)\|$", TEXT, re.M)
    assert row
    shown = [cell.strip() for cell in row.group(1).split("|")]
    for engine, version in zip(("vllm", "sglang", "tensorrt-llm"), shown, strict=True):
        lock = (REPO / "requirements" / f"{engine}.lock").read_text()
        assert f"\n{engine}=={version}\n" in lock
        name = engine.replace("-", "_")
        needs = adapter_named(name).needs(launch_of({"name": "p", "engine": name}), {})
        assert needs is not None and version in needs.tried


def test_no_engine_shares_the_applications_environment():
    """Its extras could not be installed: TensorRT-LLM wants an older FastAPI."""
    project = (REPO / "pyproject.toml").read_text()
    assert "optional-dependencies" not in project
    assert Path(REPO / "scripts/setup").read_text().count("install_engine_gpu") >= 2
