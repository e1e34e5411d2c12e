"""Facts are gathered from files and programs; a program that misbehaves is a fact, too."""

import json
import sys
import time
from pathlib import Path

import pytest

from app.config.model import PoolSettings
from app.contracts.findings import Level
from deployments.engines.registry import adapter_named
from deployments.hosting.launch import examine_launch
from deployments.preflight import gather
from deployments.preflight.gather import (
    gather_environment,
    gather_host,
    gather_model,
    read_gpus,
)

pytestmark = pytest.mark.unit

TABLE = """\
0, GPU-aaaa-1, NVIDIA H100 80GB HBM3, 81559, 80994, 580.95.05
1, GPU-bbbb-2, NVIDIA H100 80GB HBM3, 81559, 1024, 580.95.05
"""
HEADER = "| NVIDIA-SMI 580.95.05   Driver Version: 580.95.05   CUDA Version: 13.0 |"


def program(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def smi(folder, table=TABLE, header=HEADER):
    (folder / "table").write_text(table)
    program(
        folder, "nvidia-smi",
        f'case "$1" in --query*) cat {folder}/table ;; *) echo "{header}" ;; esac',
    )  # fmt: skip
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def test_gpus_driver_and_cuda_are_read_from_nvidia_smi(tmp_path):
    host = gather_host(smi(tmp_path), look_for_gpus=True)
    assert (host.driver, host.cuda, host.gpu_problem) == ("580.95.05", (13, 0), "")
    assert [(gpu.name, gpu.free >> 20) for gpu in host.gpus] == [
        ("NVIDIA H100 80GB HBM3", 80994), ("NVIDIA H100 80GB HBM3", 1024),
    ]  # fmt: skip
    assert host.shared_memory and host.memory and host.disks


@pytest.mark.parametrize(
    ("visible", "free"),
    [(None, [80994, 1024]), ("1", [1024]), ("GPU-bbbb", [1024]), ("1,0", [80994, 1024]), ("", [])],
)
def test_only_gpus_that_ray_shows_the_replica_count(visible, free):
    gpus, driver = read_gpus(TABLE, visible)
    assert [gpu.free >> 20 for gpu in gpus] == free and driver == "580.95.05"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "there is no nvidia-smi"),
        ('echo "NVIDIA-SMI has failed"; exit 9', "ends with status 9 (NVIDIA-SMI has failed)"),
        ("echo something else", "prints no table"),
        ("exec sleep 60", "does not answer"),
        ("true", "shows none that is visible"),
    ],
)
def test_a_driver_that_is_missing_broken_or_hangs_is_a_fact(tmp_path, monkeypatch, script, said):
    monkeypatch.setattr(gather, "PROBE_S", 0.5)
    if script:
        program(tmp_path, "nvidia-smi", script)
    began = time.monotonic()
    host = gather_host({"PATH": f"{tmp_path}:/usr/bin:/bin"}, look_for_gpus=True)
    assert said in host.gpu_problem and not host.gpus
    assert time.monotonic() - began < 5


def needs(engine="vllm"):
    pool = PoolSettings(name=engine, engine=engine, model="m")
    from deployments.hosting.launch import make_launch

    launch = make_launch("org/m", pool, host="127.0.0.1", port=0)
    return adapter_named(engine).needs(launch, {})


def package(folder, name, version, text=""):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise ImportError('imported')")
    if text:
        (folder / name / "version.py").write_text(text)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_an_interpreter_says_what_it_has_without_importing_it(tmp_path):
    package(tmp_path, "vllm", "0.33.1")
    package(tmp_path, "torch", "2.13.0", "cuda: Optional[str] = '13.0'\nhip = None\n")
    facts = gather_environment(sys.executable, needs(), {"PYTHONPATH": str(tmp_path)})
    assert (facts.problem, facts.has_module, facts.version) == ("", True, "0.33.1")
    assert (facts.torch, facts.torch_cuda) == ("2.13.0", "13.0")
    assert not facts.exports_spans
    for kind in ("grpc", "http"):
        package(tmp_path, f"opentelemetry_exporter_otlp_proto_{kind}", "1.45.2")
    facts = gather_environment(sys.executable, needs(), {"PYTHONPATH": str(tmp_path)})
    assert facts.exports_spans
    bare = gather_environment(sys.executable, needs(), {})
    assert (bare.has_module, bare.version) == (False, "")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "No such file"),
        ("exit 3", "status 3"),
        ("echo hello", "is no Python"),
        ("exec sleep 60", "does not answer"),
    ],
)
def test_an_interpreter_that_is_none_is_a_fact(tmp_path, monkeypatch, script, said):
    monkeypatch.setattr(gather, "PROBE_S", 0.5)
    python = tmp_path / "python"
    if script:
        program(tmp_path, "python", script)
    assert said in gather_environment(str(python), needs(), {"PATH": "/usr/bin:/bin"}).problem


