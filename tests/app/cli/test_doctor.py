import pytest
from typer.testing import CliRunner

from app.cli import doctor
from app.cli.doctor import Look, TokenFile, findings, look_around, to_text
from app.cli.listening import Listener, ProcessView
from app.cli.main import main

pytestmark = pytest.mark.unit

HERE = Listener("127.0.0.1", 8000, "haproxy", 1)
OPEN = Listener("::", 40000, "ray::ServeReplica:one:Model", 2)


def test_nothing_is_found_where_nothing_is_open():
    look = Look([HERE], [], [TokenFile("/home/me/.ray/auth_token", 0o600)])
    assert findings(look) == []
    assert "127.0.0.1:8000  haproxy" in to_text(look)
    assert "all is well" in to_text(look)


@pytest.mark.parametrize(
    ("look", "said"),
    [
        (Look([HERE, OPEN]), "ray::ServeReplica:one:Model (pid 2) listens on [::]:40000"),
        (Look([Listener("10.0.0.5", 9101, "haproxy", 3)]), "listens on 10.0.0.5:9101"),
        (Look(unguarded=["raylet", "raylet"]), "no token guards Ray (raylet)"),
        (Look(tokens=[TokenFile("/t", 0o644)]), "chmod 600 /t (it is 0644)"),
        (Look(tokens=[TokenFile("/t", 0o640)]), "others can read Ray's token"),
    ],
)
def test_what_is_open_is_told(look, said):
    (finding,) = findings(look)
    assert said in finding
    assert f"! {finding}" in to_text(look)


def test_it_looks_at_tokens_and_at_how_ray_was_started(monkeypatch, tmp_path):
    def process(pid, name, **environment):
        return ProcessView(pid, 1, (f"/ray/{name}",), environment)

    named = tmp_path / "named"
    views = [
        process(1, "raylet", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(named)),
        process(2, "gcs_server", HOME="/x"),
        # Another user's: nothing can be said of it.
        process(3, "raylet"),
    ]
    monkeypatch.setattr(doctor, "processes", lambda: {view.pid: view for view in views})
    default = tmp_path / ".ray" / "auth_token"
    default.parent.mkdir()
    for path, mode in ((named, 0o644), (default, 0o600)):
        path.write_text("secret")
        path.chmod(mode)
    look = look_around({}, tmp_path)
    assert look.unguarded == ["gcs_server"]
    assert {token.path: token.mode for token in look.tokens} == {
        str(named): 0o644, str(default): 0o600,
    }  # fmt: skip
    assert "secret" not in to_text(look)


@pytest.mark.parametrize(("look", "status"), [(Look([HERE]), 0), (Look([OPEN]), 1)])
def test_the_command_ends_with_a_status(monkeypatch, look, status):
    monkeypatch.setattr(doctor, "look_around", lambda environment, home: look)
    assert CliRunner().invoke(main, ["doctor"]).exit_code == status
