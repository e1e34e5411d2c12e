"""Tests reach into a private member only below a comment that says why.

Ruff (SLF001) finds ``thing._member``. This finds what ruff does not see: a member that a string
names, a private name that is imported, and a ``noqa`` without its reason.
"""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

TESTS = Path(__file__).parent
BY_NAME = ("delattr", "getattr", "hasattr", "setattr")
PRIVATE = re.compile(r"([\w.]*\.)?_[^\W_]\w*(\.[\w.]*)?")
REASON = re.compile(r" *# private: \w+")


def is_private(node):
    text = node.value if isinstance(node, ast.Constant) else None
    return isinstance(text, str) and PRIVATE.fullmatch(text) is not None


def reached(tree):
    """Yield the lines where something private is imported or named by a string."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in BY_NAME:
                if any(map(is_private, node.args)):
                    yield node.lineno
            case ast.ImportFrom():
                if any(PRIVATE.fullmatch(alias.name) for alias in node.names):
                    yield node.lineno


def unexplained(source):
    """Return the lines that reach into something private below no reason."""
    lines = source.splitlines()
    found = set(reached(ast.parse(source)))
    found |= {number for number, line in enumerate(lines, 1) if "# noqa: SLF001" in line}
    return [lines[number - 1] for number in sorted(found) if not REASON.match(lines[number - 2])]


def test_whoever_reaches_into_something_private_says_why():
    paths = set(TESTS.rglob("*.py")) - {Path(__file__)}
    found = {str(path): unexplained(path.read_text()) for path in paths}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "x._y  # noqa: SLF001",
        "patch.setattr('app.module._NAME', 1)",
        "patch.setattr('app.module._log.propagate', 1)",
        "patch.setattr(module, '_name', 1)",
        "getattr(thing, '_name')",
        "from app.module import _name",
    ],
)
def test_what_ruff_does_not_see_is_found(line):
    assert unexplained(f"x = 1\n{line}\n") == [line]
    assert unexplained(f"# private: nobody else tells\n{line}\n") == []


def test_what_is_public_or_pythons_own_is_not_found():
    for line in ("setattr(thing, 'name_s', 1)", "getattr(thing, '__name__')", "f('_name')"):
        assert unexplained(f"x = 1\n{line}\n") == []
