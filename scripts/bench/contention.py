"""How long priority waits for its first token while default requests saturate a server.

    scripts/bench/contention.py --target simulated        Frontline, then its engine without it
    scripts/bench/contention.py --target vllm             the same with vLLM on the CPU
    scripts/bench/contention.py --base-url URL --model M  a server that runs already
    scripts/bench/contention.py --mode burst --target vllm  bursts of priority, with and without
                                                            preemption, and through the peers
    scripts/bench/contention.py --mode fill --target vllm   flex fills what the others leave idle
    scripts/bench/contention.py --pool FILE                 bursts over gpu_check's pool

Run it in the tests' environment: `FRONTLINE_ENV=test . scripts/activate`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console

from scripts.bench import burst_modes, report, targets
from scripts.bench.burst import Contender
from scripts.bench.contained import contain
from scripts.bench.load import Endpoint, RefusedAddress, Workload, require_loopback
from scripts.bench.progress import steps
from scripts.bench.summary import goals_of, rows_of
from scripts.bench.targets import ENGINE_TIERS, FRONTLINE_TIERS, Contenders, Target
from scripts.bench.trial import Plan, Trial, run_trial

_STARTED = {"simulated": targets.simulated, "vllm": targets.vllm}
_CONTENDERS = {"simulated": targets.burst_simulated, "vllm": targets.burst_vllm}

# A run over vLLM on two cores is to take minutes: its answers are short, its windows long, as
# its rates are small.
_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "arrivals": {
        "simulated": {"tokens": 32, "prompt_words": 48, "together_s": 80.0, "idle_requests": 100},
        "vllm": {"tokens": 8, "prompt_words": 12, "together_s": 90.0, "idle_requests": 20},
    },
    "burst": {
        "simulated": {
            "tokens": 100, "prompt_words": 48, "bursts": 8, "every_s": 3.0, "idle_bursts": 3,
        },
        # Long answers are what a burst without preemption waits for. With three times as many
        # clients as slots, no slot is ever idle.
        "vllm": {
            "tokens": 200, "spread": 0.25, "prompt_words": 12, "clients": 24, "alone_s": 10.0,
            "bursts": 3, "every_s": 5.0, "idle_bursts": 2,
        },
        # An engine on a GPU has its slots full at once, and more of them.
        "pool": {
            "tokens": 200, "spread": 0.25, "prompt_words": 48, "alone_s": 10.0,
            "bursts": 8, "every_s": 5.0, "idle_bursts": 4,
        },
    },
    "fill": {
        "simulated": {"tokens": 100, "prompt_words": 48, "alone_s": 12.0},
        "vllm": {"tokens": 24, "prompt_words": 12, "alone_s": 12.0},
    },
}  # fmt: skip
_COMMON: dict[str, Any] = {"clients": 160, "spread": 0.5, "alone_s": 20.0}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--target", choices=_STARTED, help="start this, measure it, end it")
    what.add_argument("--base-url", help="an OpenAI base URL, with /v1")
    what.add_argument("--pool", type=Path, help="bursts over the pool in this file")
    parser.add_argument(
        "--mode",
        choices=_DEFAULTS,
        default="arrivals",
        help="priority comes one by one, or as many at once as there are slots; "
        "or flex fills what default and priority leave idle",
    )
    parser.add_argument(
        "--no-engine", action="store_true", help="with --target: leave out the engine by itself"
    )
    _add_server_options(parser)
    _add_load_options(parser)
    burst_modes.add_options(parser)
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of the results")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a goal is missed")
    given = parser.parse_args(arguments)
    if given.pool:
        given.mode, given.target = "burst", "pool"
    defaults = _COMMON | _DEFAULTS[given.mode][given.target or "simulated"]
    for name, value in defaults.items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.mode != "arrivals" and given.base_url and not given.burst_size:
        parser.error("--base-url needs --burst-size, as many as there are slots")
    return given


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("with --base-url")
    server.add_argument("--model", default="smollm2")
    server.add_argument("--api-key", default="none")
    server.add_argument(
        "--native-priority",
        action="store_true",
        help="tell the tier by vLLM's own field `priority` instead of `service_tier`",
    )
    server.add_argument(
        "--body", type=json.loads, default={}, help="JSON object to add to every request"
    )
    server.add_argument("--allow-remote", action="store_true", help="not only loopback addresses")


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("load")
    load.add_argument("--clients", type=int, help="default-tier clients at once")
    load.add_argument("--tokens", type=int, help="mean length of an answer")
    load.add_argument("--spread", type=float, help="how far lengths vary, as a share of the mean")
    load.add_argument("--prompt-words", type=int)
    load.add_argument("--idle-requests", type=int, help="priority requests with nothing else")
    load.add_argument("--alone-s", type=float, help="default alone; twice")
    load.add_argument("--together-s", type=float, help="how long priority arrives")
    load.add_argument("--rate", type=float, help="priority requests a second")
    load.add_argument(
        "--share",
        type=float,
        default=0.03,
        help="without --rate: so many priority requests for each default one answered alone",
    )
    load.add_argument("--regular", action="store_true", help="arrivals at equal distances")
    load.add_argument("--max-requests", type=int, default=50_000, help="for each endpoint")


@contextmanager
def running(base_url: str, options: argparse.Namespace) -> Iterator[Target]:
    """A server that somebody else has started."""
    if not options.allow_remote:
        require_loopback(base_url)
    tiers = ENGINE_TIERS if options.native_priority else FRONTLINE_TIERS
    yield Target(
        (Endpoint(base_url, base_url, options.model, options.api_key, tiers, options.body),)
    )


@contextmanager
def running_contender(base_url: str, options: argparse.Namespace) -> Iterator[Contenders]:
    """The same as the only one that bursts go to."""
    with running(base_url, options) as target:
        yield Contenders((Contender(target.endpoints[0]),), options.burst_size)


def plan_of(options: argparse.Namespace) -> Plan:
    """Return how much of everything was asked for."""
    return Plan(
        clients=options.clients,
        idle_requests=options.idle_requests,
        alone_s=options.alone_s,
        together_s=options.together_s,
        rate=options.rate,
        share=options.share,
        regular=options.regular,
        most=options.max_requests,
    )


def measure(
    target: Target, workload: Workload, plan: Plan, console: Console, *, first_only: bool
) -> list[Trial]:
    """Send the same load to each endpoint, one after the other."""
    trials = []
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        endpoints = target.endpoints[: 1 if first_only else None]
        for endpoint in steps(endpoints, "contention", console):
            trial = run_trial(endpoint, workload, plan, console.log, target.processes)
            trials.append(runner.run(trial))
    return trials


def tell(
    console: Console, options: argparse.Namespace, about: dict[str, Any], trials: list[Trial],
    simulated: bool,
) -> bool:  # fmt: skip
    """Show and write the results; return whether every goal of the first endpoint is met."""
    by_trial = [rows_of(trial) for trial in trials]
    rows = [row for those in by_trial for row in those]
    goals = [goal for those in by_trial for goal in goals_of(those, simulated=simulated)]
    console.print(report.table(rows))
    for trial, those in zip(trials, by_trial, strict=True):
        report.show(console, trial, those)
    report.show_goals(console, goals)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"contention-{options.target or 'url'}.json"
    report.write(path, about, trials, rows, goals)
    path.with_suffix(".md").write_text(report.markdown(rows) + "\n")
    report.draw(path.with_suffix(".png"), _title(options, about), trials)
    console.print(f"{path} (and .md, .png)")
    return all(goal.met for goal in goals if goal.endpoint == trials[0].endpoint)


def _title(options: argparse.Namespace, about: dict[str, Any]) -> str:
    return f"{options.clients} default clients; {about['engine']}"


def run_by_turns(options: argparse.Namespace, workload: Workload, console: Console) -> int:
    """Measure bursts, or flex that fills what is idle, and return the exit status."""
    address, target = options.base_url, options.target
    if options.pool:
        start: burst_modes.Start = targets.burst_pool(options.pool)
    else:
        start = _CONTENDERS[target]() if target else running_contender(address, options)
    if options.mode == "burst":
        met = burst_modes.run_burst(options, start, workload, console)
        return 0 if met or not options.check else 1
    burst_modes.run_fill(options, start, workload, console)
    return 0


def run(options: argparse.Namespace) -> int:
    """Measure, and return the exit status."""
    console = Console(width=None if sys.stdout.isatty() else 150, log_path=False)
    workload = Workload(options.prompt_words, options.tokens, options.spread)
    if options.mode != "arrivals":
        return run_by_turns(options, workload, console)
    plan = plan_of(options)
    start = _STARTED[options.target]() if options.target else running(options.base_url, options)
    about: dict[str, Any] = {
        "machine": report.machine(),
        "plan": asdict(plan),
        "workload": asdict(workload),
    }
    with start as target:
        about["engine"] = target.engine
        trials = measure(target, workload, plan, console, first_only=options.no_engine)
    met = tell(console, options, about, trials, target.simulated)
    return 0 if met or not options.check else 1


def main() -> None:
    """Run the benchmark."""
    options = parse(sys.argv[1:])
    if options.target:
        contain()
    try:
        sys.exit(run(options))
    except RefusedAddress as error:
        sys.exit(f"contention: {error}")


if __name__ == "__main__":
    main()
