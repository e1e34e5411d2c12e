"""Gathers the facts before an engine is started: a few files and two short programs.

Nothing is downloaded, no port is opened and no GPU is used. Each program has ``PROBE_S`` seconds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil

from app.config.model import PoolSettings
from app.contracts.findings import Examination, error
from app.contracts.start import StartProblem
from app.core.paths import frontline_home
from app.core.settings import SettingsError
from deployments.engines.base import Launch
from deployments.engines.lora import CONFIG_NAME
from deployments.engines.needs import EngineNeeds, numbers
from deployments.engines.registry import adapter_named
from deployments.engines.traces import sends_spans
from deployments.preflight.checks import Subject, estimate, examine
from deployments.preflight.facts import (
    AdapterFacts,
    EnvironmentFacts,
    Facts,
    Gpu,
    HostFacts,
    ModelFacts,
    Space,
)

PROBE_S: Final = 10.0
"""Longest wait for each program. A Python starts within a second from a slow disk; ``nvidia-smi``
takes some seconds where no process keeps the driver loaded."""

_PROBE: Final = """
import importlib.metadata as m, importlib.util as u, json, re, sys
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return ""
torch, cuda = u.find_spec("torch"), ""
if torch is not None and torch.submodule_search_locations:
    with open(torch.submodule_search_locations[0] + "/version.py") as file:
        found = re.search(r"^cuda\\b.*=\\s*'([\\d.]+)'", file.read(), re.M)
    cuda = found.group(1) if found else ""
names = sys.argv[2:]
print(json.dumps({
    "has_module": u.find_spec(sys.argv[1]) is not None,
    "version": next(filter(None, map(version, names)), ""),
    "torch": version("torch"),
    "torch_cuda": cuda,
    "exports_spans": all(map(version, (
        "opentelemetry-exporter-otlp-proto-grpc", "opentelemetry-exporter-otlp-proto-http",
    ))),
}))
"""
"""Imports nothing of the engine: that takes long and may claim a GPU."""

_GPU_FIELDS: Final = "index,uuid,name,memory.total,memory.free,driver_version"
_WEIGHTS: Final = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
_POINTER: Final = b"version https://git-lfs"
_MIB: Final = 1 << 20


def examine_pool(launch: Launch, pool: PoolSettings, gpus: float) -> Examination:
    """Look at this machine before an engine is started on it.

    Args:
        launch: how the engine would be started.
        pool: the settings of its pool.
        gpus: GPUs that Ray reserves for each node of a replica.
    """
    environment = os.environ | pool.environment
    needs = adapter_named(pool.engine).needs(launch, environment)
    if needs is None:
        return Examination(())
    with ThreadPoolExecutor(2) as threads:
        asked = threads.submit(gather_environment, launch.python, needs, environment)
        host = gather_host(environment, look_for_gpus=bool(gpus))
        model = gather_model(launch.model, environment)
        adapters = tuple(gather_adapter(one.path) for one in launch.loras)
        facts = Facts(host, asked.result(), model, adapters)
    subject = Subject(pool, needs, gpus, traced=sends_spans(launch))
    fits = estimate(subject, host, model)
    return Examination(
        tuple(examine(subject, facts)),
        len(host.gpus),
        exports_spans=facts.environment.exports_spans,
        fits=None if fits is None else fits.usual,
    )


def examination_failed(problem: SettingsError) -> Examination:
    """Return the examination of a pool whose settings do not fit this machine's variables."""
    what = "an environment variable is missing here, or wrong"
    fix = "set it where Frontline is started, or in the pool's environment"
    return Examination((error(what, str(problem), fix, StartProblem.CANNOT_RUN),))


def gather_host(environment: Mapping[str, str], *, look_for_gpus: bool) -> HostFacts:
    """Return what is known of this machine."""
    gpus: dict[str, Any] = _gather_gpus(environment) if look_for_gpus else {}
    temporary = environment.get("RAY_TMPDIR") or "/tmp"
    spaces = [_space(str(frontline_home())), _space(temporary)]
    return HostFacts(
        **gpus,
        glibc=numbers(_libc().removeprefix("glibc ")),
        shared_memory=_space("/dev/shm"),
        disks=tuple({(one.total, one.free): one for one in spaces if one}.values()),
        memory=psutil.virtual_memory().available,
    )


def gather_environment(
    python: str, needs: EngineNeeds, environment: Mapping[str, str]
) -> EnvironmentFacts:
    """Return what an interpreter says of its environment."""
    command = [python, "-c", _PROBE, needs.module, *needs.distributions]
    text, problem = _run(command, environment)
    if problem:
        return EnvironmentFacts(python, problem)
    try:
        return EnvironmentFacts(python, **json.loads(text))
    except (ValueError, TypeError):
        return EnvironmentFacts(python, "is no Python")


def gather_adapter(path: str) -> AdapterFacts:
    """Return what is on disk of a LoRA adapter."""
    folder = Path(path)
    return AdapterFacts(
        path,
        exists=folder.is_dir(),
        config=(folder / CONFIG_NAME).is_file(),
        weights=any(folder.glob("adapter_model*")),
    )


