"""What the facts mean for an engine that is to be started. Pure: facts in, findings out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from app.config.model import MOST_AUTO_SLOTS, PoolSettings
from app.contracts.findings import Finding, error, ok, warning
from app.contracts.start import StartProblem
from deployments.engines.lora import CONFIG_NAME
from deployments.engines.needs import EngineNeeds, numbers
from deployments.preflight.facts import (
    GIB,
    AdapterFacts,
    EnvironmentFacts,
    Facts,
    Gpu,
    HostFacts,
    ModelFacts,
)
from deployments.preflight.memory import (
    RUNTIME,
    Fit,
    fit,
    kv_room,
    read_shape,
    weight_bytes,
)

LEAST_SHARED_MEMORY: Final = GIB
"""NCCL and torch exchange data between GPUs of a node in shared memory. A container has 64 MiB by
default."""
LEAST_DISK: Final = GIB
FULL_DISK: Final = 0.05
"""Ray stops working on a disk with less than this share free."""
CUDA_DRIVERS: Final = {12: "525", 13: "580"}
"""The first driver for each generation of CUDA."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be started: a pool, what its engine needs, and GPUs that Ray reserves a replica.

    Attributes:
        pool: the pool's settings.
        needs: what its engine needs.
        gpus: GPUs that Ray reserves for each node of a replica.
        traced: whether its engine is to send spans.
    """

    pool: PoolSettings
    needs: EngineNeeds
    gpus: float
    traced: bool = False


_CHECK_ADAPTERS: Final = "check `adapters` of the pool"


def examine(subject: Subject, facts: Facts) -> list[Finding]:
    """Return all findings about a pool."""
    return [
        *check_environment(subject, facts.environment, facts.host),
        *check_gpus(subject, facts.host, facts.environment),
        *check_model(facts.model),
        *check_adapters(facts.adapters),
        *check_memory(subject, facts.host, facts.model),
        *check_machine(subject, facts.host),
    ]


def check_environment(
    subject: Subject, environment: EnvironmentFacts, host: HostFacts
) -> Iterator[Finding]:
    """Check the interpreter, the engine's module and version, and the C library."""
    needs, python = subject.needs, environment.python
    install = (
        f"scripts/setup {needs.setup}, and `python: ${{FRONTLINE_HOME}}/envs/{needs.setup}/bin/"
        "python` in the pool"
    )
    if environment.problem:
        why = "the engine runs under it"
        yield error(
            f"{python} {environment.problem}", why, f"correct `python` of the pool, or {install}",
            StartProblem.CANNOT_RUN,
        )  # fmt: skip
        return
    if needs.glibc and host.glibc and host.glibc < needs.glibc:
        least, here = _dotted(needs.glibc), _dotted(host.glibc)
        yield error(
            f"glibc {here}", f"{needs.module} needs {least}",
            "a newer Linux, or the engine's image (scripts/docker)", StartProblem.CANNOT_RUN,
        )  # fmt: skip
    if not environment.has_module:
        yield error(
            f"{python} has no module {needs.module}", "the engine is not installed there",
            install, StartProblem.MISSING_MODULE,
        )  # fmt: skip
    elif not environment.version:
        why = "Frontline relies on flags and facts of versions that were tried"
        yield warning(
            f"{needs.module} does not say its version", why, f"install {needs.tried} as a package"
        )
    elif environment.version not in needs.tried:
        yield warning(
            f"{needs.module} {environment.version} was not tried",
            "its flags, its priority or its errors may be others; preemption may be off",
            f"install {needs.tried}, or run scripts/gpu_check",
        )
    else:
        yield ok(f"{needs.module} {environment.version} under {python}")
    if subject.traced and environment.has_module and not environment.exports_spans:
        yield warning(
            f"{python} has no exporters of OpenTelemetry", "the engine sends no spans",
            "install opentelemetry-exporter-otlp there, or set OTEL_TRACES_EXPORTER to none in the "
            "pool's environment",
        )  # fmt: skip


def check_gpus(
    subject: Subject, host: HostFacts, environment: EnvironmentFacts
) -> Iterator[Finding]:
    """Check driver, CUDA generation, and the number of GPUs."""
    needs, each_node = subject.needs, subject.needs.gpus / subject.pool.nodes
    if not subject.gpus:
        if environment.torch_cuda:
            yield warning(
                "Ray reserves no GPU for it", "the engine is built for GPUs, and others may get "
                "the same one", "num_gpus in the deployment's ray_actor_options",
            )  # fmt: skip
        return
    if host.gpu_problem:
        yield error(
            f"no GPU is seen here ({host.gpu_problem})", "Ray reserves GPUs for the engine",
            "install the driver until `nvidia-smi` shows the GPU, or run this on the pool's node",
            StartProblem.NO_GPU,
        )  # fmt: skip
        return
    if len(host.gpus) < subject.gpus:
        yield error(
            f"{len(host.gpus)} GPUs here", f"each replica takes {subject.gpus:g}",
            "fewer GPUs in num_gpus and in engine_args, or another machine", StartProblem.NO_GPU,
        )  # fmt: skip
    if subject.gpus >= 1 and subject.gpus != each_node:
        yield error(
            f"the engine runs on {each_node:g} GPUs of a node, Ray reserves {subject.gpus:g}",
            "it would miss GPUs, or leave some idle",
            "the same number in num_gpus and in the engine's parallel sizes", StartProblem.NO_GPU,
        )  # fmt: skip
    if subject.gpus < 1 and needs.memory.share > subject.gpus:
        yield warning(
            f"replicas share a GPU, and each takes {needs.memory.share:.0%} of it",
            "the second does not start", f"{needs.memory.option} of at most {subject.gpus:g}",
        )  # fmt: skip
    yield from _check_cuda(host, environment)


