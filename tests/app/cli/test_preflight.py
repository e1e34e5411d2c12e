"""``frontline doctor CONFIG``: what it prints, and the status that it ends with."""

import json
import socket
import sys

import pytest
import yaml
from typer.testing import CliRunner

from app.cli import preflight
from app.cli.listening import Listener
from app.cli.main import main
from app.cli.preflight import (
    PoolFindings,
    Port,
    gpu_findings,
    neighbour_findings,
    port_finding,
    to_text,
)
from app.contracts.findings import Examination, Level, error, ok, warning
from app.contracts.start import StartProblem

pytestmark = pytest.mark.unit


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Return a function that writes a config file of one pool, with ports that are free."""
    sockets = [socket.socket() for _ in range(3)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    monkeypatch.setenv("RAY_SERVE_HAPROXY_METRICS_PORT", str(ports[1]))
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", str(ports[2]))

    # What else runs on this machine is of no interest.
    monkeypatch.setattr(preflight, "listeners", lambda views: [])

    def write(**pool):
        settings = {"name": "pool", "engine": "simulated", "model": "simulated", **pool}
        application = {
            "name": "one", "route_prefix": None, "import_path": "deployments.model:build",
            "args": {"id": "org/one", "pools": [settings]},
            "deployments": [{"name": "Model", "user_config": {"rate_card": {"free": True}}}],
        }  # fmt: skip
        path = tmp_path / "config.yaml"
        content = {"http_options": {"port": ports[0]}, "applications": [application]}
        path.write_text(yaml.safe_dump(content))
        return path, ports[0]

    return write


def doctor(path, *options):
    return CliRunner().invoke(main, ["doctor", str(path), *options])


def test_a_config_that_would_start_ends_with_0(config):
    path, port = config()
    shown = doctor(path)
    assert shown.exit_code == 0, shown.output
    assert f"this machine: ok: port {port} is free" in shown.output
    assert "all is well" in shown.output
    assert doctor(path, "--brief").output == "all is well\n"


def test_an_error_is_one_line_with_its_fix_and_ends_with_1(config):
    path, _ = config(engine="vllm", model="/no/such/model", python=sys.executable)
    shown = doctor(path, "--brief")
    assert shown.exit_code == 1
    lines = shown.output.splitlines()
    assert lines[-1] == "2 errors, 0 warnings"
    for line in lines[:-1]:
        assert line.startswith("org/one, pool pool: error: ") and ". Fix: " in line
    as_json = doctor(path, "--json")
    found = json.loads(as_json.output)
    assert as_json.exit_code == 1
    assert {"missing_module", "missing_model"} <= {
        one["problem"] for one in found["org/one, pool pool"]
    }
    assert {one["level"] for one in found["this machine"]} == {"ok"}


def test_a_config_that_is_wrong_is_said_as_check_says_it(config):
    path, _ = config(slots=0)
    shown = doctor(path)
    assert shown.exit_code == 1 and "slots" in shown.output


def test_a_port_in_use_is_an_error_that_names_the_setting(config):
    path, port = config()
    with socket.create_server(("127.0.0.1", port)):
        shown = doctor(path, "--brief")
    assert shown.exit_code == 1
    assert f"port {port} is in use" in shown.output and "http_options.port" in shown.output
    found = port_finding(Port(9101, "RAY_SERVE_HAPROXY_METRICS_PORT", taken=True))
    assert "set RAY_SERVE_HAPROXY_METRICS_PORT" in found.fix


def test_a_port_that_is_no_number_is_an_error(config, monkeypatch):
    path, _ = config()
    monkeypatch.setenv("RAY_SERVE_HAPROXY_STATS_PORT", "many")
    shown = doctor(path, "--brief")
    assert shown.exit_code == 1 and "correct RAY_SERVE_HAPROXY_STATS_PORT" in shown.output


def test_another_instance_on_this_machine_is_an_error_where_they_would_share_ports(
    config, monkeypatch
):
    """410afd7: the second started, and one answered with the other's models."""
    other = Listener("127.0.0.1", 30000, "ray::ServeReplica:ingress:Ingress", 7)
    assert neighbour_findings([other], 31000, 32000) == []
    path, _ = config()
    monkeypatch.setattr(preflight, "listeners", lambda views: [other])
    monkeypatch.delenv("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", raising=False)
    monkeypatch.delenv("RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT", raising=False)
    shown = doctor(path, "--brief")
    assert shown.exit_code == 1 and "(pid 7) listens on port 30000" in shown.output
    monkeypatch.setenv("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "31001")
    monkeypatch.setenv("RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT", "31500")
    assert doctor(path).exit_code == 0


def test_more_gpus_than_there_are_is_a_warning():
    def pools(*gpus):
        return [PoolFindings("one", count, Examination((), 2)) for count in gpus]

    assert gpu_findings(pools(1, 1)) == []
    [found] = gpu_findings(pools(1, 2))
    assert found.level is Level.WARNING and "take 3 GPUs, 2 are here" in found.what
    # A machine that shows none is said by each pool.
    assert gpu_findings([PoolFindings("one", 1, Examination((), 0))]) == []


def test_the_worst_comes_first():
    found = {"pool": [ok("fine"), warning("a", "b", "c"), error("d", "e", "f", StartProblem.ENDED)]}
    assert to_text(found, brief=False).splitlines() == [
        "pool: error: d: e. Fix: f",
        "pool: warning: a: b. Fix: c",
        "pool: ok: fine",
        "1 errors, 1 warnings",
    ]
