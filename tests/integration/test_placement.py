"""A model whose engine no node of the cluster offers, and `frontline status`, which says so."""

import json
import os
import subprocess
import sys

import openai
import pytest
import ray
import yaml
from ray import serve

from app.ray_compat.controller import serve_controller
from tests.support.cluster import eventually, simulated_app
from tests.support.waiting import PATIENCE_S

pytestmark = pytest.mark.integration


def state(frontline, app):
    """The model's state in the models list."""
    return (frontline.entry(app) or {}).get("metadata", {}).get("state")


@pytest.fixture(scope="module")
def nowhere(frontline):
    """One model that can be placed nowhere, beside the others."""
    nowhere = simulated_app("nowhere")
    nowhere["deployments"][1]["ray_actor_options"] = {"resources": {"engine_nowhere": 1}}
    frontline.deploy(nowhere)
    eventually(lambda: state(frontline, "nowhere") == "engine_not_offered")
    yield frontline
    frontline.remove("nowhere")


def test_an_engine_on_more_nodes_than_there_are_is_not_offered(frontline):
    wide = simulated_app("wide")
    wide["args"]["pools"][0]["nodes"] = 2
    wide["deployments"][1] |= {
        "placement_group_bundles": [{"CPU": 0.1}, {"CPU": 0.1}],
        "placement_group_strategy": "STRICT_SPREAD",
    }
    frontline.deploy(wide)
    eventually(lambda: state(frontline, "wide") == "engine_not_offered")
    assert frontline.snapshot("wide").missing == {"simulated": "2 such nodes"}
    # What is public does not have it: neither Serve's status, nor the options that it shows.
    pool = serve.status().applications["wide"].deployments["simulated"]
    assert (pool.status, pool.message) == ("UPDATING", "")
    details = ray.get(serve_controller().get_serve_instance_details.remote())
    options = details["applications"]["wide"]["deployments"]["simulated"]["deployment_config"]
    assert not options.get("placement_group_bundles")
    frontline.remove("wide")


def test_the_models_list_says_so(nowhere):
    entry = nowhere.entry("nowhere")
    assert entry["service_tiers"] == []
    assert nowhere.entry("native")["metadata"]["state"] == "ready"
    with nowhere.http() as http:
        states = http.get("/health").json()["models"]
    assert (states["test/nowhere"], states["test/native"]) == ("engine_not_offered", "ready")


def test_requests_are_told_why_at_once(nowhere):
    with pytest.raises(openai.InternalServerError) as refused:
        nowhere.client().chat.completions.create(
            model="nowhere", messages=[{"role": "user", "content": "hi"}], service_tier="priority"
        )
    answer = refused.value
    assert (answer.status_code, answer.code) == (503, "engine_not_offered")
    assert answer.response.headers["retry-after"] == "60"
    # What is missing is the operator's business.
    assert "engine_nowhere" not in answer.response.text
    [record] = eventually(lambda: nowhere.records(model="test/nowhere"))
    assert (record["state"], record["reason"]) == ("refused", "engine_not_offered")


def frontline_status(*options):
    """Run it in a terminal of its own, as its user does."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    address = ray.get_runtime_context().gcs_address
    ended = subprocess.run(
        [sys.executable, "-m", "app.cli", "status", "--address", address, *map(str, options)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def test_the_status_shows_what_is_missing_and_what_differs_from_a_file(nowhere, tmp_path):
    native = simulated_app("native", embedding_dimensions=16)
    native["deployments"][0]["user_config"] = {"rate_card": {"input": 3, "output": 2}}
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump({"applications": [native]}))
    status = json.loads(frontline_status("--json", "--config", file))

    [node] = status["nodes"]
    assert node["head"] and node["resources"]["CPU"][1] == 16 > node["resources"]["CPU"][0] > 0
    applications = {one["name"]: one for one in status["applications"]}
    lost = applications["nowhere"]
    assert lost["model"]["missing"] == {"simulated": "engine_nowhere: 1"}
    pool = next(one for one in lost["deployments"] if one["name"] == "simulated")
    assert (pool["running"], pool["wanted"]) == (0, 1)
    ready = applications["native"]
    assert (ready["state"], ready["model"]["missing"]) == ("RUNNING", {})
    [replica] = ready["model"]["replicas"]
    assert (replica["native_priority"], replica["slots"], replica["running"]) == (True, 8, 0)
    assert ready["model"]["tiers"].keys() == {"priority", "default", "flex"}
    [pool] = [one for one in ready["deployments"] if one["name"] == "simulated"]
    assert (pool["running"], pool["nodes"], pool["state"]) == (1, [node["address"]], "HEALTHY")

    differs = {one["key"]: (one["file"], one["deployed"]) for one in status["differs"]}
    card = "applications.native.deployments.Model.user_config.rate_card"
    assert differs.pop(f"{card}.input") == (3, 1)
    assert differs.pop(f"{card}.cached_input") == ("(not set)", 0.5)
    assert differs.pop("applications.nowhere") == ("(not set)", "(set)")
    assert not any(key.startswith("applications.native.args") for key in differs)


def test_the_status_says_it_in_words_too(nowhere):
    shown = frontline_status()
    assert "no node offers what pool simulated asks for: engine_nowhere: 1" in shown
    assert "test/native" in shown and "Ingress" in shown
    key = nowhere.snapshot("native").replicas[0].key
    assert key and key not in shown