@pytest.fixture
def folder(tmp_path):
    """A complete model."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    shards = {f"layer.{at}": f"model-{at}.safetensors" for at in (1, 2)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for shard in shards.values():
        (path / shard).write_bytes(b"\0" * 3000)
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return path


def test_what_is_on_disk_of_a_model(folder):
    model = gather_model(str(folder), {})
    assert (model.folder, model.weights, model.missing) == (str(folder), 6000, ())
    assert model.tokenizer and model.chat_template and model.config
    (folder / "model-2.safetensors").unlink()
    (folder / "model-1.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text("no JSON")
    (folder / "config.json").write_text("[]")
    model = gather_model(str(folder), {})
    assert model.missing == ("model-2.safetensors",)
    assert model.pointers == ("model-1.safetensors",)
    assert (model.tokenizer, model.chat_template, model.config) == (False, False, None)


def test_a_single_file_is_a_model(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"\0" * 10)
    assert gather_model(str(tmp_path / "m.gguf"), {}).weights == 10


def test_a_name_is_looked_up_in_the_hubs_cache_wherever_that_is(folder, tmp_path):
    at = tmp_path / "hub" / "models--org--m"
    (at / "refs").mkdir(parents=True)
    (at / "refs" / "main").write_text("abc")
    (at / "snapshots").mkdir()
    folder.rename(at / "snapshots" / "abc")
    for environment in ({"HF_HUB_CACHE": str(tmp_path / "hub")}, {"HF_HOME": str(tmp_path)}):
        assert gather_model("org/m", environment).weights == 6000
    absent = gather_model("org/other", {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert (absent.folder, absent.is_path, absent.offline) == ("", False, True)
    assert gather_model("/no/such/folder", {}).is_path


@pytest.mark.parametrize(
    ("settings", "levels"),
    [
        ({"engine": "simulated", "model": "m"}, set()),
        ({"engine": "vllm", "model": "${NOT_SET_ANYWHERE}/m"}, {Level.ERROR}),
    ],
)
def test_a_pool_is_examined_as_its_replica_would_start_it(settings, levels):
    pool = PoolSettings(name="pool", **settings)
    found = examine_launch("org/m", pool, 0.0)
    assert {finding.level for finding in found.findings} == levels


def test_an_environment_that_cannot_send_spans_is_warned_of_where_it_should(tmp_path):
    """Its engine is started without them: with the arguments for it, it would not start."""
    package(tmp_path, "vllm", "0.33.1")

    def examined(**traces):
        environment = {"PYTHONPATH": str(tmp_path), **traces}
        pool = PoolSettings(
            name="p", engine="vllm", model="m", python=sys.executable, environment=environment
        )
        found = examine_launch("org/m", pool, 0.0)
        return found.exports_spans, any("OpenTelemetry" in one.what for one in found.findings)

    assert examined() == (False, False)
    assert examined(OTEL_TRACES_EXPORTER="otlp") == (False, True)
    for kind in ("grpc", "http"):
        package(tmp_path, f"opentelemetry_exporter_otlp_proto_{kind}", "1.45.2")
    assert examined(OTEL_TRACES_EXPORTER="otlp") == (True, False)


def test_a_gpu_host_is_examined_whole(folder, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name, value in smi(tmp_path / "bin").items():
        monkeypatch.setenv(name, value)
    package(tmp_path / "site", "vllm", "0.33.1")
    package(tmp_path / "site", "torch", "2.13.0", "cuda: Optional[str] = '13.0'\n")
    environment = {"PYTHONPATH": str(tmp_path / "site"), "CUDA_VISIBLE_DEVICES": "0"}
    pool = PoolSettings(
        name="pool", engine="vllm", model=str(folder), python=str(Path(sys.executable)),
        environment=environment,
    )  # fmt: skip
    found = examine_launch("org/m", pool, 1.0)
    assert found.gpus_here == 1
    assert all(one.level is not Level.ERROR for one in found.findings), found.findings
    taken = pool.model_copy(update={"environment": {**environment, "CUDA_VISIBLE_DEVICES": "1"}})
    [error] = [
        one for one in examine_launch("org/m", taken, 1.0).findings if one.level is Level.ERROR
    ]
    assert "has 1.0 GiB of 79.6 GiB free" in error.what
