"""Every line that ``frontline doctor CONFIG`` can say of a pool, from made-up facts."""

from dataclasses import replace

import pytest

from app.config.model import PoolSettings
from app.contracts.findings import Level
from app.contracts.start import StartProblem
from deployments.engines.base import Launch
from deployments.engines.needs import TriedVersions
from deployments.engines.registry import adapter_named
from deployments.preflight.checks import CUDA_DRIVERS, Subject, estimate, examine
from deployments.preflight.facts import (
    GIB,
    AdapterFacts,
    EnvironmentFacts,
    Facts,
    Gpu,
    HostFacts,
    ModelFacts,
    Space,
)

pytestmark = pytest.mark.unit

QWEN_8B = {
    "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 36, "hidden_size": 4096,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "torch_dtype": "bfloat16", "max_position_embeddings": 40960,
}  # fmt: skip
WEIGHTS = 16_381_470_720
H100 = Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, 81000 << 20)
L4 = Gpu("NVIDIA L4", 23034 << 20, 22500 << 20)
ROOMY = Space("/", 500 * GIB, 400 * GIB)
HOST = HostFacts(
    gpus=(H100,), driver="580.95", cuda=(13, 0), glibc=(2, 39),
    shared_memory=Space("/dev/shm", 16 * GIB, 16 * GIB), disks=(ROOMY,), memory=100 * GIB,
)  # fmt: skip
MODEL = ModelFacts("/models/qwen3-8b", "/models/qwen3-8b", config=QWEN_8B, weights=WEIGHTS)
VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23", "tensorrt_llm": "1.3.0rc26"}


def subject(engine="vllm", gpus=1.0, args=None, environment=None, **settings):
    given = {"max_model_len": 32768} if engine == "vllm" else {}
    pool = PoolSettings(
        name=engine, engine=engine, model="/models/qwen3-8b", engine_args={**given, **(args or {})},
        environment=environment or {}, **settings,
    )  # fmt: skip
    launch = Launch(
        pool.model,
        "org/m",
        "127.0.0.1",
        0,
        pool.most_slots,
        "key",
        "/env/bin/python",
        pool.engine_args,
    )
    return Subject(pool, adapter_named(engine).needs(launch, pool.environment), gpus)


def environment(engine="vllm", **changes):
    facts = EnvironmentFacts(
        "/env/bin/python", version=VERSIONS[engine], torch="2.13.0", torch_cuda="13.0"
    )
    return replace(facts, **changes)


READY = environment()


def found(subject, host=HOST, environment=READY, model=MODEL, adapters=()):
    return examine(subject, Facts(host, environment, model, adapters))


def words(findings):
    return "\n".join(map(str, findings))


def only(findings):
    """The one finding that is not well."""
    [one] = [one for one in findings if one.level is not Level.OK]
    assert one.what and one.why and one.fix, "what, why it matters, the fix"
    assert "\n" not in str(one)
    assert (one.level is Level.ERROR) == (one.problem is not None)
    return one


@pytest.mark.parametrize("engine", VERSIONS)
def test_where_all_is_well_it_says_what_it_saw(engine):
    findings = found(subject(engine), environment=environment(engine))
    assert {one.level for one in findings} == {Level.OK}
    text = "\n".join(map(str, findings))
    assert VERSIONS[engine] in text and "driver 580.95, CUDA 13.0" in text
    assert "15.3 GiB of weights" in text and "slots is 8" in text