def _check_cuda(host: HostFacts, environment: EnvironmentFacts) -> Iterator[Finding]:
    shown = f"driver {host.driver}, CUDA {_dotted(host.cuda)}, {_gpus(host.gpus)}"
    built = numbers(environment.torch_cuda)
    if environment.torch and not built:
        yield error(
            f"torch {environment.torch} is a build for CPUs", "the engine sees no GPU",
            "install the engine for GPUs, in an environment of its own", StartProblem.NO_GPU,
        )  # fmt: skip
    elif built and host.cuda and built[0] > host.cuda[0]:
        driver = CUDA_DRIVERS.get(built[0], "a newer one")
        yield error(
            shown, f"the engine is built for CUDA {environment.torch_cuda}",
            f"driver {driver} or newer, or a build of the engine for CUDA {host.cuda[0]}",
            StartProblem.NO_GPU,
        )  # fmt: skip
    else:
        yield ok(shown)


def check_model(model: ModelFacts) -> Iterator[Finding]:
    """Check the model's folder, or whether it can be downloaded."""
    if not model.folder:
        yield _not_here(model)
        return
    if model.config is None:
        yield _missing(f"{model.folder} has no readable config.json", "engines read it first")
    if model.pointers:
        what = f"{model.pointers[0]} is a pointer of Git LFS, and no weights"
        yield _missing(what, "the weights were not downloaded", "git lfs pull in that folder")
    elif model.missing:
        what = f"{len(model.missing)} files of weights are missing, such as {model.missing[0]}"
        yield _missing(what, "a download was not finished")
    elif not model.weights:
        yield _missing(f"{model.folder} has no weights", "there is nothing to load")
    if not model.tokenizer:
        yield _missing(f"{model.folder} has no tokenizer", "no text could be read")
    shape = read_shape(model.config or {})
    if not model.chat_template and shape is not None and shape.generates:
        yield warning(
            f"{model.folder} has no chat template", "chat completions are refused",
            "chat_template in engine_args, or chat_template.jinja in the folder",
        )  # fmt: skip
    if model.config is not None and model.weights and not (model.missing or model.pointers):
        yield ok(f"{model.folder}: {_gib(model.weights)} of weights")


def check_adapters(adapters: Iterable[AdapterFacts]) -> Iterator[Finding]:
    """Check the folders of LoRA adapters."""
    for one in adapters:
        if not one.exists:
            what = f"no folder {one.path}"
        elif not one.config:
            what = f"{one.path} has no {CONFIG_NAME}"
        elif not one.weights:
            what = f"{one.path} has no adapter_model file"
        else:
            yield ok(f"{one.path}: a LoRA adapter")
            continue
        yield _missing(what, "the engine loads an adapter from there", _CHECK_ADAPTERS)


def _not_here(model: ModelFacts) -> Finding:
    if model.is_path:
        return _missing(f"no folder {model.name}", "the engine loads the model from there")
    if model.offline:
        what = f"{model.name} is not in {model.cache}, and HF_HUB_OFFLINE is set"
        fix = 'download it, or set HF_HUB_OFFLINE: "0" in `environment` of the pool'
        return _missing(what, "it may not be downloaded", fix)
    return warning(
        f"{model.name} is not in {model.cache}", "the first start downloads it, which needs the "
        "hub, disk, and HF_TOKEN for models with terms", "download it before",
    )  # fmt: skip


def _missing(what: str, why: str, fix: str = "") -> Finding:
    fix = fix or "check `model` of the pool, or download it again"
    return error(what, why, fix, StartProblem.MISSING_MODEL)


def check_memory(subject: Subject, host: HostFacts, model: ModelFacts) -> Iterator[Finding]:
    """Check that weights and KV cache fit."""
    if not _weights_are_known(model):
        return
    weights = _weights(subject, model)
    if not subject.gpus:
        yield from _check_main_memory(subject, host, weights)
    yield from _check_free(subject, host) if subject.gpus else ()
    room = _room(subject, host, weights)
    if subject.gpus and room is not None and room <= 0:
        yield error(
            f"weights of {_gib(weights)} and {_gib(RUNTIME)} besides do not fit into "
            f"{_gpus(host.gpus)}", "nothing is left for the KV cache",
            "a smaller or quantized model, more GPUs, or a larger "
            f"{subject.needs.memory.option} ({subject.needs.memory.share:g})",
            StartProblem.OUT_OF_MEMORY,
        )  # fmt: skip
    elif fits := estimate(subject, host, model):
        yield _of_fit(subject, fits)


