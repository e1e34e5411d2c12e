"""Ray's token and environment, as scripts/activate leaves them."""

import os
import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

REPOSITORY = Path(__file__).parents[2]
ACTIVATE = REPOSITORY / "scripts/activate"


def activate(home, name="RAY_AUTH_MODE", **environment):
    """Source it, and return the process, whose output is the value of a variable."""
    ours = ("RAY_", "BASH", "MALLOC_")
    clean = {name: v for name, v in os.environ.items() if not name.startswith(ours)}
    return subprocess.Popen(
        ["bash", "-euc", f". {ACTIVATE}; printenv {name}"],
        env=clean | {"HOME": str(home)} | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def outcome(home, name="RAY_AUTH_MODE", **environment):
    out, err = activate(home, name, **environment).communicate()
    assert err == ""
    return out.strip()


def test_a_token_is_made_once_for_its_user_alone(tmp_path):
    shells = [activate(tmp_path) for _ in range(8)]
    assert {shell.communicate() for shell in shells} == {("token\n", "")}
    (token,) = (tmp_path / ".ray").iterdir()
    assert (token.name, token.stat().st_mode & 0o777) == ("auth_token", 0o600)
    assert token.parent.stat().st_mode & 0o777 == 0o700
    made = token.read_text()
    assert len(made) == 64 and int(made, 16)
    assert outcome(tmp_path) == "token"
    assert token.read_text() == made


def test_a_token_that_others_can_read_is_closed_to_them(tmp_path):
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("mine")
    token.chmod(0o644)
    assert outcome(tmp_path) == "token"
    assert (token.read_text(), token.stat().st_mode & 0o777) == ("mine", 0o600)


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({"RAY_AUTH_TOKEN": "given"}, "token"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "token"),
        ({"RAY_AUTH_MODE": "disabled"}, "disabled"),
        # On a cluster each node would make another one: Ray refuses to start without.
        ({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}, "token"),
    ],
)
def test_no_token_is_made_where_one_is_given_or_none_wanted(tmp_path, environment, mode):
    assert outcome(tmp_path, **environment) == mode
    assert list(tmp_path.iterdir()) == []


def test_rays_processes_have_few_arenas_unless_told_otherwise(tmp_path):
    assert outcome(tmp_path, "MALLOC_ARENA_MAX") == "2"
    assert outcome(tmp_path, "MALLOC_ARENA_MAX", MALLOC_ARENA_MAX="8") == "8"


def documented_defaults():
    """The variables of docs/cluster.md with a default."""
    page = (REPOSITORY / "docs/cluster.md").read_text()
    return re.findall(r"^\| `((?:RAY|FRONTLINE|MALLOC)_\w+)` \| (\d+) \|", page, re.MULTILINE)


def test_the_documented_defaults_are_its_own(tmp_path):
    rows = documented_defaults()
    assert ("RAY_SERVE_HAPROXY_MAXCONN", "32768") in rows and len(rows) >= 5
    assert rows == [(name, outcome(tmp_path, name)) for name, _ in rows]
