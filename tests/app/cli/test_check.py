from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from app.cli.check import check_config
from app.cli.main import main

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).parents[3] / "configs"
# Manifests for Kubernetes have theirs inside, and monitoring has none: tests/configs.
CONFIGS = sorted(
    path for path in FOLDER.rglob("*.yaml") if not {"kuberay", "monitoring"} & set(path.parts)
)
LOCAL = (FOLDER / "local.yaml").read_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_configs_that_are_shipped_are_right(path):
    assert check_config(path.read_text()) == []


def findings(old, new):
    assert old in LOCAL
    changed = LOCAL.replace(old, new, 1)
    found = check_config(changed)
    return [(changed.splitlines()[f.line - 1].strip(), str(f.problem)) for f in found]


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("slots: 8", "slots: none", "slots: none", "args.pools.0.slots"),
        ("slots: 8", "slot: 8", "slot: 8", "no such setting"),
        (
            "engine: vllm",
            "engine: vlm",
            "engine: vlm",
            "expected one of vllm, sglang, tensorrt_llm, simulated",
        ),
        ("max_model_len", "port", "port: 4096", "Frontline sets this itself"),
        ("auth: open", "auth: shut", "auth: shut", "got 'shut'"),
        ("host: 127.0.0.1", "host: 0.0.0.0", "auth: open", "open_to_network"),
        ("priority: auto", "priority: on", None, "user_config.tiers.priority"),
        ("- name: Model", "- name: Modell", "- name: Modell", "expected one of Model, vllm"),
        ("app.ingress:build", "app.ingres:build", None, "cannot be imported"),
        ("input: 0.02", "input: -0.02", None, "rate_card.input"),
        ("input: 0.02", "cached_input: 0.02", None, "rate_card.input: must be set"),
        ("      rate_card: {", "      # {", None, "a model has a rate_card: its prices, or"),
        (
            "      rate_card: {",
            "      adapter_rate_cards: {tuned: {free: true}}\n      rate_card: {",
            None,
            "adapter_rate_cards.tuned: the model has no adapter of this name",
        ),
        (
            "      rate_card: {",
            "      adapters: [{name: tuned, path: /x}]\n      rate_card: {",
            None,
            "user_config.adapters.0: no pool of the model has `adapter_room`",
        ),
        (
            "slots: 8",
            "adapters: [{name: 'a:b', path: /x}]\n      slots: 8",
            None,
            "args.pools.0.adapters.0.name",
        ),
        ("num_replicas: 1", "num_replicas: x", "- name: Ingress", "num_replicas"),
        ("applications:", "aplications: [", None, "not valid YAML"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(old, new, line, message):
    found = findings(old, new)
    assert any(message in text and line in (None, at) for at, text in found), found


SCALED = """
  autoscaling_policy: {policy_function: "app.autoscaling:priority_aware"ARGUMENTS}
  deployments:
  - name: Model
    user_config:
      rate_card: {free: true}
      scaling: {SCALING}
  - name: vllm
    autoscaling_config: {max_replicas: 2, CONFIG}
"""
NO_DELAYS = "upscale_delay_s: 0, downscale_delay_s: 0"


@pytest.mark.parametrize(
    ("arguments", "scaling", "config", "message"),
    [
        ("", "default_wait_s: 10", NO_DELAYS, None),
        ("", "default_wait_s: 0", NO_DELAYS, "greater than 0"),
        ("", "default_wait: 5", NO_DELAYS, "no such setting"),
        (", policy_kwargs: {default_wait_s: 10}", "", NO_DELAYS, "set `scaling`"),
        ("", "", "upscale_delay_s: 0", "downscale_delay_s: must be set"),
        ("", "", "downscale_delay_s: 0", "Serve would add 30 s"),
    ],
)
def test_what_autoscaling_is_told(arguments, scaling, config, message):
    text = SCALED.replace("ARGUMENTS", arguments)
    text = text.replace("SCALING", scaling).replace("CONFIG", config)
    start = LOCAL.index("  deployments:\n  - name: Model")
    changed = LOCAL[:start] + text.lstrip("\n") + LOCAL[LOCAL.index("\n- name: minilm") :]
    found = [str(finding.problem) for finding in check_config(changed)]
    assert found == [] if message is None else message in found[0], found


def test_a_policy_without_a_pool_to_scale_is_a_mistake():
    policy = "  autoscaling_policy: {policy_function: 'app.autoscaling:priority_aware'}\n"
    start = LOCAL.index("  deployments:\n  - name: Model")
    [found] = check_config(LOCAL[:start] + policy + LOCAL[start:])
    assert "nothing to scale" in str(found.problem)


def spanning(pool="vllm", **deployment):
    """The findings in a model whose engine runs on two nodes."""
    pools = [{"name": "wide", "engine": pool, "model": "m", "nodes": 2}]
    deployments = [{"name": "wide", **deployment}] if deployment else []
    deployments.append({"name": "Model", "user_config": {"rate_card": {"free": True}}})
    application = {
        "name": "wide",
        "route_prefix": None,
        "import_path": "deployments.model:build",
        "args": {"id": "wide", "pools": pools},
        "deployments": deployments,
    }
    found = check_config(yaml.safe_dump({"applications": [application]}))
    return [str(finding.problem).removeprefix("applications.0.") for finding in found]


def test_an_engine_on_two_nodes_has_resources_reserved_on_both():
    bundles, strategy = [{"GPU": 8}, {"GPU": 8}], "STRICT_SPREAD"
    reserved = {"placement_group_bundles": bundles, "placement_group_strategy": strategy}
    assert not spanning(**reserved) and not spanning("sglang", **reserved)
    assert spanning("tensorrt_llm", **reserved) == [
        "args.pools.0.nodes: tensorrt_llm runs on one node only"
    ]
    (missing,) = spanning()
    assert missing.startswith("args.pools.0.nodes: needs a deployment 'wide'")
    bundles.pop()
    (few,) = spanning(**reserved)
    assert few.startswith("deployments.0.placement_group_bundles: expected a bundle for each")
    (packed,) = spanning(placement_group_bundles=[{"GPU": 8}] * 2)
    assert packed.startswith("deployments.0.placement_group_strategy: expected STRICT_SPREAD")


def test_the_command_fails_and_says_where(tmp_path):
    config = tmp_path / "bad.yaml"
    config.write_text(LOCAL.replace("slots: 8", "slots: 0"))
    result = CliRunner().invoke(main, ["check", str(config)])
    assert result.exit_code == 1
    assert f"{config}:" in result.output and "slots" in result.output


def test_the_command_says_when_all_is_well(tmp_path):
    config = tmp_path / "good.yaml"
    config.write_text(LOCAL)
    result = CliRunner().invoke(main, ["check", str(config)])
    assert (result.exit_code, "ok" in result.output) == (0, True)
