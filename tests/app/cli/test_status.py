"""The status as it is drawn, out of what Ray and Serve would tell. Live: tests/integration."""

import io

import pytest
from rich.console import Console

from app.cli.board import ModelFrame
from app.cli.diff import Difference
from app.cli.status import ApplicationRow, ClusterStatus, DeploymentRow, NodeRow
from app.cli.status_view import render
from app.contracts.start import StartFailure, StartProblem

pytestmark = pytest.mark.unit

HEAD = NodeRow("a" * 56, "10.0.0.1", True, True, {"CPU": (1.5, 4.0)}, {})
GPU = NodeRow("b" * 56, "10.0.0.2", False, True, {"GPU": (1, 2)}, {"engine": "vllm [1]"})
POOL = DeploymentRow(
    "vllm", "UPDATING", 1, 3, {"STARTING": 2}, "slow to start\nand more", ("10.0.0.2",)
)
LOST = ModelFrame("lost", "DEPLOYING", id="org/lost", missing={"sglang": "label engine=sglang"})


def drawn(differs=None):
    applications = (
        ApplicationRow("lost", "DEPLOYING", "", (), LOST),
        ApplicationRow("served", "RUNNING", "all is well", (POOL,)),
    )
    shown = io.StringIO()
    console = Console(file=shown, width=160)
    console.print(render(ClusterStatus("10.0.0.1:6379", (HEAD, GPU), applications, differs)))
    return shown.getvalue()


def test_nodes_and_pools_are_there_with_what_is_used_of_them():
    shown = drawn()
    assert "aaaaaaaa (head)  10.0.0.1  CPU 1.5/4" in shown
    # Nothing that stands in a label is taken for markup.
    assert "GPU 1/2" in shown and "engine=vllm [1]" in shown
    assert "1/3, 2 starting" in shown and "UPDATING" in shown
    assert "served, vllm: slow to start\n" in shown.replace("  ", "")
    assert "all is well" not in shown


def test_what_no_node_offers_is_said():
    assert "lost: no node offers what pool sglang asks for: label engine=sglang" in drawn()


def test_an_adapter_that_an_engine_failed_to_load_is_named_with_its_reason():
    model = ModelFrame("m", "RUNNING", id="org/m", unloaded={"org/law": "No adapter at /x [1]"})
    rows = (ApplicationRow("m", "RUNNING", "", (), model),)
    shown = io.StringIO()
    Console(file=shown, width=160).print(render(ClusterStatus("10.0.0.1:6379", (HEAD,), rows)))
    words = "m: the adapter org/law is not loaded, and is tried again: No adapter at /x [1]"
    assert words in shown.getvalue()


def test_differences_are_told_only_where_a_file_was_named():
    assert "deployed" not in drawn()
    assert "The file is what is deployed." in drawn(())
    shown = drawn((Difference("applications.m.args.pools.vllm.slots", 16, 8),))
    assert ["applications.m.args.pools.vllm.slots", "16", "8"] in [
        line.split() for line in shown.splitlines()
    ]


FAILURE = StartFailure(
    "vllm", StartProblem.MISSING_MODULE, "No module named 'vllm' [1]", "install it", "/logs/a.log",
    "10.0.0.2", ("Traceback", "ModuleNotFoundError"),
)  # fmt: skip


@pytest.mark.parametrize("told_by", ["model", "serve"])
def test_a_failed_start_is_said_once_with_its_log_and_what_to_do(told_by):
    """d26830b: only the first line of Serve's message, which is the same for every cause."""
    message = f"A replica failed to start with exception. Error:\n{FAILURE.to_text()}"
    pool = DeploymentRow("vllm", "UPDATING", 0, 1, {}, message, ())
    model = ModelFrame("bad", "FAILED", id="org/bad", failed={"vllm": FAILURE})
    rows = ApplicationRow(
        "bad", "DEPLOYING", message, (pool,), model if told_by == "model" else None
    )
    shown = io.StringIO()
    console = Console(file=shown, width=160)
    console.print(render(ClusterStatus("10.0.0.1:6379", (HEAD,), (rows,), None)))
    assert shown.getvalue().count("failed to start") == 1
    for line in FAILURE.report().splitlines():
        assert line in shown.getvalue()


def test_engines_that_are_starting_say_what_they_do():
    status = ClusterStatus("10.0.0.1:6379", (HEAD,), (), None, ("m, pool p: loading weights 4 %",))
    shown = io.StringIO()
    Console(file=shown, width=160).print(render(status))
    assert "starting: m, pool p: loading weights 4 %" in shown.getvalue()
