import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.core.generated.autoscaler_pb2 import AutoscalingState  # type: ignore[attr-defined]

from app.config.model import ModelSettings
from app.contracts.status import Availability, ModelSnapshot, ReplicaStatus, Sleep
from app.core.dialect import Dialect
from deployments.control.feasibility import Bundle, Need, Node
from deployments.control.placement import can_grow

pytestmark = pytest.mark.unit

HEAD = Node({"CPU": 4})
VLLM = Node({"CPU": 8, "GPU": 2, "engine_vllm": 2, "accelerator_type:H100": 1}, {"zone": "a"})
SGLANG = Node({"CPU": 8, "GPU": 1}, {"engine": "sglang", "zone": "b"})
CLUSTER = (HEAD, VLLM, SGLANG)


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"num_cpus": 4}, ""),
        ({"num_gpus": 2, "resources": {"engine_vllm": 1}}, ""),
        ({"accelerator_type": "H100"}, ""),
        ({"label_selector": {"engine": "sglang"}, "num_gpus": 1}, ""),
        ({"label_selector": {"engine": "!sglang"}, "num_gpus": 1}, ""),
        ({"label_selector": {"zone": "in(b, c)"}}, ""),
        ({"label_selector": {"zone": "c"}, "fallback_strategy": [{"label_selector": {}}]}, ""),
        ({"resources": {"engine_nowhere": 1}}, "engine_nowhere: 1"),
        ({"num_cpus": 1, "resources": {"engine_vllm": 3}}, "engine_vllm: 3"),
        ({"num_gpus": 4, "accelerator_type": "A100"}, "GPU: 4, accelerator_type:A100: 0.001"),
        ({"label_selector": {"engine": "vllm"}}, "label engine=vllm"),
        ({"label_selector": {"zone": "!in(a, b)"}, "num_gpus": 1}, None),
        (
            {"num_gpus": 2, "label_selector": {"zone": "b"}},
            "GPU: 2, label zone=b on one node",
        ),
        ({"placement_group_bundles": [{"GPU": 2}, {"GPU": 1}]}, ""),
        (
            {
                "placement_group_bundles": [{"GPU": 2}, {"GPU": 1}],
                "placement_group_strategy": "STRICT_PACK",
            },
            "GPU: 3",
        ),
        (
            {
                "placement_group_bundles": [{"GPU": 1}] * 3,
                "placement_group_strategy": "STRICT_SPREAD",
            },
            "3 such nodes",
        ),
        (
            {
                "placement_group_bundles": [{"GPU": 1}, {"GPU": 1}],
                "placement_group_bundle_label_selector": [{"zone": "c"}],
            },
            "label zone=c",
        ),
    ],
)
def test_what_no_node_offers(options, missing):
    found = Need.of(options).missing(CLUSTER)
    assert found == missing if missing is not None else found


NODES = st.builds(
    Node,
    st.dictionaries(st.sampled_from(["CPU", "GPU", "x"]), st.integers(0, 4)),
    st.dictionaries(st.just("zone"), st.sampled_from("ab")),
)
BUNDLES = st.builds(
    Bundle,
    st.dictionaries(st.sampled_from(["CPU", "GPU", "x"]), st.integers(1, 4)),
    st.tuples(st.dictionaries(st.just("zone"), st.sampled_from(["a", "!a", "in(a, b)"]))),
)


@given(BUNDLES, st.lists(NODES, max_size=4))
def test_something_is_missing_just_where_no_node_fits(bundle, nodes):
    assert bool(bundle.missing(nodes)) is not any(bundle.fits(node) for node in nodes)


@given(st.lists(BUNDLES, min_size=1, max_size=3), st.lists(NODES, max_size=4), NODES)
def test_a_further_node_takes_nothing_away(bundles, nodes, further):
    for strategy in ("PACK", "STRICT_PACK", "STRICT_SPREAD"):
        need = Need(tuple(bundles), strategy)
        assert need.missing(nodes) or not need.missing([*nodes, further])


def autoscaler(version, *refused):
    state = AutoscalingState(autoscaler_state_version=version)
    for bundle in refused:
        state.infeasible_resource_requests.add(resources_bundle=bundle)
    return state


@pytest.mark.parametrize(
    ("state", "grows"),
    [
        (autoscaler(0), False),
        (autoscaler(7), True),
        (autoscaler(7, {"GPU": 8.0}), True),
        (autoscaler(7, {"GPU": 1.0, "engine_vllm": 1.0, "CPU": 0.0}), False),
    ],
)
def test_an_autoscaler_may_bring_a_node_unless_it_says_that_it_cannot(state, grows):
    need = Need.of({"num_cpus": 0, "num_gpus": 1, "resources": {"engine_vllm": 1}})
    assert can_grow(state, need) is grows


REPLICA = ReplicaStatus("r", "p", "http://127.0.0.1:1", "key", 1, "1", None, Dialect("simulated"))


@pytest.mark.parametrize(
    ("replicas", "missing", "state"),
    [
        ((), {}, Availability.STARTING),
        ((), {"p": "GPU: 1"}, Availability.STARTING),
        ((), {"p": "GPU: 1", "q": "GPU: 1"}, Availability.NOT_OFFERED),
        ((REPLICA,), {"q": "GPU: 1"}, Availability.READY),
    ],
)
def test_a_model_is_not_offered_once_no_pool_of_it_could_be_placed(replicas, missing, state):
    model = ModelSnapshot(
        "m", (), "us", 0, ModelSettings(), replicas, pools=("p", "q"), missing=missing
    )
    assert model.state is state


@pytest.mark.parametrize(
    ("waking", "missing", "state"),
    [
        (False, {}, Availability.ASLEEP),
        (True, {}, Availability.STARTING),
        (True, {"p": "GPU: 1"}, Availability.NOT_OFFERED),
    ],
)
def test_a_model_is_asleep_until_somebody_asks_for_it(waking, missing, state):
    rest = Sleep((), waking=waking)
    model = ModelSnapshot(
        "m", (), "us", 0, ModelSettings(), (), sleep=rest, pools=("p",), missing=missing
    )
    assert model.state is state
