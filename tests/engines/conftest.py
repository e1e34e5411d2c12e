import copy
import json
from contextlib import closing, suppress
from pathlib import Path

import pytest
import yaml
from frontline_vllm_start import CHOICE

from app.core.paths import expand_path
from tests.engines.lora import ADAPTER, ADAPTER_PRICES, make_lora
from tests.engines.pools import SGLANG
from tests.engines.subjects import REAL, SIMULATED, checked_subject
from tests.support.cluster import LEDGER, ingress_app
from tests.support.collector import Collector

START_S, TOLD_EVERY_S = 1800, 20
"""How long the engine of scripts/gpu_check may take to start, and how often that is shown."""

LOCAL = Path(__file__).parents[2] / "configs" / "local.yaml"


def pytest_generate_tests(metafunc):
    """Run the tests that take a ``subject`` over all of them."""
    if "subject" in metafunc.fixturenames:
        file = metafunc.config.getoption("--contract-pool")
        subjects = (
            [pytest.param(checked_subject(Path(file)), id="checked")]
            if file
            else [
                *(
                    pytest.param(one, id=one.name, marks=pytest.mark.integration)
                    for one in SIMULATED
                ),
                *(pytest.param(one, id=one.name, marks=pytest.mark.engine) for one in REAL),
            ]
        )
        metafunc.parametrize("subject", subjects, scope="module")


def pytest_terminal_summary(terminalreporter, config):
    """Tell scripts/gpu_check's user what held and what did not."""
    if not config.getoption("--contract-pool"):
        return
    outcomes = {
        "passed": "held",
        "failed": "DID NOT HOLD",
        "error": "ERROR",
        "skipped": "not checked",
    }
    terminalreporter.section("contract")
    for outcome, words in outcomes.items():
        for report in terminalreporter.stats.get(outcome, []):
            name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
            why = report.longrepr[2].replace("Skipped", "") if outcome == "skipped" else ""
            terminalreporter.line(f"{words:13} {name.replace('[checked]', '')}{why}")
    counts = (f"{len(terminalreporter.stats.get(o, []))} {words}" for o, words in outcomes.items())
    terminalreporter.line(", ".join(counts))


@pytest.fixture(scope="session")
def collector():
    """Takes the spans of ingresses and engines whose clients' traces are sampled."""
    with closing(Collector()) as made:
        yield made


def _traced(collector):
    return collector.environment(
        OTEL_TRACES_SAMPLER="parentbased_always_off", OTEL_BSP_SCHEDULE_DELAY="200"
    )


@pytest.fixture
def local(cluster, tmp_path_factory, collector):
    """configs/local.yaml with the tests' ledger, and its chat model also without native priority.

    Its chat model has a LoRA adapter, and sends its spans to the collector. Without native
    priority, it has ``slots: auto``, and is started by `vllm serve`.

    Ready even if the test before has killed an engine. Whoever needs them last removes them: an
    engine takes memory, and a little of a core, also while nobody asks.
    """
    apps = yaml.safe_load(LOCAL.read_text())["applications"]
    _give_adapter(next(app for app in apps if app["name"] == "smollm2"), tmp_path_factory)
    [ingress] = (one for app in apps for one in app["deployments"] if one["name"] == "Ingress")
    ingress["user_config"] |= LEDGER
    ingress["ray_actor_options"]["runtime_env"] = {"env_vars": _traced(collector)}
    [chat] = (app for app in apps if app["name"] == "smollm2")
    [pool] = chat["args"]["pools"]
    pool["environment"] = pool["environment"] | _traced(collector)  # another pool has the same
    cluster.deploy(*apps, _first_come_first_served(apps))
    cluster.wait_ready("smollm2", "all-minilm-l6-v2", "smollm2-fcfs", timeout_s=500)
    return cluster


def _give_adapter(app, tmp_path_factory):
    """Load a LoRA adapter into a model's engine, at prices of its own."""
    [pool] = app["args"]["pools"]
    folder = tmp_path_factory.getbasetemp() / "adapter"
    make_lora(folder, expand_path(pool["model"]), expand_path(pool["python"]))
    pool["adapters"] = [{"name": ADAPTER, "path": str(folder)}]
    [model] = (one for one in app["deployments"] if one["name"] == "Model")
    model["user_config"]["adapter_rate_cards"] = {ADAPTER: ADAPTER_PRICES}


def _first_come_first_served(apps):
    [chat] = (copy.deepcopy(app) for app in apps if app["name"] == "smollm2")
    chat["name"] = "smollm2-fcfs"
    chat["args"] |= {"id": "smollm2-fcfs", "aliases": []}
    del chat["args"]["pools"][0]["adapters"]
    [model] = (one for one in chat["deployments"] if one["name"] == "Model")
    del model["user_config"]["adapter_rate_cards"]
    chat["args"]["pools"][0]["engine_args"]["scheduling_policy"] = "fcfs"
    chat["args"]["pools"][0]["slots"] = "auto"
    chat["args"]["pools"][0]["environment"][CHOICE] = "serve"
    return chat


@pytest.fixture
def sglang(cluster, collector):
    """The small chat model on SGLang, in the same way."""
    pool = {**SGLANG, "environment": SGLANG["environment"] | _traced(collector)}
    ingress = ingress_app()
    ingress["deployments"][0]["ray_actor_options"]["runtime_env"] = {"env_vars": _traced(collector)}
    app = {
        "name": "sglang",
        "route_prefix": None,
        "import_path": "deployments.model:build",
        "args": {"id": "test/sglang", "aliases": ["sglang"], "pools": [pool]},
        "deployments": [
            {"name": "Model", "user_config": {"rate_card": {"input": 1, "output": 2}}},
            {"name": "sglang", "num_replicas": 1, "ray_actor_options": {"num_cpus": 0.5}},
        ],
    }
    cluster.deploy(ingress, app)
    cluster.wait_ready("sglang", timeout_s=500)
    return cluster


@pytest.fixture(scope="module")
def simulations(cluster):
    """Every simulated subject, each a model of its own."""
    cluster.deploy(ingress_app(), *(subject.app() for subject in SIMULATED))
    cluster.wait_ready(*(subject.model for subject in SIMULATED))
    yield cluster
    for subject in SIMULATED:
        cluster.remove(subject.model)


def _reported(cluster, model):
    """What the engine says of itself, for the report of scripts/gpu_check."""
    [replica] = cluster.replicas(model)
    return {
        "version": replica.engine_version,
        "context length": replica.context_length,
        "preempts": replica.preempts,
        "native priority on": ", ".join(sorted(replica.dialect.priority_routes)) or "no route",
        "ready after, s": round(replica.start_s, 1),
    }


@pytest.fixture(scope="session")
def checked(cluster, request):
    """The one pool that scripts/gpu_check is about."""
    file = Path(request.config.getoption("--contract-pool"))
    subject = checked_subject(file)
    cluster.deploy(ingress_app(), subject.app())
    terminal = request.config.pluginmanager.getplugin("terminalreporter")
    for waited_s in range(0, START_S, TOLD_EVERY_S):
        terminal.write_line(f"the engine is starting: {waited_s} s")
        with suppress(AssertionError):
            cluster.wait_ready(subject.model, timeout_s=TOLD_EVERY_S)
            file.with_name("engine.json").write_text(json.dumps(_reported(cluster, subject.model)))
            return cluster
    raise AssertionError(f"the engine is not ready after {START_S} s")
