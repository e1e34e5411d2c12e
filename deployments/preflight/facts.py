"""What is known of a machine, an engine's environment and a model, as plain values. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU: its name, and its memory in bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Space:
    """Room in a file system, in bytes."""

    path: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What is known of a machine.

    Attributes:
        gpus: those that an engine started here would see.
        driver: the version of the GPU driver; empty if there is none.
        cuda: the newest CUDA that the driver runs; empty if there is none.
        gpu_problem: why ``nvidia-smi`` shows nothing; empty if it does.
        glibc: the version of the C library; empty if it is another one.
        shared_memory: room in ``/dev/shm``; ``None`` if there is none.
        disks: room where logs, models and Ray's files go.
        memory: bytes of main memory that are available.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    cuda: tuple[int, ...] = ()
    gpu_problem: str = ""
    glibc: tuple[int, ...] = ()
    shared_memory: Space | None = None
    disks: tuple[Space, ...] = ()
    memory: int = 0


@dataclass(frozen=True, slots=True)
class EnvironmentFacts:
    """What an engine's interpreter says of its environment.

    Attributes:
        python: the interpreter.
        problem: why it says nothing; empty if it does.
        has_module: whether the engine's module is there.
        version: the engine's version; empty if unknown.
        torch: the version of torch; empty if it is not there.
        torch_cuda: the CUDA that torch was built for; empty for a build for CPUs.
        exports_spans: whether OpenTelemetry's exporters are there.
    """

    python: str
    problem: str = ""
    has_module: bool = True
    version: str = ""
    torch: str = ""
    torch_cuda: str = ""
    exports_spans: bool = False


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is on disk of a model.

    Attributes:
        name: the folder or name in the pool's settings.
        folder: where it is; empty if it is not on this machine.
        is_path: whether the name is that of a folder, and nothing that could be downloaded.
        config: the content of ``config.json``; ``None`` if it is not there.
        weights: bytes of all weights.
        missing: names of weight files that the index names and that are not there.
        pointers: names of weight files that are pointers of Git LFS.
        tokenizer: whether there are files of a tokenizer.
        chat_template: whether there is a chat template.
        offline: whether nothing may be downloaded.
        cache: where downloads go.
    """

    name: str
    folder: str = ""
    is_path: bool = True
    config: Mapping[str, Any] | None = None
    weights: int = 0
    missing: tuple[str, ...] = ()
    pointers: tuple[str, ...] = ()
    tokenizer: bool = True
    chat_template: bool = True
    offline: bool = False
    cache: str = ""


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What is on disk of a LoRA adapter.

    Attributes:
        path: its folder.
        exists: whether the folder is there.
        config: whether it has an ``adapter_config.json``.
        weights: whether it has weights.
    """

    path: str
    exists: bool = True
    config: bool = True
    weights: bool = True


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known before an engine is started."""

    host: HostFacts
    environment: EnvironmentFacts
    model: ModelFacts = field(default_factory=lambda: ModelFacts(""))
    adapters: tuple[AdapterFacts, ...] = ()
