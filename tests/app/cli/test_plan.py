import json
import math
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli.main import main
from app.cli.plan import Replicas, make_plan, plan_front
from app.cli.plan_view import to_text
from app.config.model import MOST_AUTO_SLOTS
from app.config.redaction import redact
from app.core.dialect import Route
from app.haproxy.config import served_of

pytestmark = pytest.mark.unit

CONFIGS = Path(__file__).parents[3] / "configs"
GPU = sorted((CONFIGS / "gpu").glob("*.yaml"))
CLUSTER = CONFIGS / "cluster.yaml"
SEVERAL_NODES = (CONFIGS / "gpu" / "several-nodes.yaml").read_text()
THREE = (CONFIGS / "gpu" / "three-engines.yaml").read_text()


def plan(*options):
    return CliRunner().invoke(main, ["plan", *map(str, options)])


def pools(text):
    return {pool.name: pool for model in make_plan(text) for pool in model.pools}


@pytest.mark.parametrize("path", GPU, ids=lambda path: path.stem)
def test_the_gpu_configs_show_what_they_would_start(path):
    shown = plan(path)
    assert shown.exit_code == 0, shown.output
    for pool in pools(path.read_text()).values():
        # As many GPUs as the engine is told to use, on its nodes together.
        parallel = re.findall(
            r"--(?:tensor-parallel|pipeline-parallel|tp)[-_]size (\d+)",
            " ".join(pool.launch.command),
        )
        nodes = 1 + len(pool.launch.ranks)
        assert pool.ray["num_gpus"] * nodes == math.prod(map(int, parallel))
        assert pool.priority.startswith("delivered on chat/completions")
        assert "CUDA_VISIBLE_DEVICES" not in pool.launch.environment


def test_it_is_told_where_each_pool_may_stand():
    found = pools(THREE)
    assert found["vllm"].ray == {"num_cpus": 1, "num_gpus": 1, "resources": {"engine_vllm": 1}}
    assert found["sglang"].ray["label_selector"] == {"frontline/engine": "sglang"}


@pytest.mark.parametrize("path", [CLUSTER, *GPU], ids=lambda path: path.stem)
def test_it_is_told_what_other_nodes_reach(path):
    shown = plan(path).output
    for pool in pools(path.read_text()).values():
        guard, *others = pool.launch.opens
        assert (guard.name, guard.method, guard.port) == ("guard", "POST", 0)
        assert set(guard.paths) == {route.path for route in Route}
        assert "unless that is 127.0.0.1" in guard.where and "key" in guard.lets_in
        # Two parts of an engine have to meet somewhere; one has nobody to meet.
        assert [port.name for port in others] == ["meeting place"] * bool(pool.launch.ranks)
        # The engine itself is on loopback.
        command = pool.launch.command
        assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "guard          port 0 of the node's address" in shown
    assert f"POST {', '.join(guard.paths)}" in shown
    assert ("meeting place  port 0 of NODE_0" in shown) is bool(others)


@pytest.mark.parametrize(
    ("name", "own", "common"),
    [
        ("vllm", ["--node-rank"], ["--nnodes", "--master-addr", "--master-port"]),
        ("sglang", ["--node-rank"], ["--nnodes", "--dist-init-addr"]),
    ],
)
def test_every_part_of_an_engine_on_several_nodes_has_its_command(name, own, common):
    launch = pools(SEVERAL_NODES)[name].launch
    [part] = launch.ranks

    def value(command, flag):
        return command[command.index(flag) + 1]

    assert [
        [value(command, flag) for flag in own] for command in (launch.command, part.command)
    ] == [
        ["0"],
        ["1"],
    ]
    for flag in common:
        assert value(part.command, flag) == value(launch.command, flag)
    assert value(part.command, "--nnodes") == "2"
    assert any(word.startswith("NODE_0") for word in part.command)
    assert part.log != launch.log and ".rank1-" in part.log
    # Which address is whose.
    assert part.environment == launch.environment | (
        {"VLLM_HOST_IP": "NODE_1"} if name == "vllm" else {}
    )


