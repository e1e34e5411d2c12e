"""A model whose engine no node of the cluster offers."""

import openai
import pytest

from tests.serving import eventually, simulated_app

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def nowhere(frontline):
    """One model that can be placed nowhere, beside the others."""
    nowhere = simulated_app("nowhere")
    nowhere["deployments"][1]["ray_actor_options"] = {"resources": {"engine_nowhere": 1}}
    frontline.deploy(nowhere)
    eventually(
        lambda: (
            (frontline.entry("nowhere") or {}).get("metadata", {}).get("state")
            == "engine_not_offered"
        )
    )
    yield frontline
    frontline.remove("nowhere")


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
