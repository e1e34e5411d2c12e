"""The manifests of configs/kuberay against schemas, and what must hold between them."""

import json
import re
from functools import cache, reduce
from importlib.resources import files
from operator import getitem
from pathlib import Path

import pytest
import yaml
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from app.cli.check import check_config
from tests.configs.kuberay_schema import Validator, rayservice_schema

pytestmark = pytest.mark.unit

KUBERAY = Path(__file__).parents[2] / "configs" / "kuberay"
DOCKER = Path(__file__).parents[2] / "scripts" / "docker"
ENVIRONMENTS = ["staging", "production"]
# Strict: fields that Kubernetes does not know are refused, as a typing error would be.
SCHEMAS = files("kubernetes_validate") / "kubernetes-json-schema" / "v1.34.0-local-strict"
DEFINITIONS = "https://kubernetes.io/api/_definitions.json"


def manifests(name):
    return list(yaml.safe_load_all((KUBERAY / f"{name}.yaml").read_text()))


def rayservice(environment):
    [manifest] = manifests(environment)
    return manifest


def pod_templates(environment):
    """Every pod template of a RayService, by its group's name."""
    cluster = rayservice(environment)["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups}


@cache
def definitions():
    return json.loads((SCHEMAS / "_definitions.json").read_text())


def problems(schema, value):
    registry = Registry().with_resource(
        DEFINITIONS, Resource.from_contents(definitions(), default_specification=DRAFT202012)
    )
    found = Validator(schema, registry=registry).iter_errors(value)
    return [f"{'.'.join(map(str, one.absolute_path))}: {one.message[:300]}" for one in found]


def definition(name):
    return {"$ref": f"{DEFINITIONS}#/$defs/{name}"}


@cache
def kuberay():
    return rayservice_schema(definition("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"))


def kind_schema(manifest):
    """Kubernetes' own schema of a manifest's kind."""
    group, _, version = manifest["apiVersion"].rpartition("/")
    wanted = {"group": group, "kind": manifest["kind"], "version": version}
    for name, known in definitions()["$defs"].items():
        if wanted in known.get("x-kubernetes-group-version-kind", []):
            return definition(name)
    raise AssertionError(f"Kubernetes knows no {wanted}")


@pytest.mark.parametrize("manifest", manifests("common"), ids=lambda one: one["metadata"]["name"])
def test_kubernetes_takes_what_all_environments_share(manifest):
    assert problems(kind_schema(manifest), manifest) == []


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_kuberays_own_definition_takes_them(environment):
    assert problems(kuberay(), rayservice(environment)) == []


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_kubernetes_takes_their_pods(environment):
    """In the release that is named above; KubeRay's definition has pods of an older one."""
    for template in pod_templates(environment).values():
        assert problems(definition("io.k8s.api.core.v1.PodTemplateSpec"), template) == []


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_kuberays_operator_takes_what_its_definition_leaves_open(environment):
    """What it refuses by itself, from ``ValidateRayServiceSpec`` of the same release."""
    spec = rayservice(environment)["spec"]
    assert spec["upgradeStrategy"]["type"] in ("NewCluster", "None")
    gcs = spec["rayClusterConfig"]["gcsFaultToleranceOptions"]
    other = {"redis": {"storage"}, "rocksdb": {"redisAddress", "redisPassword"}}
    assert not gcs.keys() & other[gcs["backend"]]
    for template in pod_templates(environment).values():
        # The autoscaler replaces pods; they do not restart.
        assert template["spec"].get("restartPolicy", "Never") == "Never"
    groups = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert len({group["groupName"] for group in groups}) == len(groups)
    for group in groups:
        assert "labels" not in group["rayStartParams"] and "resources" not in group


CONTAINER = "rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0"


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("serveConfig", "applications: []", "'serveConfig' was unexpected"),
        ("rayClusterConfig.workerGroupSpecs.0.maxReplica", 3, "'maxReplica' was unexpected"),
        ("rayClusterConfig.workerGroupSpecs.0.maxReplicas", "3", "'3' is not of type 'integer'"),
        (f"{CONTAINER}.ports.1.containerPort", 8000, "more than one entry has containerPort"),
        ("rayClusterConfig.workerGroupSpecs.1.groupName", None, "None is not of type 'string'"),
        ("rayClusterConfig.headGroupSpec", {}, "'template' is a required property"),
        ("rayClusterConfig.autoscalerOptions.version", "v3", "'v3' is not one of"),
        ("rayClusterConfig.gcsFaultToleranceOptions.backend", "etcd", "'etcd' is not one of"),
        (f"{CONTAINER}.image", 7, "7 is not of type 'string'"),
        (f"{CONTAINER}.imagePullPolice", "Always", "'imagePullPolice' was unexpected"),
        (f"{CONTAINER}.resources.limits.memory", "8 GB", "'8 GB' does not match"),
        (f"{CONTAINER}.resources.limits.memory", 0.5, "0.5 is not of type"),
    ],
)
def test_a_mistake_is_found(where, value, words):
    manifest = rayservice("staging")
    *path, last = (int(word) if word.isdigit() else word for word in where.split("."))
    reduce(getitem, path, manifest["spec"])[last] = value
    found = problems(kuberay(), manifest)
    assert any(words in one for one in found), found


