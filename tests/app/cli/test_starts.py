"""What scripts/run says while engines start, from the reports of their replicas."""

import os
import stat

import pytest

from app import alarms
from app.cli.starts import STALE_S, Starts
from app.contracts.start import PoolStart, StartFailure, StartProblem, StartReport
from deployments.hosting.start_report import StartReporter
from scripts.serve import report_folder

pytestmark = pytest.mark.unit

FAILURE = StartFailure(
    "vllm", StartProblem.OUT_OF_MEMORY, "CUDA out of memory", "lower it", "/logs/x", "n", ("end",)
)
NOW = 1000.0


def reporter(folder, replica="a"):
    path = folder / f"start_chat_vllm_{replica}.json"
    return StartReporter(path, folder / "usual", "org/chat", "vllm")


def starts(folder):
    return Starts(lambda: folder, lambda: NOW)


def age(folder, replica, began):
    path = folder / f"start_chat_vllm_{replica}.json"
    report = StartReport.from_json(path.read_bytes())
    fields = {name: getattr(report, name) for name in report.__slots__}
    path.write_bytes(StartReport(**{**fields, "began": began}).to_json())
    os.utime(path, (NOW, NOW))


def test_the_note_for_the_model_follows_the_start(tmp_path):
    notes = []
    reporter(tmp_path, "before").ready(33.3)
    for end in (lambda it: it.ready(4.0), lambda it: it.failed(FAILURE)):
        it = StartReporter(
            tmp_path / "start_a.json", tmp_path / "usual", "org/chat", "vllm", notes.append
        )
        it.starting()
        it.starting("loading weights 42 %")
        it.starting()
        end(it)
        starts = [note and PoolStart.from_note(note) for note in notes]
        assert [start and start.phase for start in starts] == [
            "", "loading weights 42 %", "loading weights 42 %", None,
        ]  # fmt: skip
        assert {one.pool for one in starts if one} == {"vllm"}
        assert len({*notes}) == 4, "each shows that the replica is alive"
        notes.clear()


def test_each_failed_start_is_said_once_with_all_that_is_known(tmp_path):
    said = starts(tmp_path)
    first, second = reporter(tmp_path), reporter(tmp_path, "b")
    first.starting()
    assert said.failures() == []
    first.failed(FAILURE)
    assert said.failures() == [f"org/chat: {FAILURE.report()}"]
    assert said.failures() == [] and said.progress() == []
    second.failed(FAILURE)
    assert len(said.failures()) == 1


def test_a_start_shows_its_phase_its_time_and_the_usual_one(tmp_path):
    reporter(tmp_path, "before").ready(33.3)
    one = reporter(tmp_path)
    one.starting("loading weights 42 %")
    # The last phase stays while the log says nothing else.
    one.starting()
    age(tmp_path, "a", NOW - 20)
    age(tmp_path, "before", NOW - 500)
    assert starts(tmp_path).progress() == [
        "org/chat, pool vllm: loading weights 42 %, 20 s, last time 33 s"
    ]
    reporter(tmp_path).ready(21.0)
    assert starts(tmp_path).progress() == []


def test_each_of_two_starts_of_a_pool_is_shown(tmp_path):
    """a94f7f2: that which began last only."""
    for name, phase, began in ("a", "loading weights 42 %", NOW - 20), ("b", "compiling", NOW - 5):
        reporter(tmp_path, name).starting(phase)
        age(tmp_path, name, began)
    assert starts(tmp_path).progress() == [
        "org/chat, pool vllm: loading weights 42 %, 20 s",
        "org/chat, pool vllm: compiling, 5 s",
    ]
    reporter(tmp_path).ready(21.0)
    assert starts(tmp_path).progress() == ["org/chat, pool vllm: compiling, 5 s"]


def test_a_start_without_a_known_phase_is_shown_until_its_replica_says_nothing_more(tmp_path):
    reporter(tmp_path).starting()
    age(tmp_path, "a", NOW - 3)
    assert starts(tmp_path).progress() == ["org/chat, pool vllm: starting, 3 s"]
    assert Starts(lambda: tmp_path, lambda: NOW + STALE_S).progress() == []


def test_files_that_are_no_reports_are_passed_over(tmp_path):
    (tmp_path / "start_x_y_z.json").write_text("[1]")
    (tmp_path / "start_x_y_w.json").write_text("{")
    assert starts(tmp_path).progress() == starts(tmp_path).failures() == []
    assert Starts(lambda: None).progress() == []


def test_reports_are_of_this_run_and_readable_by_its_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert report_folder(7) is None
    folder = tmp_path / "ray" / "session_2026-11-29_19-00-00_1_7" / "logs" / "serve"
    folder.mkdir(parents=True)
    assert report_folder(7) == folder and report_folder(1) is None
    reporter(folder).failed(FAILURE)
    [path] = folder.iterdir()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_report_that_cannot_be_written_is_alarmed_and_stops_nothing(tmp_path):
    (tmp_path / "file").touch()
    before = alarms.PROCESS.counts().get("start report", 0)
    reporter(tmp_path / "file").failed(FAILURE)
    assert alarms.PROCESS.counts()["start report"] == before + 1
