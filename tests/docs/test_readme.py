"""The README fits one screen and a half, and its commands and its example are valid."""

import ast
import os
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)


def test_it_is_short():
    assert len(README.splitlines()) <= 90


def test_it_names_the_command_that_ci_runs():
    [commands] = [text for language, text in FENCES if not language][:1]
    programs = [line.split()[0] for line in commands.splitlines()]
    assert programs == ["scripts/run", "scripts/test"]
    assert all(os.access(ROOT / program, os.X_OK) for program in programs)
    assert "exec scripts/test" in (ROOT / ".ci" / "run").read_text()


def test_its_example_is_python():
    [example] = [text for language, text in FENCES if language == "python"]
    ast.parse(example)


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert [page for page in pages if f"]({page})" not in index] == []