def test_another_kind_of_manifest_is_refused():
    manifest = rayservice("staging") | {"apiVersion": "ray.io/v1alpha1", "kind": "RayCluster"}
    assert len(problems(kuberay(), manifest)) == 2


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_what_is_served_passes_frontlines_own_check(environment):
    assert check_config(rayservice(environment)["spec"]["serveConfigV2"]) == []


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_deployment_finds_a_group_that_offers_what_it_asks_for(environment):
    spec = rayservice(environment)["spec"]
    groups = spec["rayClusterConfig"]["workerGroupSpecs"]
    asked = [
        deployment["ray_actor_options"]["label_selector"]
        for application in yaml.safe_load(spec["serveConfigV2"])["applications"]
        for deployment in application["deployments"]
    ]
    for selector in asked:
        assert any(selector.items() <= group["labels"].items() for group in groups), selector
    # And none is there for nobody.
    for group in groups:
        assert any(selector.items() <= group["labels"].items() for selector in asked), group
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_pods_carry_the_labels_by_which_policies_and_services_know_them(environment):
    templates = pod_templates(environment)
    carried = [template["metadata"]["labels"] for template in templates.values()]
    for manifest in manifests("common"):
        spec = manifest["spec"]
        selector = spec.get("podSelector", spec.get("selector"))
        if selector is not None:
            wanted = selector.get("matchLabels", selector)
            assert any(wanted.items() <= labels.items() for labels in carried), wanted
    for name, template in templates.items():
        labels = template["metadata"]["labels"]
        assert labels["app.kubernetes.io/part-of"] == "frontline"
        assert labels["frontline/role"] == (name if name in ("head", "ingress") else "engine")
        assert template["metadata"]["annotations"]["prometheus.io/scrape"] == "true"


def test_clients_reach_ingresses_and_never_engines():
    """What a policy lets in from anywhere, it lets in to ingresses alone."""
    policies = [one for one in manifests("common") if one["kind"] == "NetworkPolicy"]
    for policy in policies:
        for rule in policy["spec"].get("ingress", ()):
            if "from" not in rule:
                assert policy["spec"]["podSelector"]["matchLabels"]["frontline/role"] == "ingress"
    [service] = [one for one in manifests("common") if one["kind"] == "Service"]
    assert service["spec"]["selector"]["frontline/role"] == "ingress"


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_streams_have_time_to_end_and_containers_are_confined(environment):
    spec = rayservice(environment)["spec"]
    longest = yaml.safe_load(spec["serveConfigV2"])["http_options"]["request_timeout_s"]
    for name, template in pod_templates(environment).items():
        if name != "head":
            grace_s = template["spec"]["terminationGracePeriodSeconds"]
            [container] = template["spec"]["containers"]
            leave = container["lifecycle"]["preStop"]["exec"]["command"][-1]
            assert grace_s > longest and leave.endswith(f"scripts/docker/leave {grace_s}")
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            image = container["image"].removeprefix("frontline/").partition(":")[0]
            assert (DOCKER / f"{image}.Dockerfile").is_file()


@pytest.mark.parametrize("engine", ["vllm", "sglang", "tensorrt-llm"])
def test_an_image_has_the_version_of_the_engine_that_is_pinned(engine):
    [base] = re.findall(r"^FROM \S+:v?(\S+)$", (DOCKER / f"{engine}.Dockerfile").read_text(), re.M)
    lock = (KUBERAY.parents[1] / "requirements" / f"{engine}.lock").read_text()
    assert f"\n{engine}=={base}" in lock


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_pool_of_a_model_understands_the_same_requests(environment):
    config = yaml.safe_load(rayservice(environment)["spec"]["serveConfigV2"])
    for application in config["applications"]:
        for pool in application.get("args", {}).get("pools", ()):
            options = " ".join(pool["engine_args"])
            assert "tool" in options and "reasoning_parser" in options, pool["name"]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_no_secret_stands_in_a_manifest(environment):
    text = (KUBERAY / f"{environment}.yaml").read_text()
    for template in pod_templates(environment).values():
        for container in template["spec"]["containers"]:
            for variable in container.get("env", ()):
                if "PASSWORD" in variable["name"]:
                    assert "secretKeyRef" in variable["valueFrom"]
    assert "frontline:${LEDGER_PASSWORD}@" in text


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_prometheus_finds_the_metrics_of_every_pod(environment):
    """By the operator's PodMonitor, and by annotations where there is no operator."""
    text = (KUBERAY.parent / "monitoring" / "kubernetes.yaml").read_text()
    monitor, _ = yaml.safe_load_all(text)
    assert monitor["spec"]["selector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}, (
        "KubeRay's own label of each pod"
    )
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    for group, template in pod_templates(environment).items():
        ports = [port for one in template["spec"]["containers"] for port in one.get("ports", [])]
        [port] = [one["containerPort"] for one in ports if one["name"] == endpoint["port"]]
        annotations = template["metadata"]["annotations"]
        told = [annotations[f"prometheus.io/{name}"] for name in ("scrape", "port", "path")]
        assert told == ["true", str(port), endpoint["path"]], group
