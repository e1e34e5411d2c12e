"""The report of scripts/gpu_check, from made-up results."""

import json
import math
import re
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.bench.burst_summary import BurstRow
from scripts.bench.report import finite
from scripts.bench.summary import Goal
from scripts.gpu_check_presets import PRESETS, preset
from scripts.gpu_check_report import (
    FAILED,
    HELD,
    SKIPPED,
    Check,
    Report,
    Stage,
    about,
    read_suite,
    sections,
    to_json,
    to_markdown,
)

pytestmark = pytest.mark.unit

REPO = Path(__file__).parents[2]
SUITE = REPO / "tests" / "engines" / "test_contract.py"
GROUPS = sections(SUITE.read_text())
JUNIT = """<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest">
<testcase classname="t" name="test_completions[checked]" time="1.25"/>
<testcase classname="t" name="test_texts_are_ranked_at_their_tier[checked-rerank]" time="0.0">
  <skipped type="pytest.skip" message="Skipped: it does not rank">x</skipped></testcase>
<testcase classname="t" name="test_many_at_once_of_every_kind_are_all_answered[checked]" time="2">
  <failure message="assert 1 == 2&#10; +  where | 1">trace</failure></testcase>
<testcase classname="t" name="test_an_unknown_model[checked]" time="0">
  <error message="failed on setup">trace</error></testcase>
</testsuite></testsuites>"""
ROW = finite(
    asdict(
        BurstRow(
            endpoint="Frontline, preemption", idle_p50=0.1, idle_p99=0.12, count=24, ttft_p50=0.15,
            ttft_p99=math.nan, default_alone=90.0, default_with=80.0, all_alone=100.0,
            all_with=math.nan, taken=0.1, met=9, whole=9, longest_pause=1.0, preemptions=17.0,
            errors=0, sheds=0, lowered=0,
        )
    )
)  # fmt: skip
GOAL = asdict(Goal("Frontline, preemption", "at most 2 x", "1.5 x", True))
REPORT = Report(
    datetime(2026, 11, 30, 12, 15, tzinfo=UTC),
    {"name": "vllm", "version": "0.33.0"},
    {"GPU": "no GPU"},
    [Stage("contract suite", True, 90.4), Stage("bursts", True, 60)],
    [Check("Streams", "frames", HELD, 1.0), Check("Streams", "breaks", SKIPPED, 0.0, "cannot")],
    {"rows": [ROW], "goals": [GOAL]},
)


def test_every_test_of_the_suite_has_a_section():
    functions = set(re.findall(r"^(?:async )?def (test_\w+)", SUITE.read_text(), re.M))
    assert set(GROUPS) == functions
    assert {"Chat completions", "Streams", "Tiers", "Preemption"} <= set(GROUPS.values())
    assert "Contract" not in GROUPS.values(), "the first section has a title"
    assert all(len(title) < 50 for title in GROUPS.values())


def test_pytests_results_are_read_with_reasons():
    completions, ranked, many, unknown = read_suite(JUNIT, GROUPS)
    assert completions == Check("Completions, embeddings, responses", "completions", HELD, 1.25)
    assert (ranked.name, ranked.outcome) == ("texts are ranked at their tier (rerank)", SKIPPED)
    assert (ranked.group, ranked.why) == ("Rankings", "it does not rank")
    assert (many.outcome, many.why) == (FAILED, "assert 1 == 2 + where | 1")
    assert (unknown.outcome, unknown.why) == (FAILED, "failed on setup")


def test_the_page_says_what_held_where_and_how_fast():
    page = to_markdown(REPORT)
    for words in (
        "# vllm: all held", "2026-11-30 12:15 UTC", "| GPU | no GPU |", "| version | 0.33.0 |",
        "| contract suite | held | 90 |", "| Streams | 1 | 0 | 1 | 1.0 |",
        "| not checked | Streams | breaks | cannot | 1 |", "| TTFT p50, engine full | 0.150 s |",
        "| TTFT p99, engine full | - |", "| at most 2 x | 1.5 x | held |", "| 9 of 9 |",
    ):  # fmt: skip
        assert words in page, words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checks": ()}, "The contract suite did not run."),
        ({"stages": [Stage("bursts", False, 1)]}, "| bursts | did not hold | 1 |"),
        ({"bursts": {"rows": [ROW], "goals": []}}, "bursts have no goals"),
        ({"checks": read_suite(JUNIT, GROUPS)}, "where \\| 1 | 1 |"),
        ({"checks": [Check("A", f"x ({n})", SKIPPED, 0, "w") for n in (1, 2)]}, "| x | w | 2 |"),
        ({"checks": [Check("A", f"x ({n})", FAILED, 0, "w") for n in (1, 2)]}, "| x (2) | w | 1 |"),
    ],
)
def test_what_did_not_run_or_hold_is_said(change, words):
    report = replace(REPORT, **change)
    page = to_markdown(report)
    assert words in page
    assert report.held is ("checks" not in change and "stages" not in change) or change["checks"]
    assert to_json(report)["held"] is report.held


def test_without_bursts_there_is_no_table_of_them():
    assert "bursts of priority" not in to_markdown(replace(REPORT, bursts={}))
    assert to_json(replace(REPORT, bursts={}))["bursts"] == {"rows": [], "goals": []}


words = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30)


@given(
    st.lists(
        st.builds(Check, words, words, st.sampled_from([HELD, FAILED, SKIPPED]),
                  st.floats(0, 1e4), words),
        max_size=8,
    )
)  # fmt: skip
def test_both_forms_count_the_same_whatever_the_words(checks):
    report = replace(REPORT, checks=checks)
    plain = json.loads(json.dumps(to_json(report)))
    counted = [number for group in plain["groups"].values() for number in group.values()]
    assert sum(counted) == len(checks) == len(plain["checks"])
    rows = [line for line in to_markdown(report).splitlines() if line.startswith("|")]
    assert all(line.endswith(" |") or set(line) == {"|", "-"} for line in rows)


def test_versions_are_those_of_this_machine():
    pool = {"engine": "vllm", "model": "m", "slots": 8, "engine_args": {}, "environment": {}}
    found = about(pool, sys.executable, REPO, look_for_gpus=False)
    assert found["Frontline"].startswith("0.1.0")
    assert found["engine's Python"] == found["Frontline's Python"]
    assert found["package vllm"] == "unknown" and found["GPU"] == "no GPU"
    assert about(pool | {"engine": "simulated"}, "/nowhere", REPO, look_for_gpus=False)[
        "engine's Python"
    ] == "unknown"  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_pools_that_need_no_gpu(name):
    found = preset(name)
    assert found.pool["engine"] in ("vllm", "sglang", "tensorrt_llm") and found.pool["python"]
    assert (found.setup == name) is (found.subject == "")
