import socket

import pytest

from deployments.hosting.drain import count_connections

pytestmark = pytest.mark.unit


@pytest.fixture(params=["127.0.0.1", "::1"])
def server(request):
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.socket(family) as listening:
        try:
            listening.bind((request.param, 0))
        except OSError:
            pytest.skip(f"{request.param} is not to be had here")
        listening.listen()
        yield listening


def test_connections_count_while_both_sides_have_them_open(server):
    port = server.getsockname()[1]
    assert count_connections(port) == 0
    with socket.create_connection(server.getsockname()[:2]) as client:
        accepted, _ = server.accept()
        assert count_connections(port) == 1
        with socket.create_connection(server.getsockname()[:2]):
            # Nobody has accepted it yet: a busy engine takes its time.
            assert count_connections(port) == 2
        assert count_connections(port) == 1
        client.close()
        assert count_connections(port) == 0
        accepted.close()
