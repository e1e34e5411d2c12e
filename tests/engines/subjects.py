"""Whom the contract suite is run over: what each engine can do, and how to look into it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import httpx

STAND_INS = Path(__file__).parents[1] / "stand_ins"


class Can(StrEnum):
    """What not every subject can do, or lets a test see."""

    EMBED = "make embeddings"
    RESPOND = "answer /v1/responses"
    MESSAGE = "answer /v1/messages, and turn text into tokens"
    RANK = "rank texts by their embeddings"
    TRANSCRIBE = "transcribe recordings"
    CALL_TOOLS = "call the function that a request demands"
    FOLLOW_SCHEMAS = "answer in the JSON that a schema demands"
    REFUSE_LONG_ANSWERS = "refuse a max_tokens beyond its context instead of cutting it"
    REFUSE_EMPTY_ANSWERS = "refuse a max_tokens of 0"
    REPRODUCE = "give the same sampled answer again for the same seed"
    NAME_LIMITS = "name max_tokens where it refuses its value"
    COUNT = "tell how many requests are running"
    TELL = "tell what it was sent, and fail on demand"
    PRIORITIZE = "serve priority natively"
    PREEMPT = "give the slot of a running request to one of a better tier"


@dataclass(frozen=True)
class Engine:
    """What is the same for all subjects on one engine."""

    shown: str
    """The engine's name in ``x-engine``."""
    can: frozenset[Can]
    running: Callable[[httpx.Client], float] | None = None
    """Ask the engine itself how many requests it is running."""
    waiting: Callable[[httpx.Client], float] | None = None
    """Ask the engine itself how many requests wait in it."""
    long: int = 64
    """How many tokens take much longer to generate than a request to be scheduled."""
    preempted: Callable[[httpx.Client], float] | None = None
    """Ask the engine itself how often it has suspended a request."""
    tells_preemptions: Mapping[str, bool] = field(default_factory=dict)
    """What to add to a chat, not streamed, whose answer is to tell how often it was suspended."""
    native: bool = False
    """Whether token ids are to be had on SGLang's own ``/generate`` alone."""
    is_free: Callable[[httpx.Client], bool] | None = None
    """Ask the engine itself whether nothing runs or waits and its KV cache holds nobody's."""
    abort_s: float = 3.0
    """How soon after its client has gone a request must be gone too: less than it would take to
    end by itself, and more than the second or so between two looks of the engine."""


def _metric(name: str) -> Callable[[httpx.Client], float]:
    pattern = re.compile(rf"^{name}\{{.*\}} (\S+)", re.MULTILINE)
    return lambda engine: sum(map(float, pattern.findall(engine.get("/metrics").text)))


def _metrics_are_zero(*names: str) -> Callable[[httpx.Client], bool]:
    return lambda engine: not any(_metric(name)(engine) for name in names)


def _simulated(name: str) -> Callable[[httpx.Client], float]:
    return lambda engine: engine.get("/simulate").json()[name]


def _simulated_is_free(engine: httpx.Client) -> bool:
    return not any(_simulated(name)(engine) for name in ("running", "waiting"))


def _loads(name: str) -> Callable[[httpx.Client], float]:
    return lambda engine: sum(load[name] for load in engine.get("/v1/loads").json()["loads"])


def _sglang_is_free(engine: httpx.Client) -> bool:
    # Tokens that only the prefix cache holds are not in use.
    return not any(
        _loads(f"num_{what}")(engine) for what in ("running_reqs", "waiting_reqs", "used_tokens")
    )


# Whether it makes embeddings or transcribes is the model's matter.
_REAL = frozenset(Can) - {Can.TELL, Can.EMBED, Can.TRANSCRIBE}
_SIMULATED = frozenset(Can) - {Can.REFUSE_LONG_ANSWERS, Can.EMBED, Can.TRANSCRIBE}

_SIMULATION_OF: dict[str, Any] = {
    "running": _simulated("running"),
    "waiting": _simulated("waiting"),
    "preempted": _simulated("preempted"),
    "is_free": _simulated_is_free,
    "long": 500,
}

ENGINES: Mapping[str, Engine] = {
    "vllm": Engine(
        "vllm",
        _REAL,
        _metric("vllm:num_requests_running"),
        waiting=_metric("vllm:num_requests_waiting"),
        long=150,
        preempted=_metric("vllm:num_preemptions_total"),
        is_free=_metrics_are_zero(
            "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"
        ),
    ),
    # It looks for clients that have gone every 2 to 4 seconds.
    "sglang": Engine(
        "sglang",
        _REAL - {Can.NAME_LIMITS, Can.REFUSE_EMPTY_ANSWERS, Can.REPRODUCE, Can.RANK},
        _loads("num_running_reqs"),
        waiting=_loads("num_waiting_reqs"),
        # It counts preemptions for each request alone.
        tells_preemptions={"return_meta_info": True},
        native=True,
        is_free=_sglang_is_free,
        abort_s=6.0,
    ),
    # Its count of running requests has no route of its own: /metrics is emptied by reading.
    "tensorrt_llm": Engine(
        "tensorrt-llm",
        _REAL
        - {Can.COUNT, Can.REFUSE_LONG_ANSWERS, Can.NAME_LIMITS, Can.PREEMPT}
        - {Can.MESSAGE, Can.RANK},
    ),
    "simulated": Engine("simulated-vllm", _SIMULATED | {Can.REFUSE_LONG_ANSWERS}, **_SIMULATION_OF),
    "simulated-sglang": Engine("simulated-sglang", _SIMULATED - {Can.RANK}, **_SIMULATION_OF),
    "simulated-tensorrt-llm": Engine(
        "simulated-tensorrt-llm",
        _SIMULATED - {Can.NAME_LIMITS, Can.PREEMPT, Can.MESSAGE, Can.RANK},
        _simulated("running"),
        waiting=_simulated("waiting"),
    ),
    "stand-in": Engine(
        "tensorrt-llm",
        _SIMULATED - {Can.NAME_LIMITS, Can.PREEMPT, Can.MESSAGE, Can.RANK},
        _simulated("running"),
        waiting=_simulated("waiting"),
    ),
    # A build of 2025: no priority over HTTP, and validation errors of another shape.
    "stand-in-2025": Engine(
        "tensorrt-llm",
        _SIMULATED - {Can.NAME_LIMITS, Can.PREEMPT, Can.MESSAGE, Can.RANK, Can.PRIORITIZE},
        _simulated("running"),
        waiting=_simulated("waiting"),
    ),
}


