"""An engine that does not start: why is shown wherever somebody looks, and soon."""

import stat
import time

import pytest

from tests.support.cluster import eventually, pooled_app
from tests.support.waiting import SLOWEST

pytestmark = pytest.mark.integration

PRETENDS = """\
case "$1" in
  -c) echo '{"has_module": true, "version": "0.99.0", "torch": "", "torch_cuda": ""}'; exit 0 ;;
esac
exit 3"""
"""An interpreter that says that it has vLLM 0.99, and starts none."""

ENGINES = {
    "no-module": (
        'echo "/venv/bin/python: No module named vllm" >&2; exit 1',
        "a module is missing in its environment",
    ),
    "bad-option": (
        "echo 'server: error: unrecognized arguments: --speed' >&2; exit 2",
        "it does not accept one of its options",
    ),
    "killed": ("kill -9 $$", "it is out of memory"),
    "nowhere": (None, "its command cannot be run"),
}
"""What each pool's engine does instead of starting, and what clients are told. All of them crash
again whenever Serve tries again. tests/deployments/hosting has the other kinds."""


@pytest.fixture(scope="module")
def failed(frontline, tmp_path_factory):
    """A model of which no engine starts."""
    folder = tmp_path_factory.mktemp("engines")
    pools = {}
    for name, (script, _) in ENGINES.items():
        python = folder / name
        if script is not None:
            python.write_text(f"#!/bin/sh\n{script}\n")
            python.chmod(python.stat().st_mode | stat.S_IXUSR)
        pools[name] = {"python": str(python)}
    frontline.deploy(pooled_app("bad", pools))
    yield frontline
    frontline.remove("bad")


def state(frontline):
    entry = frontline.entry("bad")
    metadata = entry["metadata"] if entry else {}
    return metadata.get("state"), set((metadata.get("state_reason") or "").split("; "))


def test_models_list_requests_and_operators_are_told_why(failed):
    reasons = {reason for _, reason in ENGINES.values()}
    try:
        eventually(lambda: state(failed) == ("failed", reasons), 110)
    except AssertionError:
        pytest.fail(f"{state(failed)}, {failed.snapshot('bad').failed}")
    with failed.http() as http:
        began = time.monotonic()
        answer = http.post("/v1/chat/completions", json={"model": "bad", "messages": []})
        assert time.monotonic() - began < SLOWEST * 5
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "engine_failed")
    assert all(reason in error["message"] for reason in reasons)
    assert "few seconds" not in error["message"] and "/" not in error["message"]
    for pool, failure in failed.snapshot("bad").failed.items():
        assert failure.reason == ENGINES[pool][1]
        assert (not failure.log) == (pool == "nowhere")
        assert failure.advice and failure.detail and failure.node


def test_what_was_found_before_the_start_is_part_of_the_reason(failed, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{PRETENDS}\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    application = pooled_app("bad", {"pool": {"python": str(python)}})
    application["args"]["pools"][0] |= {
        "engine": "vllm", "model": "/no/such/model", "engine_args": {},
    }  # fmt: skip
    failed.deploy(application)
    eventually(lambda: state(failed) == ("failed", {"it does not find the model"}), 110)
    failure = failed.snapshot("bad").failed["pool"]
    assert "no folder /no/such/model" in failure.detail and "`model`" in failure.advice
    assert any("vllm 0.99.0 was not tried" in one for one in failure.found)


def test_a_model_whose_engine_starts_after_all_is_ready(failed):
    failed.deploy(pooled_app("bad", {"pool": {}}))
    eventually(lambda: state(failed) == ("ready", {""}), 60)
