import os
import subprocess

import pytest

from app.haproxy import keeper as keeper
from app.haproxy.keeper import Folder, Serving

pytestmark = pytest.mark.unit

WITHOUT_ROUTES = """global
    stats socket /run/admin.sock mode 666 level admin expose-fd listeners
frontend http_frontend
    bind 127.0.0.1:8000
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path \\'%[path]\\' not found."
listen stats
  bind *:8404
"""
WITH_ROUTES = WITHOUT_ROUTES.replace(
    "    default_backend", "    use_backend http-ingress if is_http-ingress\n    default_backend", 1
).replace(
    "listen stats",
    "backend http-ingress\n"
    "    server one 127.0.0.1:30000 check observe layer4\n"
    "    server fallback 127.0.0.1:8500 check backup\n"
    "listen stats",
)
DRAINING = WITH_ROUTES + '    http-request return status 503 string "This node is being drained."\n'


def test_a_first_start_with_routes_keeps_them():
    assert keeper.first_configuration(WITH_ROUTES, kept=None) == WITH_ROUTES


def test_a_first_start_takes_over_its_predecessors_routes():
    kept = keeper.with_admin_socket(WITH_ROUTES, "/run/other.sock")
    assert keeper.first_configuration(WITHOUT_ROUTES, kept) == WITH_ROUTES


def test_routes_of_other_ports_are_not_taken_over():
    kept = WITH_ROUTES.replace(":8000", ":9000")
    assert "use_backend" not in keeper.first_configuration(WITHOUT_ROUTES, kept)


def test_serves_fallback_is_no_ingress():
    assert keeper.ingresses(WITH_ROUTES) == {("127.0.0.1", 30000)}


@pytest.mark.parametrize("config", [WITHOUT_ROUTES, DRAINING])
def test_no_stand_in_serves_without_routes_or_for_a_node_that_is_drained(config, tmp_path):
    folder = Folder(tmp_path)
    folder.stage(1, WITH_ROUTES)
    folder.keep_staged(1)
    assert folder.kept == WITH_ROUTES
    folder.stage(2, config)
    folder.keep_staged(2)
    assert folder.kept is None


def test_a_reload_by_serve_is_left_as_it_is():
    arguments = ["-db", "-f", "c", "-sf", "5", "-x", "admin.sock"]
    assert keeper.takeover(arguments, Serving(5, 1, "admin.sock")) == arguments
    assert keeper.takeover(arguments, None) == arguments


def test_listening_sockets_come_from_whoever_serves():
    first = ["-db", "-f", "c", "-dR"]
    taken = keeper.takeover(first, Serving(7, 1, "stand-in.sock"))
    assert taken == [*first, "-x", "stand-in.sock", "-sf", "7"]
    reload = [*first, "-sf", "5", "-x", "admin.sock"]
    taken = keeper.takeover(reload, Serving(7, 1, "stand-in.sock"))
    assert taken == [*first, "-sf", "5", "-x", "stand-in.sock", "-sf", "7"]


def test_who_serves_is_known_by_pid_and_start(tmp_path):
    folder, own = Folder(tmp_path), os.getpid()
    assert folder.serving is None
    folder.claim(Serving(own, keeper.start_time(own), "admin.sock"))
    assert folder.serving and folder.serving.pid == own and folder.is_serving(own)
    # Another process has got its pid meanwhile.
    folder.claim(Serving(own, 1, "admin.sock"))
    assert folder.serving is None


def test_who_hangs_is_killed_and_not_asked_for_sockets(tmp_path, monkeypatch):
    # HAProxy ends with "Failed to get the sockets from the old process" otherwise.
    monkeypatch.setattr(keeper, "ANSWER_S", 0.1)
    folder = Folder(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as hung:
        folder.claim(Serving(hung.pid, keeper.start_time(hung.pid), str(tmp_path / "none.sock")))
        assert keeper.predecessor(folder, ["-f", "c"]) is None
        assert hung.wait(5) < 0
    assert folder.is_serving(os.getpid()), "or its watcher would start another"


def test_serves_own_reload_does_not_wait_for_its_predecessor(tmp_path):
    folder, own = Folder(tmp_path), os.getpid()
    serving = Serving(own, keeper.start_time(own), str(tmp_path / "none.sock"))
    folder.claim(serving)
    assert keeper.predecessor(folder, ["-f", "c", "-sf", str(own)]) == serving