@dataclass(frozen=True)
class Subject:
    """One model on one engine, behind Frontline.

    ``fixture`` gives the deployment that serves it. ``pool`` is the pool to deploy for it; none
    where the fixture deploys it anyway.
    """

    name: str
    engine: Engine
    fixture: str
    model: str
    embedding_model: str | None = None
    pool: Mapping[str, Any] = field(default_factory=dict)
    resources: Mapping[str, Any] = field(default_factory=lambda: {"num_cpus": 0.1})

    @property
    def can(self) -> frozenset[Can]:
        transcribes = self.pool.get("engine_args", {}).get("transcribes", False)
        more = {Can.EMBED: bool(self.embedding_model), Can.TRANSCRIBE: transcribes}
        return self.engine.can | {ability for ability, has in more.items() if has}

    def app(self) -> dict[str, Any]:
        """The model's application in a Serve config file."""
        return {
            "name": self.model,
            "route_prefix": None,
            "import_path": "deployments.model:build",
            "args": {
                "id": f"contract/{self.model}",
                "aliases": [self.model],
                "pools": [dict(self.pool)],
            },
            "deployments": [
                {
                    "name": "Model",
                    "user_config": {
                        "rate_card": {
                            "input": 1,
                            "cached_input": 0.5,
                            "output": 2,
                            "audio_second": 0.001,
                        },
                    },
                },
                {
                    "name": self.pool["name"],
                    "num_replicas": 1,
                    "ray_actor_options": dict(self.resources),
                },
            ],
        }


# Slow enough that a long answer can be caught in the act, fast enough for everything else.
_SIMULATION = {"tokens_per_second": 250, "default_completion_tokens": 8, "embedding_dimensions": 16}
_POOL = {"name": "pool", "model": "simulated", "slots": 4, "stop_grace_s": 1}


def _simulation(name: str, engine: str, **engine_args: Any) -> Subject:
    pool = {**_POOL, "engine": "simulated", "engine_args": {**_SIMULATION, **engine_args}}
    return Subject(name, ENGINES[engine], "simulations", name, name, pool)


def _stand_in(name: str, engine: str, **settings: Any) -> Subject:
    root = STAND_INS.parents[1]
    inside = root / "deployments" / "engines" / "inside"
    path = os.pathsep.join(map(str, [STAND_INS, root, inside]))
    environment = {"PYTHONPATH": path, "STAND_IN_SETTINGS": json.dumps(_SIMULATION | settings)}
    pool = {
        **_POOL,
        "engine": "tensorrt_llm",
        "engine_args": {"max_seq_len": 4096},
        "environment": environment,
        "python": sys.executable,
    }
    return Subject(name, ENGINES[engine], "simulations", name, name, pool)


SIMULATED = (
    _simulation("simulated-vllm", "simulated", transcribes=True),
    _simulation("simulated-sglang", "simulated-sglang", dialect="sglang"),
    _simulation("simulated-tensorrt-llm", "simulated-tensorrt-llm", dialect="tensorrt_llm"),
    _stand_in("tensorrt-llm-stand-in", "stand-in"),
    _stand_in(
        "tensorrt-llm-2025-stand-in",
        "stand-in-2025",
        lacking_fields=["priority"],
        older_errors=True,
    ),
)
"""They run wherever the integration tests do."""


def checked_subject(file: Path) -> Subject:
    """The subject of scripts/gpu_check, which wrote its pool into ``file``."""
    given = json.loads(file.read_text())
    pool, gpus = given["pool"], given["gpus"]
    dialect = pool["engine_args"].get("dialect", "vllm") if pool["engine"] == "simulated" else ""
    name = f"simulated-{dialect}".replace("_", "-") if dialect else pool["engine"]
    known = given.get("subject") or ("simulated" if name == "simulated-vllm" else name)
    engine = ENGINES[known]
    resources = {"num_gpus": gpus} if gpus else {"num_cpus": 0.1}
    makes_embeddings = "checked" if pool["engine_args"].get("embedding_dimensions") else None
    return Subject("checked", engine, "checked", "checked", makes_embeddings, pool, resources)


REAL = (
    Subject("vllm", ENGINES["vllm"], "local", "smollm2", "all-minilm-l6-v2"),
    Subject("sglang", ENGINES["sglang"], "sglang", "sglang"),
)
"""They need the engines' environments and the models (``scripts/setup``)."""
