import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.core.generated.autoscaler_pb2 import AutoscalingState  # type: ignore[attr-defined]

from app.config.model import ModelSettings
from app.contracts.start import StartFailure, StartProblem
from app.contracts.status import Availability, ModelSnapshot, ReplicaStatus, Sleep
from app.core.dialect import Dialect
from app.ray_compat.cluster import read_refused
from deployments.control.feasibility import Bundle, Need, Node

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


def autoscaler(version, *refused, gangs=()):
    """What an autoscaler reports: requests as Ray's GCS makes them, of ``(resources, labels)``."""
    state = AutoscalingState(autoscaler_state_version=version)
    for bundle in refused:
        fill(state.infeasible_resource_requests.add(), *bundle)
    for gang in gangs:
        selectors = state.infeasible_gang_resource_requests.add().bundle_selectors.add()
        for bundle in gang:
            fill(selectors.resource_requests.add(), *bundle)
    return read_refused(state)


def fill(request, resources, *selectors):
    request.resources_bundle.update(resources)
    for selector in selectors:
        labels = request.label_selectors.add().label_constraints
        for name, (operator, values) in selector.items():
            labels.add(label_key=name, operator=operator, label_values=values)


GPU = {"GPU": 1.0, "engine_vllm": 1.0}
IN, NOT_IN = 1, 2


@pytest.mark.parametrize(
    ("refused", "comes"),
    [
        (autoscaler(0), False),
        (autoscaler(7), True),
        (autoscaler(7, ({"GPU": 8.0},)), True),
        (autoscaler(7, ({"GPU": 8.0},), (GPU | {"CPU": 0.0},)), False),
        # Another pool asks for as much, elsewhere.
        (autoscaler(7, (GPU, {"engine": (IN, ["sglang"])})), True),
        (autoscaler(7, gangs=[[(GPU,)]]), False),
        (autoscaler(7, gangs=[[(GPU,), (GPU,)]]), True),
    ],
)
def test_an_autoscaler_may_bring_a_node_unless_it_says_that_it_cannot(refused, comes):
    need = Need.of({"num_cpus": 0, "num_gpus": 1, "resources": {"engine_vllm": 1}})
    assert need.can_come(refused) is comes


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ("vllm", (IN, ["vllm"])),
        ("!vllm", (NOT_IN, ["vllm"])),
        ("in(a, b)", (IN, ["b", "a"])),
        ("!in(a,b)", (NOT_IN, ["a", "b"])),
    ],
)
def test_what_is_refused_is_known_by_its_labels(wanted, told):
    need = Need.of({"num_gpus": 1, "label_selector": {"engine": wanted}})
    request = {"GPU": 1.0}
    assert not need.can_come(autoscaler(7, (request, {"engine": told})))
    # An empty selector stands for none.
    assert not need.can_come(autoscaler(7, (request, {}, {"engine": told})))
    assert need.can_come(autoscaler(7, (request,)))
    assert need.can_come(autoscaler(7, (request, {"engine": (told[0], ["other"])})))


def test_a_placement_group_is_refused_as_a_whole():
    need = Need.of(
        {
            "placement_group_bundles": [{"GPU": 2}, {"GPU": 1}],
            "placement_group_bundle_label_selector": [{"zone": "a"}],
        }
    )
    zone = {"zone": (IN, ["a"])}
    one, two = ({"GPU": 1.0}, zone), ({"GPU": 2.0}, zone)
    assert not need.can_come(autoscaler(7, gangs=[[one, two]]))
    assert need.can_come(autoscaler(7, two, gangs=[[two, two], [two]]))


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


@pytest.mark.parametrize(
    ("failed", "missing", "sleep", "replicas", "state"),
    [
        (["p"], {}, None, (), Availability.STARTING),
        (["p", "q"], {}, None, (), Availability.FAILED),
        (["p"], {"q": "GPU: 1"}, None, (), Availability.FAILED),
        (["p", "q"], {}, Sleep(()), (), Availability.ASLEEP),
        (["p"], {}, None, (REPLICA,), Availability.READY),
    ],
)
def test_a_model_has_failed_once_no_pool_of_it_starts(failed, missing, sleep, replicas, state):
    why = StartFailure("p", StartProblem.NO_GPU, "/path", "look", "/log", "n")
    model = ModelSnapshot(
        "m", (), "us", 0, ModelSettings(), replicas, sleep=sleep, pools=("p", "q"),
        missing=missing, failed=dict.fromkeys(failed, why),
    )  # fmt: skip
    assert model.state is state
    assert (model.failure_reason is not None) is (state is Availability.FAILED)
