"""Which environment scripts/setup uses, with Pythons that only say that they install something."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

SETUP = Path(__file__).parents[2] / "scripts/setup"
PYTHON = """#!/bin/bash
case "$*" in
  *platform*) echo "CPython {version} x86_64" ;;
  *_base_executable*) readlink -f "$0" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository's set-up."""
    (tmp_path / "clone/scripts").mkdir(parents=True)
    (tmp_path / "clone/requirements").mkdir()
    shutil.copy(SETUP, tmp_path / "clone/scripts/setup")
    (tmp_path / "clone/requirements/app.lock").write_text("ray==2.60.0\n")
    return tmp_path / "clone"


@pytest.fixture
def python(tmp_path):
    """Return a function that makes a Python of a version, and returns its folder."""

    def make(version):
        folder = tmp_path / version
        folder.mkdir()
        (folder / "python3.11").write_text(PYTHON.format(version=version))
        (folder / "python3.11").chmod(0o755)
        return folder

    return make


def set_up(clone, *path, **environment):
    """Set the application up; return the environments that are there, and the one in use."""
    home = clone.parent / "home"
    path = os.pathsep.join([*map(str, path), "/usr/bin", "/bin"])
    subprocess.run(
        [clone / "scripts/setup", "app"],
        env={"FRONTLINE_HOME": str(home), "PATH": path} | environment,
        check=True,
        capture_output=True,
    )
    return {one.name for one in (home / "envs").glob("app-*")}, (home / "envs/app").readlink().name


def test_the_environment_that_is_there_is_used_whatever_python_is_first_in_path(clone, python):
    first, second = python("3.11.7"), python("3.11.2")
    [made], _ = set_up(clone, first)
    assert set_up(clone, second, first) == ({made}, made)


def test_of_several_the_one_in_use_stays_in_use(clone, python):
    first, second = python("3.11.7"), python("3.11.2")
    set_up(clone, first)
    both, used = set_up(clone, FRONTLINE_PYTHON=str(second / "python3.11"))
    assert len(both) == 2
    assert set_up(clone, first) == (both, used)


@pytest.mark.parametrize("gone", ["bin/python", ".complete"])
def test_what_is_not_complete_is_not_used(clone, python, gone):
    first, second = python("3.11.7"), python("3.11.2")
    [made], _ = set_up(clone, first)
    (clone.parent / "home/envs" / made / gone).unlink()
    _, used = set_up(clone, second)
    assert used != made


def test_what_was_made_of_another_lock_is_not_used(clone, python):
    first = python("3.11.7")
    [made], _ = set_up(clone, first)
    (clone / "requirements/app.lock").write_text("ray==2.61.0\n")
    both, used = set_up(clone, first)
    assert both == {made, used} and used != made