def test_the_parts_are_shown_with_their_commands():
    shown = to_text(make_plan(SEVERAL_NODES))
    assert shown.count("part 1         on NODE_1") == 2
    assert shown.count("--node-rank 1") == shown.count("--node-rank 0") == 2
    assert "-m frontline_vllm_headless serve" in shown and "VLLM_HOST_IP=NODE_1" in shown
    three = SEVERAL_NODES.replace("nodes: 2", "nodes: 3")
    assert [part.rank for part in pools(three)["vllm"].launch.ranks] == [1, 2]


def test_the_command_is_the_one_that_the_adapter_makes():
    found = pools(THREE)["tensorrt-llm"].launch
    server = found.command[found.command.index("--") + 1 :]
    assert server[:3] == ("/models/qwen3-8b", "--max_batch_size", "64")
    assert found.log.endswith("/Qwen-Qwen3-8B.tensorrt-llm-*.log")
    file = json.loads(found.files["--extra_llm_api_options"])
    assert file["scheduler_config"] == {"waiting_queue_policy": "priority"}
    assert file["kv_cache_config"]["enable_block_reuse"] is True


@pytest.mark.parametrize(
    ("setting", "replicas"),
    [
        ("num_replicas: 3", Replicas(3, 3)),
        ("num_replicas: auto", Replicas(1, 100)),
        ("autoscaling_config: {min_replicas: 0, max_replicas: 7}", Replicas(0, 7)),
        ("max_replicas_per_node: 1", Replicas(1, 1)),
    ],
)
def test_how_many_replicas_there_are_to_be(setting, replicas):
    changed = THREE.replace("- name: vllm\n    num_replicas: 1", f"- name: vllm\n    {setting}")
    assert changed != THREE
    assert pools(changed)["vllm"].replicas == replicas


@pytest.mark.parametrize(
    ("old", "new", "pool", "words"),
    [
        ("priority: auto", 'priority: "off"', "vllm", "does not offer it"),
        ("priority: auto", "priority: queue", "vllm", "by the queue alone"),
        ("max_model_len: 32768", "scheduling_policy: fcfs", "vllm", "without native priority"),
        ("context_length: 32768", "enable_priority_scheduling: false", "sglang", "without native"),
        (
            "kv_cache_config: {free_gpu_memory_fraction: 0.85, enable_block_reuse: true}",
            "scheduler_config: {waiting_queue_policy: fcfs}",
            "tensorrt-llm",
            "without native",
        ),
    ],
)
def test_what_becomes_of_priority(old, new, pool, words):
    assert old in THREE
    assert words in pools(THREE.replace(old, new))[pool].priority


def test_secrets_are_not_shown():
    pool = "      slots: 64"
    hidden = "      environment: {HF_TOKEN: s3cr3t, PLAIN: seen}\n" + pool
    argument = "max_model_len: 32768\n        hf_token: s3cr3t"
    config = "enable_chunked_prefill: true\n          internal_request_auth_key: s3cr3t"
    changed = THREE.replace(pool, hidden).replace("max_model_len: 32768", argument)
    models = make_plan(
        changed.replace(
            "kv_cache_config: {free_gpu_memory_fraction: 0.85, enable_block_reuse: true}", config
        )
    )
    shown = to_text(models)
    assert "s3cr3t" not in shown and "PLAIN=seen" in shown
    assert "FRONTLINE_ENGINE_KEY='(not shown)'" in shown


def test_secrets_of_further_parts_are_not_shown_either():
    hidden = SEVERAL_NODES.replace(
        "        max_model_len: 65536",
        "        hf_token: s3cr3t\n      environment: {HF_TOKEN: s3cr3t}",
    )
    [part] = pools(hidden)["vllm"].launch.ranks
    assert "--hf-token" in part.command and "HF_TOKEN" in part.environment
    assert "s3cr3t" not in to_text(make_plan(hidden))
    assert part.environment == redact(part.environment)