ERRORS = {
    "no interpreter": (
        {"environment": environment(problem="cannot be run (No such file or directory)")},
        StartProblem.CANNOT_RUN, "No such file", "scripts/setup vllm",
    ),
    "no module": (
        {"environment": environment(has_module=False, version="")},
        StartProblem.MISSING_MODULE, "has no module vllm", "scripts/setup vllm",
    ),
    "no driver": (
        {"host": replace(HOST, gpus=(), gpu_problem="there is no nvidia-smi")},
        StartProblem.NO_GPU, "there is no nvidia-smi", "install the driver",
    ),
    "driver too old": (
        {"host": replace(HOST, driver="550.1", cuda=(12, 4))},
        StartProblem.NO_GPU, "driver 550.1, CUDA 12.4", f"driver {CUDA_DRIVERS[13]}",
    ),
    "torch for CPUs": (
        {"environment": environment(torch="2.13.0+cpu", torch_cuda="")},
        StartProblem.NO_GPU, "a build for CPUs", "environment of its own",
    ),
    "no folder": (
        {"model": ModelFacts("/models/nothing")},
        StartProblem.MISSING_MODEL, "no folder /models/nothing", "`model` of the pool",
    ),
    "not cached, offline": (
        {"model": ModelFacts("org/m", is_path=False, offline=True, cache="/cache/hub")},
        StartProblem.MISSING_MODEL, "org/m is not in /cache/hub", "HF_HUB_OFFLINE",
    ),
    "no adapter": (
        {"adapters": (AdapterFacts("/loras/a", exists=False),)},
        StartProblem.MISSING_MODEL, "no folder /loras/a", "`adapters` of the pool",
    ),
    "no config of an adapter": (
        {"adapters": (AdapterFacts("/loras/a", config=False),)},
        StartProblem.MISSING_MODEL, "/loras/a has no adapter_config.json", "`adapters`",
    ),
    "no weights of an adapter": (
        {"adapters": (AdapterFacts("/loras/a", weights=False),)},
        StartProblem.MISSING_MODEL, "/loras/a has no adapter_model file", "`adapters`",
    ),
    "no config": (
        {"model": replace(MODEL, config=None)},
        StartProblem.MISSING_MODEL, "no readable config.json", "download it again",
    ),
    "no weights": (
        {"model": replace(MODEL, weights=0)},
        StartProblem.MISSING_MODEL, "has no weights", "download it again",
    ),
    "half a download": (
        {"model": replace(MODEL, missing=("model-00002-of-00005.safetensors",))},
        StartProblem.MISSING_MODEL, "1 files of weights are missing", "download it again",
    ),
    "pointers": (
        {"model": replace(MODEL, weights=134, pointers=("model.safetensors",))},
        StartProblem.MISSING_MODEL, "pointer of Git LFS", "git lfs pull",
    ),
    "no tokenizer": (
        {"model": replace(MODEL, tokenizer=False)},
        StartProblem.MISSING_MODEL, "has no tokenizer", "download it again",
    ),
    "KV cache too small": (
        {"host": replace(HOST, gpus=(L4,))},
        StartProblem.OUT_OF_MEMORY, "0 requests of all 32,768", "max_model_len of at most",
    ),
    "weights too large": (
        {"model": replace(MODEL, weights=80 * GIB)},
        StartProblem.OUT_OF_MEMORY, "nothing is left for the KV cache", "quantized",
    ),
    "GPU is taken": (
        {"host": replace(HOST, gpus=(replace(H100, free=GIB),))},
        StartProblem.OUT_OF_MEMORY, "has 1.0 GiB of 79.6 GiB free", "nvidia-smi",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_keeps_an_engine_from_starting_is_an_error(name):
    facts, problem, what, fix = ERRORS[name]
    one = only(found(subject(), **facts))
    assert (one.level, one.problem) == (Level.ERROR, problem)
    assert what in f"{one.what}: {one.why}" and fix in one.fix


def test_a_c_library_that_is_too_old_for_the_engines_package():
    old = replace(HOST, glibc=(2, 31))
    one = only(found(subject("sglang"), old, environment("sglang")))
    assert one.problem is StartProblem.CANNOT_RUN and "glibc 2.31" in one.what
    assert "2.34" in one.why


@pytest.mark.parametrize(
    ("given", "host", "what"),
    [
        (subject(gpus=2, args={"tensor_parallel_size": 2}), HOST, "1 GPUs here"),
        (
            subject(gpus=1, args={"tensor_parallel_size": 2}),
            replace(HOST, gpus=(H100, H100)),
            "runs on 2 GPUs of a node, Ray reserves 1",
        ),
        (
            subject(gpus=2, nodes=2, args={"tensor_parallel_size": 2}),
            replace(HOST, gpus=(H100, H100)),
            "runs on 1 GPUs of a node, Ray reserves 2",
        ),
    ],
)
def test_gpus_that_do_not_add_up_are_an_error(given, host, what):
    one = only(found(given, host))
    assert one.problem is StartProblem.NO_GPU and what in one.what


def test_shared_memory_of_a_container_is_an_error_for_several_gpus_and_else_a_warning():
    small = replace(HOST, gpus=(H100, H100), shared_memory=Space("/dev/shm", 64 << 20, 64 << 20))
    one = only(found(subject(gpus=2, args={"tensor_parallel_size": 2}), small))
    assert one.level is Level.ERROR and "--shm-size" in one.fix
    assert only(found(subject(), replace(small, shared_memory=None))).level is Level.WARNING


CPU = {"VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.mark.parametrize(
    ("given", "facts", "what"),
    [
        (subject(), {"environment": environment(version="0.34.0")}, "0.34.0 was not tried"),
        (subject(), {"environment": environment(version="0.31.9")}, "0.31.9 was not tried"),
        (subject(), {"environment": environment(version="")}, "does not say its version"),
        (subject(gpus=0), {"host": replace(HOST, gpus=())}, "Ray reserves no GPU"),
        (subject(gpus=0.5), {}, "each takes 92% of it"),
        (subject(slots=500), {}, "slots is 500"),
        (subject(), {"model": replace(MODEL, chat_template=False)}, "no chat template"),
        (
            subject(),
            {"model": ModelFacts("org/m", is_path=False, cache="/cache/hub")},
            "org/m is not in /cache/hub",
        ),
        (
            subject(),
            {"host": replace(HOST, disks=(Space("/tmp", 500 * GIB, 20 * GIB),))},
            "/tmp has 20.0 GiB of 500.0 GiB free",
        ),
    ],
)
def test_what_may_go_wrong_is_a_warning(given, facts, what):
    one = only(found(given, **facts))
    assert one.level is Level.WARNING and what in one.what


def test_an_engine_on_the_cpu_is_measured_by_main_memory_and_its_cache():
    cpu = environment(torch="2.13.0+cpu", torch_cuda="")
    given = subject(gpus=0, environment=CPU, args={"max_model_len": 4096})
    host = replace(HOST, gpus=(), memory=32 * GIB)
    findings = found(given, host, cpu)
    assert {one.level for one in findings} == {Level.WARNING, Level.OK}
    assert "holds 7,281 tokens: 1 requests of all 4,096" in only(findings).what
    one = only(found(subject(gpus=0), replace(host, memory=GIB), cpu))
    assert one.problem is StartProblem.OUT_OF_MEMORY and "1.0 GiB of memory available" in one.what


def test_versions_are_compared_by_their_numbers():
    tried = TriedVersions("0.32", "0.34")
    for version in ("0.32", "0.32.0", "0.33.1.dev3+gabc", "0.33.9rc1"):
        assert version in tried
    for version in ("0.34", "0.34.0rc1", "0.4.0", "1.0", "0.31.2", "unknown"):
        assert version not in tried


def test_slots_auto_is_said_with_about_what_it_takes():
    assert "slots: auto takes about 199" in words(found(subject(slots="auto")))
    tiny = replace(MODEL, weights=1 << 30, config={**QWEN_8B, "num_hidden_layers": 4})
    assert "slots: auto takes about 256" in words(found(subject(slots="auto"), model=tiny))


def test_what_fits_is_computed_only_where_enough_is_known():
    fits = estimate(subject(), HOST, MODEL)
    assert fits is not None and fits.usual == 199
    for host, model in (
        (replace(HOST, gpus=()), MODEL),
        (HOST, replace(MODEL, config=None)),
        (HOST, replace(MODEL, missing=("model-2.safetensors",))),
        (HOST, replace(MODEL, weights=90 * GIB)),
    ):
        assert estimate(subject(), host, model) is None
