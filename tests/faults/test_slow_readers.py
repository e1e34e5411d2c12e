"""Clients that ask for long streams and read nothing, before Serve's own HAProxy, beside another.

Their sockets are real, with small buffers, and stay open to the end: nothing but the bound on slow
readers frees their slots.
"""

import json
import socket
import time
from contextlib import ExitStack
from decimal import Decimal
from urllib.parse import urlsplit

import openai
import pytest
from typer.testing import CliRunner

from app.cli.main import main
from tests.support.cluster import PLAIN, eventually, ingress_app, ledger_url, simulated_app
from tests.support.waiting import PATIENCE_S

SLOW = 16
SLOW_READER_S = 2
MOST_TOKENS = 90_000
"""Fifteen minutes' worth."""

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


def create_key(tenant):
    words = ["keys", "create", "--tenant", tenant, "--ledger", ledger_url()]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return next(word for word in result.output.split() if word.startswith("fl-"))


@pytest.fixture(scope="module")
def guarded(cluster):
    """As many slots as there are slow readers."""
    cluster.deploy(
        ingress_app(auth="keys", slow_reader_s=SLOW_READER_S),
        simulated_app(
            "slow",
            settings={"queue": {"headroom": 0, "default": {"max_wait_s": 120}}},
            slots=SLOW,
            tokens_per_second=100,
            context_length=100_000,
        ),
    )
    yield cluster
    cluster.restore_ingress()
    cluster.remove("slow")


def stream_without_reading(cluster, key):
    """Ask for a long stream on a connection that takes next to nothing, and return it.

    Some 6 MB of it find room in the buffers of the kernel, HAProxy and the ingress before anybody
    has to wait.
    """
    parts = urlsplit(cluster.root)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    # Short segments keep the sender's buffer short, too.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    connection.connect((parts.hostname, parts.port))
    # With alternatives beside each token an event has some 2 KB.
    body = json.dumps({
        "model": "slow", "messages": [{"role": "user", "content": "a long story"}],
        "max_tokens": MOST_TOKENS, "stream": True, "logprobs": True, "top_logprobs": 20,
    }).encode()  # fmt: skip
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def test_those_who_do_not_read_keep_nobody_waiting(guarded):
    """ddce5e3: their slots were taken for as long as they were connected."""
    other = openai.OpenAI(
        base_url=guarded.base_url, api_key=create_key("other"), max_retries=0, timeout=PATIENCE_S,
        http_client=openai.DefaultHttpxClient(verify=PLAIN),
    )  # fmt: skip

    def ask():
        return other.chat.completions.create(
            model="slow", messages=[{"role": "user", "content": "hello"}], max_tokens=1
        )

    def served():
        try:
            return ask()
        except openai.APIStatusError:
            return None

    eventually(served, 90)
    key = create_key("slow")
    with other, ExitStack() as connections, guarded.engine("slow") as engine:
        began = time.monotonic()
        for _ in range(SLOW):
            connections.enter_context(stream_without_reading(guarded, key))

        def running():
            return engine.get("/simulate").json()["running"]

        eventually(lambda: running() == SLOW, 20)
        ask()
        waited_s = time.monotonic() - began
        eventually(lambda: running() == 0, 30, "slots are taken by who does not read")
        freed_s = time.monotonic() - began
        aborted = engine.get("/simulate").json()["aborted"]
        records = eventually(lambda: slow_records(guarded), 20)
    assert aborted == SLOW
    for record in records:
        assert (record["state"], record["reason"]) == ("interrupted", "client_slow")
        assert Decimal(record["cost"]) == cost_of(record)
    tokens = [record["completion_tokens"] for record in records]
    # 100 a second were generated, and few of them came later than the last that was taken.
    assert 0 < min(tokens) <= max(tokens) <= 100 * freed_s + 1
    print(f"\n{waited_s:.1f} s until another was served, all free after {freed_s:.1f} s; "
          f"{min(tokens)} to {max(tokens)} tokens each on the bill")  # fmt: skip


def cost_of(record):
    prompt, cached = record["prompt_tokens"], record["cached_tokens"]
    whole = prompt - cached + Decimal("0.5") * cached + 2 * record["completion_tokens"]
    return whole / 1_000_000


def slow_records(cluster):
    """The records of all who did not read, once they are there."""
    records = cluster.records(model="test/slow", tenant="slow")
    return records if len(records) == SLOW else None
