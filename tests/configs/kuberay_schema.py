"""What a RayService may hold, as far as the manifests in configs/kuberay use it.

Written from the reference of KubeRay 1.7's API (``ray.io/v1``), whose own definitions are far
larger: every pod template is in them several times. Pod templates are left to Kubernetes' own
schema. A field that is not named here is refused. ``test_kuberay.py`` also compares it, and the
manifests, with KubeRay's own definition where that is given.
"""

from collections.abc import Mapping
from typing import Any

STRING = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
WORDS = {"type": "object", "additionalProperties": STRING}
POD_TEMPLATE = "io.k8s.api.core.v1.PodTemplateSpec"
RESOURCES = "io.k8s.api.core.v1.ResourceRequirements"
SECRET_SOURCE = "io.k8s.api.core.v1.EnvVarSource"


def rayservice_schema(definitions: str) -> Mapping[str, Any]:
    """Return the JSON schema; ``definitions`` is the address of Kubernetes' own."""

    def kubernetes(name: str) -> dict[str, Any]:
        return {"$ref": f"{definitions}#/$defs/{name}"}

    def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
        return {
            "type": "object",
            "additionalProperties": False,
            "required": list(required),
            "properties": properties,
        }

    secret = fields(value=STRING, valueFrom=kubernetes(SECRET_SOURCE))
    fault_tolerance = fields(
        backend={"enum": ["redis", "rocksdb"]},
        redisAddress=STRING,
        redisPassword=secret,
        storage=fields(size=STRING, deletionPolicy={"enum": ["DeleteWithCluster", "Retain"]}),
    )
    autoscaler = fields(
        version={"enum": ["v1", "v2"]},
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        idleTimeoutSeconds=COUNT,
        resources=kubernetes(RESOURCES),
    )
    group = {"rayStartParams": WORDS, "labels": WORDS, "template": kubernetes(POD_TEMPLATE)}
    worker = fields(
        ("groupName", "template", "minReplicas", "maxReplicas"),
        groupName=STRING,
        replicas=COUNT,
        minReplicas=COUNT,
        maxReplicas={"type": "integer", "minimum": 1},
        **group,
    )
    cluster = fields(
        ("headGroupSpec", "rayVersion"),
        rayVersion=STRING,
        authOptions=fields(mode={"enum": ["disabled", "token"]}),
        gcsFaultToleranceOptions=fault_tolerance,
        enableInTreeAutoscaling={"type": "boolean"},
        autoscalerOptions=autoscaler,
        headGroupSpec=fields(("template",), **group),
        workerGroupSpecs={"type": "array", "items": worker},
    )
    spec = fields(
        ("rayClusterConfig",),
        upgradeStrategy=fields(type={"enum": ["NewCluster", "None"]}),
        rayClusterDeletionDelaySeconds=COUNT,
        serviceUnhealthySecondThreshold=COUNT,
        deploymentUnhealthySecondThreshold=COUNT,
        excludeHeadPodFromServeSvc={"type": "boolean"},
        serveConfigV2=STRING,
        rayClusterConfig=cluster,
    )
    return fields(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": "RayService"},
        metadata=kubernetes("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"),
        spec=spec,
    )
