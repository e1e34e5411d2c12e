"""The manifests of configs/kuberay against schemas, and what must hold between them."""

import json
import os
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from app.check import check_config
from tests.configs.kuberay_schema import rayservice_schema

pytestmark = pytest.mark.unit

KUBERAY = Path(__file__).parents[2] / "configs" / "kuberay"
DOCKER = Path(__file__).parents[2] / "scripts" / "docker"
ENVIRONMENTS = ["staging", "production"]
# Strict: fields that Kubernetes does not know are refused, as a typing error would be.
SCHEMAS = files("kubernetes_validate") / "kubernetes-json-schema" / "v1.34.0-local-strict"
DEFINITIONS = "https://kubernetes.io/api/_definitions.json"
CRD = os.environ.get("FRONTLINE_KUBERAY_CRD")
"""KubeRay's own definition of a RayService, as `kubectl get crd rayservices.ray.io -o yaml`
prints it."""


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
    found = Draft202012Validator(schema, registry=registry).iter_errors(value)
    return [f"{'.'.join(map(str, one.absolute_path))}: {one.message[:300]}" for one in found]


def kind_schema(manifest):
    """Kubernetes' own schema of a manifest's kind."""
    group, _, version = manifest["apiVersion"].rpartition("/")
    wanted = {"group": group, "kind": manifest["kind"], "version": version}
    for name, definition in definitions()["$defs"].items():
        if wanted in definition.get("x-kubernetes-group-version-kind", []):
            return {"$ref": f"{DEFINITIONS}#/$defs/{name}"}
    raise AssertionError(f"Kubernetes knows no {wanted}")


@pytest.mark.parametrize("manifest", manifests("common"), ids=lambda one: one["metadata"]["name"])
def test_kubernetes_takes_what_all_environments_share(manifest):
    assert problems(kind_schema(manifest), manifest) == []


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_rayservice_is_one(environment):
    assert problems(rayservice_schema(DEFINITIONS), rayservice(environment)) == []


def test_mistakes_would_be_found():
    manifest = rayservice("staging")
    worker = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    worker["maxReplica"] = 3
    worker["template"]["spec"]["containers"][0]["image"] = 7
    worker["template"]["spec"]["terminationGracePeriod"] = 7
    found = "\n".join(problems(rayservice_schema(DEFINITIONS), manifest))
    assert "maxReplica" in found and "7 is not of type" in found
    assert "terminationGracePeriod" in found


@pytest.mark.skipif(CRD is None, reason="FRONTLINE_KUBERAY_CRD names no definition")
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_kuberays_own_definition_takes_them(environment):
    versions = yaml.safe_load(Path(CRD).read_text())["spec"]["versions"]
    [v1] = [one for one in versions if one["name"] == "v1"]
    schema = strict(v1["schema"]["openAPIV3Schema"])
    # That of every object, which a definition does not repeat.
    schema["properties"]["metadata"] = {"type": "object"}
    assert problems(schema, rayservice(environment)) == []


def strict(schema):
    """Let a definition refuse fields that it does not know, which Kubernetes drops in silence."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    own = {name: strict(inner) for name, inner in schema.items()}
    if own.get("x-kubernetes-int-or-string"):
        return {}
    if "properties" in own and not own.get("x-kubernetes-preserve-unknown-fields"):
        own.setdefault("additionalProperties", False)
    return own


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


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_no_secret_stands_in_a_manifest(environment):
    text = (KUBERAY / f"{environment}.yaml").read_text()
    for template in pod_templates(environment).values():
        for container in template["spec"]["containers"]:
            for variable in container.get("env", ()):
                if "PASSWORD" in variable["name"]:
                    assert "secretKeyRef" in variable["valueFrom"]
    assert "frontline:${LEDGER_PASSWORD}@" in text
