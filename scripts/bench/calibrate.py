"""Fits the model of an engine's steps (``engine_model``) to real vLLM on the CPU.

    FRONTLINE_ENV=test . scripts/activate
    python scripts/bench/calibrate.py [--rounds 3]       # about 6 minutes on two cores

Starts the chat model of configs/local.yaml, and sends batches of equal requests to its engine: all
at once, none of whose prompts is cached. Prints the fitted factors, and beside each batch how long
it took (the median of the rounds) and how far the model is off. The batches of ``HELD_BACK`` take
no part in the fit.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.bench import targets
from scripts.bench.contained import contain
from scripts.bench.engine_model import EngineModel, Published, fit
from scripts.bench.load import Endpoint, Workload, require_loopback

_SLOTS = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """So many equal requests at once, with prompts of about so many words."""

    size: int
    words: int
    output: int


FITTED = (
    Batch(1, 16, 1), Batch(1, 256, 1), Batch(1, 1024, 1), Batch(1, 16, 128), Batch(4, 16, 128),
    Batch(8, 16, 128), Batch(8, 256, 128), Batch(8, 1024, 64),
)  # fmt: skip
HELD_BACK = (Batch(2, 64, 64), Batch(4, 512, 64), Batch(8, 128, 256), Batch(6, 700, 32))


async def measure(endpoint: Endpoint, rounds: int) -> dict[Batch, Published]:
    """Run each batch once in every round, and return the medians."""
    require_loopback(endpoint.base_url)
    seconds: defaultdict[Batch, list[float]] = defaultdict(list)
    prompts: dict[Batch, int] = {}
    headers = {"authorization": f"Bearer {endpoint.key}"}
    timeout = aiohttp.ClientTimeout(total=None)
    numbers = itertools.count()
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:

        async def ask(batch: Batch) -> int:
            prompt = Workload(batch.words, batch.output, 0.0).prompt("calibration", next(numbers))
            body: dict[str, Any] = {
                "model": endpoint.model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": batch.output,
                "ignore_eos": True,
            }
            url = f"{endpoint.base_url}/chat/completions"
            async with session.post(url, json=body) as answer:
                answer.raise_for_status()
                usage = (await answer.json())["usage"]
            assert usage["completion_tokens"] == batch.output
            return int(usage["prompt_tokens"])

        await ask(FITTED[0])
        for _ in range(rounds):
            for batch in (*FITTED, *HELD_BACK):
                began = time.monotonic()
                tokens = await asyncio.gather(*(ask(batch) for _ in range(batch.size)))
                seconds[batch].append(time.monotonic() - began)
                prompts[batch] = round(sum(tokens) / len(tokens))
    return {
        batch: Published(batch.size, prompts[batch], batch.output, median(taken))
        for batch, taken in seconds.items()
    }


def table(measured: dict[Batch, Published], model: EngineModel) -> Table:
    """Return the batches beside what the model says."""
    shown = Table("batch", "prompt", "output", "measured", "model", "in the fit")
    for batch, one in measured.items():
        off = model.batch_s(one.batch, one.prompt, one.output) / one.seconds - 1
        cells = (one.batch, one.prompt, one.output, f"{one.seconds:.3f} s", f"{off:+.0%}")
        shown.add_row(*map(str, cells), "yes" if batch in FITTED else "no")
    return shown


def main() -> None:
    """Start the engine, measure, fit."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rounds", type=int, default=3)
    rounds = options.parse_args().rounds
    contain()
    with targets.vllm() as target:
        alone = target.endpoints[1]
        measured = asyncio.run(measure(alone, rounds))
    model = fit([measured[batch] for batch in FITTED], _SLOTS)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table(measured, model))
    factors = f"base_s {model.base_s:.3g}, token_s {model.token_s:.3g}, kv_s {model.kv_s:.3g}"
    console.print(f"{target.engine}: {factors}")
    for one in measured.values():
        console.print(f"    {one!r},")


if __name__ == "__main__":
    main()
