import copy
from pathlib import Path

import pytest
import yaml

from tests.serving import local_serve

LOCAL = Path(__file__).parents[2] / "configs" / "local.yaml"


@pytest.fixture(scope="session")
def local():
    """configs/local.yaml as it is, and its chat model once more without native priority."""
    with local_serve() as deployment:
        apps = yaml.safe_load(LOCAL.read_text())["applications"]
        deployment.deploy(*apps, _first_come_first_served(apps))
        deployment.wait_ready("smollm2", "all-minilm-l6-v2", "smollm2-fcfs", timeout_s=420)
        yield deployment


def _first_come_first_served(apps):
    [chat] = (copy.deepcopy(app) for app in apps if app["name"] == "smollm2")
    chat["name"] = "smollm2-fcfs"
    chat["args"] |= {"id": "smollm2-fcfs", "aliases": []}
    chat["args"]["pools"][0]["engine_args"]["scheduling_policy"] = "fcfs"
    return chat
