"""How long an ingress takes from the start of its process to its first answer.

    FRONTLINE_ENV=test . scripts/activate
    python scripts/bench/ingress_start.py [--rounds 5]       # about 2 minutes

Serves Frontline before a mock engine, kills the only ingress's process, and asks without a pause
until the one that Serve starts instead has answered. How long Serve takes to notice the loss and to
begin is not part of the time, and is printed beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import gateways
from scripts.bench.contained import contain
from scripts.bench.drive import Gateway

_PAUSE_S = 0.02
_LONGEST_S = 120.0


def answered_at(gateway: Gateway) -> float:
    """Ask until there is an answer; return when it came, as ``time.time``.

    Raises:
        TimeoutError: there was none for two minutes.
    """
    deadline = time.monotonic() + _LONGEST_S
    while time.monotonic() < deadline:
        try:
            gateways.ask(gateway)
            return time.time()
        except OSError:
            time.sleep(_PAUSE_S)
    raise TimeoutError("no ingress answers")


def measure(gateway: Gateway) -> tuple[float, float]:
    """Kill the ingress; return how long Serve and the new process took, in seconds."""
    [old] = gateway.processes()["ingress"]
    killed = time.time()
    old.kill()
    old.wait(10)
    answered = answered_at(gateway)
    [new] = [one for one in gateway.processes()["ingress"] if one.pid != old.pid]
    # Ray may have kept an idle process ready, which is older.
    began = max(new.create_time(), killed)
    return began - killed, answered - began


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rounds", type=int, default=5)
    rounds = options.parse_args().rounds
    contain()
    with ExitStack() as stack:
        folder = stack.enter_context(gateways.scratch())
        engine = stack.enter_context(gateways.mock_engine(folder))
        cluster = stack.enter_context(gateways.cluster(folder, engine, ingresses=1))
        taken = [measure(cluster.frontline) for _ in range(rounds)]
    for noticed_s, started_s in taken:
        print(f"Serve {noticed_s:.2f} s, then the ingress {started_s:.2f} s")
    print(f"median of the ingress: {median(one for _, one in taken):.2f} s")


if __name__ == "__main__":
    main()
