import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.hosting import ports
from deployments.hosting.ports import reserve_port

pytestmark = pytest.mark.unit

ROOT = Path(ports.__file__).parents[2]
PYTHON = [sys.executable, "-I", "-S", "-c"]


async def test_a_server_can_listen_on_a_reserved_port_again_and_again() -> None:
    with reserve_port() as reserved:
        for _ in range(2):
            server = await asyncio.start_server(answer, reserved.host, reserved.port)
            assert await asyncio.to_thread(ask, reserved.port) == b"hello"
            server.close()
            await server.wait_closed()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"hello")
    writer.close()
    await writer.wait_closed()


def ask(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=2) as client:
        return client.recv(100)


# As uvicorn's Config.bind_socket does, as vLLM does, as SGLang's check for a free port does.
BINDERS = {
    "uvicorn": "s.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1); s.bind(('127.0.0.1', port))",
    "vllm": "s.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1); s.setsockopt(SOL_SOCKET, SO_REUSEPORT, 1);"
    "s.bind(('127.0.0.1', port))",
    "wildcard": "s.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1); s.bind(('', port))",
}


@pytest.mark.parametrize("binder", BINDERS)
def test_a_child_can_listen_while_the_port_is_reserved(binder: str) -> None:
    program = (
        "import sys; from socket import *\n"
        f"port = int(sys.argv[1]); s = socket(); {BINDERS[binder]}; s.listen()\n"
        "print('up', flush=True); s.accept()[0].sendall(b'hello')"
    )
    with reserve_port() as reserved:
        child = subprocess.Popen(
            [*PYTHON, program, str(reserved.port)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        with child.stdout as output:
            assert output.readline() == "up\n"
        assert ask(reserved.port) == b"hello"
        assert child.wait(2) == 0


def test_nobody_else_is_given_a_reserved_port() -> None:
    """Every free port but the reserved ones is handed out, in a network of 40 ports of its own."""
    program = """
import sys; sys.path.insert(0, sys.argv[1])
from socket import *
from deployments.hosting.ports import reserve_port
import subprocess
subprocess.run(["ip", "link", "set", "lo", "up"], check=False)
open("/proc/sys/net/ipv4/ip_local_port_range", "w").write("40000 40039")
reserved = [reserve_port() for _ in range(10)]
taken = {r.port for r in reserved}
listener = socket(); listener.bind(("127.0.0.1", 39999)); listener.listen(100)
def drain(reuse, host, connect):
    held, given = [], set()
    try:
        while True:
            s = socket(); held.append(s)
            if reuse: s.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            if connect: s.connect(("127.0.0.1", 39999))
            else: s.bind((host, 0))
            assert s.getsockname()[1] not in given, "given twice"
            given.add(s.getsockname()[1])
    except OSError:
        pass
    assert len(given) == 30 and not given & taken, (reuse, host, connect, len(given), given & taken)
drain(False, "127.0.0.1", False)
drain(True, "127.0.0.1", False)
drain(True, "0.0.0.0", False)
drain(False, "", True)
print("done")
"""
    command = ["unshare", "--net", sys.executable, "-c", program, str(ROOT)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if "unshare" in ran.stderr:
        pytest.skip("cannot make a network namespace")
    assert ran.stdout == "done\n", ran.stderr


def test_ports_reserved_at_the_same_time_differ_and_come_back() -> None:
    reserved = [reserve_port() for _ in range(200)]
    assert len({one.port for one in reserved}) == 200
    for one in reserved:
        one.close()
    with socket.socket() as plain:
        plain.bind(("127.0.0.1", reserved[0].port))


def test_a_foreign_address_cannot_be_reserved() -> None:
    with pytest.raises(OSError):
        reserve_port("192.0.2.1")