def estimate(subject: Subject, host: HostFacts, model: ModelFacts) -> Fit | None:
    """Return what fits into the engine's memory, by arithmetic; ``None`` if too little is known."""
    shape = read_shape(model.config or {})
    if shape is None or not shape.generates or not _weights_are_known(model):
        return None
    room = _room(subject, host, _weights(subject, model))
    return None if room is None or room <= 0 else fit(room, shape, subject.needs)


def _weights_are_known(model: ModelFacts) -> bool:
    return bool(model.weights) and not (model.missing or model.pointers)


def _weights(subject: Subject, model: ModelFacts) -> float:
    """Return the bytes of weights on each GPU, or in main memory."""
    return weight_bytes(model.weights, read_shape(model.config or {}), subject.needs)


def _room(subject: Subject, host: HostFacts, weights: float) -> float | None:
    """Return the bytes that are left for the KV cache; ``None`` if unknown."""
    if not subject.gpus:
        return subject.needs.cpu_cache_bytes
    if not host.gpus:
        return None
    return kv_room(min(gpu.total for gpu in host.gpus), weights, subject.needs)


def _of_fit(subject: Subject, fits: Fit) -> Finding:
    needs, slots = subject.needs, subject.pool.slots
    holds = (
        f"the KV cache holds {int(fits.tokens):,} tokens: {fits.longest} requests of all "
        f"{fits.context:,}, or {fits.usual} of a usual {fits.usual_tokens:,}"
    )
    if not fits.longest:
        return error(
            holds, "the engine refuses to start if not one request fits",
            f"{needs.context_option} of at most {max(0, int(fits.tokens)):,}, or more memory",
            StartProblem.OUT_OF_MEMORY,
        )  # fmt: skip
    if not isinstance(slots, int):
        return ok(f"{holds}; slots: auto takes about {min(fits.usual, MOST_AUTO_SLOTS)}")
    if fits.usual < slots:
        return warning(
            f"{holds}; slots is {slots}", "requests in slots would wait for memory inside the "
            "engine, where they are suspended and computed again", f"slots: {fits.usual}",
        )  # fmt: skip
    return ok(f"{holds}; slots is {slots}")


def _check_free(subject: Subject, host: HostFacts) -> Iterator[Finding]:
    """Check that other processes leave the engine its share."""
    rule = subject.needs.memory
    free = sorted((gpu for gpu in host.gpus), key=lambda gpu: gpu.free / gpu.total, reverse=True)
    taken = [gpu for gpu in free[: max(1, int(subject.gpus))] if gpu.free < rule.share * gpu.total]
    if taken and not rule.of_rest:
        gpu = taken[0]
        yield error(
            f"{gpu.name} has {_gib(gpu.free)} of {_gib(gpu.total)} free",
            f"the engine takes {rule.share:.0%} ({rule.option})",
            f"end what `nvidia-smi` shows there, or a lower {rule.option}",
            StartProblem.OUT_OF_MEMORY,
        )  # fmt: skip


def _check_main_memory(subject: Subject, host: HostFacts, weights: float) -> Iterator[Finding]:
    cache = subject.needs.cpu_cache_bytes or 0
    if host.memory and weights + cache > host.memory:
        yield error(
            f"{_gib(weights)} of weights and {_gib(cache)} of KV cache, {_gib(host.memory)} of "
            "memory available", "the kernel ends what takes too much",
            "a smaller model or KV cache, or end other processes", StartProblem.OUT_OF_MEMORY,
        )  # fmt: skip


def check_machine(subject: Subject, host: HostFacts) -> Iterator[Finding]:
    """Check shared memory and disks."""
    shared = host.shared_memory
    if subject.gpus and (shared is None or shared.free < LEAST_SHARED_MEMORY):
        what = f"/dev/shm has {_gib(shared.free) if shared else 'nothing'} free"
        why, fix = "processes of the engine exchange data there", "--shm-size 16g for a container"
        if subject.needs.gpus > 1:
            yield error(what, why, fix, StartProblem.OUT_OF_MEMORY)
        else:
            yield warning(what, why, fix)
    for disk in host.disks:
        if disk.free < LEAST_DISK or disk.free < FULL_DISK * disk.total:
            yield warning(
                f"{disk.path} has {_gib(disk.free)} of {_gib(disk.total)} free",
                "Ray stops working below 5 %, and logs, models and compiled code need room",
                "make room there",
            )


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _gpus(gpus: tuple[Gpu, ...]) -> str:
    if not gpus:
        return "no GPU"
    smallest = min(gpus, key=lambda gpu: gpu.total)
    return f"{len(gpus)} x {smallest.name} ({_gib(smallest.total)})"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version)) or "unknown"
