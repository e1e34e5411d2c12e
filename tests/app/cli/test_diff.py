import copy
from pathlib import Path

import pytest
import yaml

from app.cli.diff import ABSENT, Difference, differences

pytestmark = pytest.mark.unit

LOCAL = yaml.safe_load((Path(__file__).parents[3] / "configs" / "local.yaml").read_text())


def details(config):
    """What Serve would tell of a config that is deployed."""
    return {
        "http_options": dict(config["http_options"]),
        "applications": {
            one["name"]: {"deployed_app_config": copy.deepcopy(one)}
            for one in config["applications"]
        },
    }


def test_what_is_deployed_differs_in_nothing():
    assert differences(LOCAL, details(LOCAL)) == []


def changed():
    config = copy.deepcopy(LOCAL)
    return config, {one["name"]: one for one in config["applications"]}


def test_each_key_is_named_by_the_names_on_the_way():
    config, applications = changed()
    config["http_options"]["port"] = 8001
    applications["ingress"]["deployments"][0]["user_config"]["auth"] = "keys"
    pool = applications["smollm2"]["args"]["pools"][0]
    pool["slots"] = 16
    del pool["engine_args"]["enforce_eager"]
    applications["smollm2"]["args"]["aliases"] = ["smol", "lm"]
    found = {one.key: (one.file, one.deployed) for one in differences(config, details(LOCAL))}
    assert found == {
        "http_options.port": (8001, 8000),
        "applications.ingress.deployments.Ingress.user_config.auth": ("keys", "open"),
        "applications.smollm2.args.pools.vllm.slots": (16, 8),
        "applications.smollm2.args.pools.vllm.engine_args.enforce_eager": (ABSENT, True),
        "applications.smollm2.args.aliases": (["smol", "lm"], ["smollm2"]),
    }


def test_an_application_on_one_side_only_is_named_in_one_line():
    config, _ = changed()
    config["applications"] = config["applications"][:-1]
    assert differences(config, details(LOCAL)) == [
        Difference("applications.minilm", ABSENT, "(set)")
    ]
    assert differences(LOCAL, details(config)) == [
        Difference("applications.minilm", "(set)", ABSENT)
    ]


def test_secrets_are_not_shown():
    config, applications = changed()
    ingress = applications["ingress"]["deployments"][0]["user_config"]
    ingress["ledger"] = "postgresql://frontline:s3cr3t@db/frontline"
    pool = applications["smollm2"]["args"]["pools"][0]
    pool["environment"] = {**pool["environment"], "HF_TOKEN": "s3cr3t"}
    found = differences(config, details(LOCAL))
    assert len(found) == 2
    assert "s3cr3t" not in repr(found) and "db/frontline" in repr(found)
