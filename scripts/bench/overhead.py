#!/usr/bin/env python
"""What Frontline's data plane costs, beside its peers'.

    scripts/bench/install_peers                 once; what is not installed is left out
    scripts/bench/overhead.py                   about 15 minutes
    scripts/bench/overhead.py --only frontline,bare --rounds 1 --quick
    scripts/bench/overhead.py --only frontline --unmeasured --quick --rounds 9

Starts a mock engine, Frontline with everything on, a bare passage on the same Ray Serve, and the
peers; drives them in turn, in several rounds, with the same load generators (wrk, and a stream
reader in C); checks that every answer of Frontline carried its tier and has its record; prints one
table, and writes it as JSON and Markdown, with a picture. Run it in the tests' environment:
`FRONTLINE_ENV=test . scripts/activate`.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.bench import gateways, overhead_report, report
from scripts.bench.contained import contain
from scripts.bench.drive import (
    Gateway,
    Missing,
    Sample,
    Streams,
    Unary,
    build_streams,
    measure,
    pin,
    require_wrk,
)
from scripts.bench.overhead_report import Checked
from scripts.bench.progress import steps

_GRACE_S = 40.0
_DRAIN_S = 60.0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="of one load on one gateway")
    parser.add_argument("--ingresses", type=int, default=1, help="replicas of Frontline and bare")
    parser.add_argument("--only", help="gateways whose names begin with one of these, by commas")
    parser.add_argument("--loads", help="loads whose names begin with one of these, by commas")
    parser.add_argument("--quick", action="store_true", help="fewer loads")
    parser.add_argument("--soak", type=int, default=0, help="then so many requests, and the memory")
    parser.add_argument(
        "--unmeasured", action="store_true", help="by turns also Frontline without metrics"
    )
    parser.add_argument(
        "--pinned",
        action="store_true",
        help="each gateway on the first core, engine and generators on the second",
    )
    parser.add_argument("--hold", action="store_true", help="wait for Enter before measuring")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of the results")
    parser.add_argument("--name", default="overhead", help="of the files with the results")
    return parser.parse_args(arguments)


def loads(options: argparse.Namespace) -> list[Unary | Streams]:
    """Return the loads of one round."""
    seconds = options.seconds
    every: list[Unary | Streams] = [Unary(n, seconds) for n in (1, 16, 64)]
    every += [Streams(1, seconds), Streams(16, seconds)]
    # What chat models do, 50 and 20 tokens a second, and faster.
    paced = ((64, 10), (256, 10), (512, 10), (64, 20), (256, 20), (512, 20), (256, 50), (512, 50))
    every += [Streams(n, seconds, pace_ms) for n, pace_ms in paced]
    # A prompt of a megabyte, as long as its words.
    every.append(Unary(1, seconds, "word " * 200_000))
    if options.quick:
        every = [load for load in every if load.name in ("unary 1", "unary 16", "streams 16")]
    if options.loads:
        begins = tuple(options.loads.split(","))
        every = [load for load in every if load.name.startswith(begins)]
    return every


def chosen(options: argparse.Namespace) -> Callable[[str], bool]:
    """Return whether a gateway is to be measured, by its name."""
    if not options.only:
        return lambda _: True
    begins = tuple(options.only.lower().split(","))
    return lambda name: name.lower().startswith(begins)


def measure_all(
    options: argparse.Namespace, measured: Sequence[Gateway], streams: Path, console: Console
) -> list[Sample]:
    """Put every load on every gateway, in turn, round after round."""
    samples: list[Sample] = []
    failed: set[tuple[str, str]] = set()
    turns = [
        (number, load, gateway)
        for number in range(options.rounds)
        for load in loads(options)
        for gateway in _in_turn(measured, number)
    ]
    for number, load, gateway in steps(turns, "overhead", console):
        if (gateway.name, load.name.split()[0]) in failed:
            continue
        try:
            sample = measure(
                load,
                gateway,
                streams,
                pinned=options.pinned and gateway.name != overhead_report.FLOOR,
            )
        except (RuntimeError, OSError) as error:
            console.log(f"{gateway.name}, {load.name}: {error}")
            failed.add((gateway.name, load.name.split()[0]))
            continue
        samples.append(sample)
        console.log(f"round {number + 1}: {overhead_report.line(sample)}")
    return samples


def _in_turn(measured: Sequence[Gateway], number: int) -> list[Gateway]:
    # Whoever comes first in one round comes last in another.
    turn = number % len(measured)
    return [*measured[turn:], *measured[:turn]]


def check_records(database: Path, samples: Sequence[Sample]) -> Checked:
    """Compare the ledger with what the generators received from Frontline."""
    names = (overhead_report.FRONTLINE, overhead_report.UNMEASURED)
    mine = [sample for sample in samples if sample.gateway in names]
    answers = sum(sample.answers for sample in mine)
    deadline, before = time.monotonic() + _DRAIN_S, -1
    while time.monotonic() < deadline:
        states = _states(database)
        if sum(states.values()) == before:
            break
        before = sum(states.values())
        time.sleep(2.0)
    completed = sum(n for (state, tier), n in states.items() if state == "completed")
    # What was not served has no tier: the requests that were sent to see whether it runs yet.
    other = sum(n for (_, tier), n in states.items() if tier not in ("", "priority"))
    untrue = sum(int(sample.told["untrue"]) for sample in mine)
    return Checked(answers, completed, sum(states.values()), other, untrue)


def _states(database: Path) -> dict[tuple[str, str], int]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        query = "SELECT state, served_tier, count(*) FROM usage_records GROUP BY 1, 2"
        return {(state, tier or ""): n for state, tier, n in connection.execute(query)}


def soak(
    options: argparse.Namespace, frontline: Gateway, streams: Path, console: Console
) -> list[tuple[int, float]]:
    """Send many requests, and return the ingress's resident memory by how many there were."""
    points, sent = [], 0
    while sent < options.soak:
        sample = measure(Unary(16, 10), frontline, streams)
        sent += sample.answers
        ingress = frontline.processes()["ingress"]
        points.append((sent, sum(process.memory_info().rss for process in ingress) / 1e6))
        console.log(f"{sent} requests: {points[-1][1]:.1f} MB")
    return points


