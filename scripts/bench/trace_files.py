"""Reads published traces of real LLM traffic, and gives their requests service tiers.

Three formats are read, as their publishers have them:

- Azure 2023: a CSV with TIMESTAMP, ContextTokens and GeneratedTokens (one file for code completion,
  one for conversation).
- Mooncake: JSON lines with timestamp (ms), input_length, output_length and hash_ids, the hashes of
  the prompt's blocks of 512 tokens.
- ServeGen: a folder with ``chunk-N-trace.csv`` (window start in s, rate, coefficient of variation,
  distribution, its two parameters) and ``chunk-N-dataset.json`` (length distributions by time) for
  each client N.

None of them names a tier. Requests of the first two get one by a hash of the client, which is the
row for Azure and the conversation for Mooncake. ServeGen's clients get one by burstiness.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SHARES = (0.1, 0.6, 0.3)
"""Shares of the requests that are priority, default and flex."""
BLOCK_TOKENS = 512
WINDOW_S = 600.0
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Requests:
    """Requests of one trace, in the order of arrival; all arrays have one length.

    Attributes:
        at: seconds since the trace's start.
        client: whom a request is from; requests of one client have one tier.
        prompt: prompt tokens that the engine must compute: without cached prefixes.
        output: generated tokens.
        context: prompt tokens, cached prefixes included.
    """

    at: Floats
    client: NDArray[np.int64]
    prompt: Floats
    output: Floats
    context: Floats

    @property
    def seconds(self) -> float:
        """Time of the last request."""
        return float(self.at[-1])


@dataclass(frozen=True)
class Client:
    """One client of ServeGen, in windows of 600 s.

    Attributes:
        number: N of ``chunk-N``.
        rate: requests per second, by window.
        cv: coefficient of variation of the times between arrivals, by window; 0 without requests.
        lengths: prompt and output tokens, sampled from the client's distributions, one row a
            request; empty if the client's file has none.
    """

    number: int
    rate: Floats
    cv: Floats
    lengths: Floats

    @property
    def burstiness(self) -> float:
        """Coefficient of variation, averaged over the requests."""
        total = float(self.rate.sum())
        return float((self.rate * self.cv).sum()) / total if total else 0.0


def read_azure(path: Path) -> Requests:
    """Read a CSV of the Azure 2023 traces."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    times = [_azure_time(row["TIMESTAMP"]) for row in rows]
    order = np.argsort(times, kind="stable")
    at = np.array(times)[order]
    prompt = np.array([float(row["ContextTokens"]) for row in rows])[order]
    output = np.array([float(row["GeneratedTokens"]) for row in rows])[order]
    return Requests(at - at[0], order.astype(np.int64), prompt, output, prompt)


def _azure_time(text: str) -> float:
    # Seven decimals; datetime knows six.
    return datetime.fromisoformat(f"{text[:26]}+00:00").timestamp()


def read_mooncake(path: Path) -> Requests:
    """Read a JSON lines file of the Mooncake traces.

    Leading blocks that an earlier request had are cached, so that their tokens are not computed
    again; at least one token always is. A conversation is known by its second block, because the
    first one is a system prompt that most share.
    """
    at, clients, prompts, outputs, contexts = [], [], [], [], []
    seen: set[int] = set()
    for line in path.read_text().splitlines():
        one = json.loads(line)
        blocks: Sequence[int] = one["hash_ids"]
        cached = next((n for n, block in enumerate(blocks) if block not in seen), len(blocks))
        seen.update(blocks)
        at.append(one["timestamp"] / 1000.0)
        clients.append(blocks[1] if len(blocks) > 1 else (blocks or [0])[0])
        prompts.append(max(1.0, one["input_length"] - BLOCK_TOKENS * cached))
        outputs.append(float(one["output_length"]))
        contexts.append(float(one["input_length"]))
    columns = (np.array(column) for column in (at, clients, prompts, outputs, contexts))
    return Requests(*columns)


