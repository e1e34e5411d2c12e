import logging

import pytest
from ray.serve._private import constants, replica

from app.ray_compat.serve_port import keep_on_loopback

pytestmark = pytest.mark.unit


@pytest.fixture
def bound(monkeypatch):
    """The addresses that Serve's replicas open."""
    found = []
    monkeypatch.setattr(replica, "add_port_to_grpc_server", lambda server, at: found.append(at))
    return found


def open_port(at):
    replica.add_port_to_grpc_server(None, at)  # type: ignore[attr-defined]


def test_the_port_between_deployments_is_opened_on_loopback(bound):
    for _ in range(3):
        keep_on_loopback()
    open_port("[::]:0")
    open_port("10.0.0.5:9000")
    assert bound == ["127.0.0.1:0", "10.0.0.5:9000"]


def test_it_stays_open_where_deployments_speak_that_way(bound, monkeypatch):
    monkeypatch.setattr(constants, "RAY_SERVE_USE_GRPC_BY_DEFAULT", True)
    keep_on_loopback()
    open_port("[::]:0")
    assert bound == ["[::]:0"]


def test_another_version_of_serve_is_told(monkeypatch, caplog):
    monkeypatch.delattr(replica, "add_port_to_grpc_server")
    with caplog.at_level("ERROR", logger="ray.serve"):
        monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
        keep_on_loopback()
    assert "frontline doctor" in caplog.text