def test_a_path_that_only_the_node_knows_stays_as_it_is():
    changed = THREE.replace("model: /models/qwen3-8b", "model: ${NODES_MODELS}/qwen3-8b", 1)
    assert "${NODES_MODELS}/qwen3-8b" in pools(changed)["vllm"].launch.command


def test_it_is_shown_as_json_too():
    shown = json.loads(plan(CONFIGS / "gpu" / "vllm.yaml", "--json").output)
    [model] = shown["models"]
    [pool] = model["pools"]
    assert (model["id"], pool["replicas"]) == ("Qwen/Qwen3-8B", {"least": 1, "most": 1})
    assert pool["launch"]["command"][1:3] == ["-m", "frontline_vllm_start"]


def test_what_is_wrong_is_told_with_its_line(tmp_path):
    config = tmp_path / "bad.yaml"
    config.write_text(THREE.replace("max_model_len", "port"))
    line = next(n for n, text in enumerate(THREE.splitlines(), 1) if "max_model_len" in text)
    shown = plan(config)
    assert shown.exit_code == 1
    assert f"{config}:{line}: applications.1.args.pools.0.engine_args.port" in shown.output


def front(text, maxconn_here=4096):
    return plan_front(text, make_plan(text), maxconn_here)


def test_haproxy_must_hold_what_runs_and_what_waits():
    # Of a model: its slots, 32 times as many that wait, and what is reserved for each tier.
    text = CLUSTER.read_text()
    slots = sum(pool.slots * pool.replicas.most for pool in pools(text).values())
    found = front(text)
    assert 33 * slots <= found.requests < 40 * slots + 400
    assert served_of(found.maxconn) >= found.requests
    assert found.descriptors > 2 * found.maxconn


def test_slots_that_fit_are_counted_at_their_most():
    text = CLUSTER.read_text().replace("slots: 8", "slots: auto", 1)
    assert "slots: auto" in text
    [auto] = [pool for pool in pools(text).values() if pool.slots_auto]
    assert auto.slots == MOST_AUTO_SLOTS
    assert f"slots that fit (at most {MOST_AUTO_SLOTS})" in to_text(make_plan(text))
    assert front(text).requests > front(CLUSTER.read_text()).requests


def test_a_line_that_its_operator_bounds_asks_for_less():
    tiers = "tiers: {priority: auto, flex: true}"
    bound = {tier: {"max_waiting": 10} for tier in ("priority", "default", "flex")}
    bounded = THREE.replace(tiers, f"{tiers}\n      queue: {json.dumps(bound)}")
    assert bounded != THREE
    assert front(bounded).requests < front(THREE).requests / 5


def test_too_low_a_maxconn_is_told(monkeypatch):
    monkeypatch.setenv("RAY_SERVE_HAPROXY_MAXCONN", "10")
    assert "it is 10 here, which is too low" in plan(CLUSTER).output
    monkeypatch.setenv("RAY_SERVE_HAPROXY_MAXCONN", "32768")
    assert "too low" not in plan(CLUSTER).output
    assert json.loads(plan("--json", CLUSTER).output)["front"]["maxconn_here"] == 32768


@pytest.mark.parametrize("value", ["many", "1e4", "-1", "0", "4096.5"])
def test_a_maxconn_that_is_no_number_is_named(monkeypatch, value):
    monkeypatch.setenv("RAY_SERVE_HAPROXY_MAXCONN", value)
    shown = plan(CLUSTER)
    assert (shown.exit_code, shown.stdout) == (1, "")
    problem = f"RAY_SERVE_HAPROXY_MAXCONN: expected a whole number of at least 1, not {value!r}"
    assert shown.stderr == f"frontline plan: {problem}\n"


def test_a_maxconn_that_is_not_set_is_not_made_up(monkeypatch):
    monkeypatch.delenv("RAY_SERVE_HAPROXY_MAXCONN", raising=False)
    shown = plan(CLUSTER).output
    assert "it is not set here (scripts/activate sets it)" in shown
    assert "4096" not in shown and "too low" not in shown
    assert json.loads(plan("--json", CLUSTER).output)["front"]["maxconn_here"] is None