def read_servegen(folder: Path, samples: int = 400, seed: int = 1) -> list[Client]:
    """Read every client of a folder of ServeGen's.

    Clients without a dataset file get lengths drawn from those of all others, in proportion to how
    many requests these sent.

    Args:
        folder: has ``chunk-N-trace.csv`` and ``chunk-N-dataset.json``.
        samples: how many pairs of lengths to draw for each client.
        seed: of the draws.
    """
    paths = sorted(folder.glob("chunk-*-trace.csv"), key=_number)
    if not paths:
        raise FileNotFoundError(f"{folder}: no chunk-N-trace.csv there")
    clients = [
        _client(path, samples, np.random.default_rng((seed, _number(path)))) for path in paths
    ]
    known = [client for client in clients if len(client.lengths)]
    if not known:
        raise FileNotFoundError(f"{folder}: no client has a dataset file with lengths")
    weights = np.array([client.rate.sum() for client in known])
    random = np.random.default_rng((seed, 0))
    return [
        client
        if len(client.lengths)
        else Client(client.number, client.rate, client.cv, _like(known, weights, samples, random))
        for client in clients
    ]


def _number(path: Path) -> int:
    [number] = re.findall(r"chunk-(\d+)-", path.name)
    return int(number)


def _client(path: Path, samples: int, random: np.random.Generator) -> Client:
    with path.open(newline="") as file:
        rows = [(float(row[1]), float(row[2])) for row in csv.reader(file)]
    rate, cv = np.array(rows).T
    dataset = path.with_name(f"chunk-{_number(path)}-dataset.json")
    return Client(_number(path), rate, cv, _lengths(dataset, samples, random))


def _lengths(path: Path, samples: int, random: np.random.Generator) -> Floats:
    if not path.exists():
        return np.empty((0, 2))
    pairs = []
    # More than are needed, because some times have no lengths.
    known = json.loads(path.read_text()).values()
    each = -(-4 * samples // len(known))
    for times in known:
        both = [_distribution(times[name]) for name in ("input_tokens", "output_tokens")]
        if all(len(values) for values, _ in both):
            drawn = [random.choice(v, each, p=p / p.sum()) for v, p in both]
            pairs.append(np.stack(drawn, axis=1))
    if not pairs:
        return np.empty((0, 2))
    return random.permutation(np.concatenate(pairs))[:samples]


def _distribution(text: str) -> tuple[Floats, Floats]:
    """Parse a dictionary from lengths to probabilities, which the files have as text."""
    # Split by hand: there are megabytes of it, and ast.literal_eval takes a minute.
    pairs = [pair.split(":") for pair in text.strip("{} ").split(",") if pair]
    values = np.array([[float(length), float(share)] for length, share in pairs]).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def _like(
    known: Sequence[Client], weights: Floats, samples: int, random: np.random.Generator
) -> Floats:
    chosen = random.choice(len(known), samples, p=weights / weights.sum())
    return np.stack([random.choice(known[index].lengths) for index in chosen])


def hashed_tiers(clients: Iterable[int], salt: str = "tier") -> NDArray[np.int64]:
    """Return the rank of each client's tier: the first 8 bytes of BLAKE2b of ``salt:client``."""
    edges = np.cumsum(SHARES)
    ranks = {}
    for client in set(clients):
        digest = hashlib.blake2b(f"{salt}:{client}".encode(), digest_size=8).digest()
        share = int.from_bytes(digest, "big") / 2**64
        ranks[client] = int(np.searchsorted(edges[:-1], share, side="right"))
    return np.array([ranks[client] for client in clients], np.int64)


def tiers_by_burstiness(clients: Sequence[Client]) -> Floats:
    """Return the share of each client's requests in each tier, one row a client.

    The most stable clients are priority and the burstiest are flex. A client at a border is split,
    so that the shares are exact over all requests.
    """
    order = np.argsort([client.burstiness for client in clients], kind="stable")
    sent = np.array([client.rate.sum() for client in clients])
    ends = np.cumsum(sent[order]) / sent.sum()
    begins = np.concatenate([[0.0], ends[:-1]])
    edges = np.concatenate([[0.0], np.cumsum(SHARES)])
    shares = np.zeros((len(clients), len(SHARES)))
    for rank in range(len(SHARES)):
        inside = np.minimum(ends, edges[rank + 1]) - np.maximum(begins, edges[rank])
        shares[order, rank] = np.maximum(inside, 0.0) / np.maximum(ends - begins, 1e-12)
    return shares
