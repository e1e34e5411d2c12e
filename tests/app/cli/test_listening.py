import os
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cli.listening import Listener, ProcessView, family, listeners, processes
from app.core.names import OWNER_MARK
from deployments.process import reaper

pytestmark = pytest.mark.unit

ADDRESSES = st.ip_addresses(v=4) | st.ip_addresses(v=6)


@given(ADDRESSES)
def test_only_loopback_is_loopback(address):
    mapped = getattr(address, "ipv4_mapped", None)
    assert Listener(str(address), 1, "", 1).on_loopback == (mapped or address).is_loopback


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.0.0.5", "::ffff:0.0.0.0"])
def test_every_address_is_not_loopback(address):
    assert not Listener(address, 1, "", 1).on_loopback


@pytest.mark.parametrize(
    ("kind", "bound", "shown"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0", "0.0.0.0"),
        (socket.AF_INET6, "::", "::"),
        (socket.AF_INET6, "::ffff:127.0.0.1", "127.0.0.1"),
    ],
)
def test_a_real_socket_is_found_once_it_listens(kind, bound, shown):
    views = {os.getpid(): processes()[os.getpid()]}.values()
    with socket.socket(kind) as real:
        if kind == socket.AF_INET6:
            real.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        real.bind((bound, 0))
        port = real.getsockname()[1]
        assert port not in {one.port for one in listeners(views)}
        real.listen()
        (found,) = [one for one in listeners(views) if one.port == port]
    assert (found.address, found.pid) == (shown, os.getpid())


def view(pid, parent, *words, **environment):
    return ProcessView(pid, parent, words, environment)


def test_ours_is_rays_and_the_engines_and_what_is_below_them():
    views = [
        view(1, 0, "init"),
        view(2, 1, "/env/bin/python", "/env/bin/serve", "run", "x.yaml"),
        view(3, 2, "/site-packages/ray/core/src/ray/raylet/raylet", "--x"),
        view(4, 3, "ray::ServeReplica:a:b"),
        view(5, 4, "/haproxy", "-f", "x"),
        view(6, 1, "/env/bin/python", "-m", "engine", FRONTLINE_OWNER="4:5"),
        view(7, 1, "/env/bin/python", "-u", "/env/site-packages/ray/dashboard/dashboard.py"),
        view(8, 1, "/usr/sbin/sshd"),
        view(9, 8, "bash"),
        view(10, 99),
    ]
    found = family({one.pid: one for one in views})
    assert {one.pid: one.name for one in found} == {
        2: "serve", 3: "raylet", 4: "ray::ServeReplica:a:b", 5: "haproxy", 6: "engine",
        7: "dashboard.py",
    }  # fmt: skip


def test_a_child_of_the_owner_of_an_engine_is_seen_by_its_environment():
    command = [sys.executable, "-c", "input()"]
    environment = os.environ | {"FRONTLINE_OWNER": "1:1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as child:
        try:
            assert child.pid in {one.pid for one in family(processes())}
        finally:
            child.communicate(b"\n")


def test_the_reaper_marks_processes_as_the_doctor_looks_for_them():
    assert reaper.OWNER_MARK == OWNER_MARK