def gather_model(name: str, environment: Mapping[str, str]) -> ModelFacts:
    """Return what is on disk of a model: a folder, or a name in the cache of the model hub."""
    if Path(name).is_file():
        # One file with everything in it, such as GGUF.
        return ModelFacts(name, name, config={}, weights=Path(name).stat().st_size)
    is_path = name.startswith(("/", "./", "../")) or Path(name).is_dir() or name.count("/") > 1
    cache = _hub_cache(environment)
    folder = Path(name) if is_path else _snapshot(cache, name)
    offline = environment.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    if folder is None or not folder.is_dir():
        return ModelFacts(name, is_path=is_path, offline=offline, cache=str(cache))
    files, missing = _weights(folder)
    return ModelFacts(
        name=name,
        folder=str(folder),
        is_path=is_path,
        config=_json(folder / "config.json"),
        weights=sum(path.stat().st_size for path in files),
        missing=missing,
        pointers=tuple(path.name for path in files if _is_pointer(path)),
        tokenizer=any(any(folder.glob(pattern)) for pattern in _TOKENIZERS),
        chat_template=_has_chat_template(folder),
        offline=offline,
        cache=str(cache),
    )


def read_gpus(table: str, visible: str | None) -> tuple[tuple[Gpu, ...], str]:
    """Return the GPUs and the driver of a table of ``nvidia-smi``.

    Args:
        table: a line for each GPU, with ``_GPU_FIELDS``.
        visible: ``CUDA_VISIBLE_DEVICES``: indices or UUIDs; ``None`` for all GPUs.

    Raises:
        ValueError: it is no such table.
    """
    wanted = None if visible is None else [one.strip() for one in visible.split(",")]
    gpus, driver = [], ""
    for line in filter(None, map(str.strip, table.splitlines())):
        index, uuid, name, total, free, driver = (field.strip() for field in line.split(","))
        if wanted is None or index in wanted or any(one and uuid.startswith(one) for one in wanted):
            gpus.append(Gpu(name, _mib(total), _mib(free)))
    return tuple(gpus), driver


def _mib(text: str) -> int:
    return int(float(text) * _MIB)


def _gather_gpus(environment: Mapping[str, str]) -> dict[str, Any]:
    program = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if program is None:
        return {"gpu_problem": "there is no nvidia-smi"}
    query = [program, f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader,nounits"]
    table, problem = _run(query, environment)
    if problem:
        return {"gpu_problem": f"nvidia-smi {problem}"}
    try:
        gpus, driver = read_gpus(table, environment.get("CUDA_VISIBLE_DEVICES"))
    except ValueError:
        return {"gpu_problem": "nvidia-smi prints no table of GPUs"}
    shown, _ = _run([program], environment)
    cuda = re.search(r"CUDA[\w ]*Version:\s*([\d.]+)", shown)
    problem = "" if gpus else "nvidia-smi shows none that is visible here"
    version = numbers(cuda.group(1)) if cuda else ()
    return {"gpus": gpus, "driver": driver, "cuda": version, "gpu_problem": problem}


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[str, str]:
    """Return a program's output, and what went wrong; one of them is empty."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=dict(environment), text=True, errors="replace",
        )  # fmt: skip
    except OSError as problem:
        return "", f"cannot be run ({problem.strerror})"
    with process.stdout or open(os.devnull):
        try:
            text, _ = process.communicate(timeout=PROBE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            # It may be stuck in the kernel, as programs are on a hanging driver.
            with suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
            return "", f"does not answer within {PROBE_S:g} s"
    if process.returncode != 0:
        last = (text.strip().splitlines() or [""])[-1][:200]
        return "", f"ends with status {process.returncode}" + (f" ({last})" if last else "")
    return text, ""


def _space(path: str) -> Space | None:
    """Return the room where a path is, or would be made."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        usage = shutil.disk_usage(place)
    except OSError:
        return None
    return Space(path, usage.total, usage.free)


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return ""


def _hub_cache(environment: Mapping[str, str]) -> Path:
    if cache := environment.get("HF_HUB_CACHE"):
        return Path(cache)
    general = environment.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(environment.get("HF_HOME") or f"{general}/huggingface") / "hub"


def _snapshot(cache: Path, name: str) -> Path | None:
    model = cache / f"models--{name.replace('/', '--')}"
    try:
        return model / "snapshots" / (model / "refs" / "main").read_text().strip()
    except OSError:
        return None


def _weights(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Return the files of weights, and those that the index names and that are not there."""
    index = _json(folder / "model.safetensors.index.json") or {}
    named = index.get("weight_map")
    if isinstance(named, dict) and named:
        files = [folder / str(name) for name in sorted(set(named.values()))]
        there = [path for path in files if path.is_file()]
        return there, tuple(path.name for path in files if not path.is_file())
    for pattern in _WEIGHTS:
        if files := sorted(path for path in folder.glob(pattern) if path.is_file()):
            return files, ()
    return [], ()


def _is_pointer(path: Path) -> bool:
    if path.stat().st_size > 1024:
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    return bool((_json(folder / "tokenizer_config.json") or {}).get("chat_template"))


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