def run(options: argparse.Namespace) -> int:
    """Measure, and return the exit status."""
    console = Console(width=None if sys.stdout.isatty() else 170, log_path=False)
    home, wanted = Path(os.environ["FRONTLINE_HOME"]), chosen(options)
    require_wrk()
    streams = build_streams(home / "bench")
    with ExitStack() as stack:
        folder = stack.enter_context(gateways.scratch())
        engine = stack.enter_context(gateways.mock_engine(folder))
        cluster = stack.enter_context(
            gateways.cluster(
                folder, engine, ingresses=options.ingresses, switchable=options.unmeasured
            )
        )
        own = [engine, cluster.frontline, cluster.passthrough]
        if options.unmeasured:
            own.insert(2, cluster.unobserved)
        peers = stack.enter_context(gateways.peers(folder, engine, home, wanted))
        measured = [gateway for gateway in [*own, *peers] if wanted(gateway.name)]
        console.log(f"measuring {', '.join(gateway.name for gateway in measured)}")
        if options.hold:
            roles = cluster.processes()
            console.print({role: [p.pid for p in those] for role, those in roles.items()})
            console.print(f"port {cluster.frontline.port}, key {cluster.frontline.key}")
            input("Enter: ")
        if options.pinned:
            # The generators inherit this.
            os.sched_setaffinity(0, {1})
            pin(engine.processes()["engine"], 1)
        samples = measure_all(options, measured, streams, console)
        checked = check_records(cluster.database, samples)
        memory = soak(options, cluster.frontline, streams, console) if options.soak else []
    return tell(options, console, samples, checked, memory)


def tell(
    options: argparse.Namespace,
    console: Console,
    samples: Sequence[Sample],
    checked: Checked,
    memory: list[tuple[int, float]],
) -> int:
    """Show and write the results; return 1 where an answer lacked its tier or its record."""
    rows = overhead_report.rows_of(samples)
    goals = overhead_report.goals_of(rows, memory)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name}.json"
    overhead_report.write(path, report.machine(), options, rows, goals, checked, memory, samples)
    path.with_suffix(".md").write_text(overhead_report.markdown(rows, goals))
    overhead_report.draw(path.with_suffix(".png"), rows)
    console.print(overhead_report.markdown(rows, goals))
    console.print(f"{checked}\n{path} (and .md, .png)")
    return 0 if checked.sound else 1


def main() -> None:
    """Run the benchmark below a process that ends whatever it leaves behind."""
    options = parse(sys.argv[1:])
    contain(_GRACE_S)
    try:
        sys.exit(run(options))
    except Missing as missing:
        sys.exit(f"overhead: {missing}")


if __name__ == "__main__":
    main()
