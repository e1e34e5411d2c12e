"""KubeRay's own definition of a RayService, as a JSON schema as strict as Kubernetes can be.

Kubernetes drops fields that a definition does not know, or refuses them with
``--validate=strict``; here they are refused. What JSON Schema has no word for is put into its
words: numbers that may be written as text, lists whose entries must differ in some of their fields.
"""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

DEFINITION = Path(__file__).parent / "third_party" / "kuberay" / "ray.io_rayservices.yaml.gz"
_KEYS = "x-kubernetes-list-map-keys"


def rayservice_schema(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of the version that Kubernetes stores.

    Args:
        metadata: the schema of every object's, which a definition does not repeat.
    """
    definition = yaml.load(gzip.decompress(DEFINITION.read_bytes()), yaml.CSafeLoader)["spec"]
    [stored] = [one for one in definition["versions"] if one["storage"]]
    schema: dict[str, Any] = _strict(stored["schema"]["openAPIV3Schema"])
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    schema["properties"] |= {
        "apiVersion": {"const": f"{definition['group']}/{stored['name']}"},
        "kind": {"const": definition["names"]["kind"]},
        "metadata": metadata,
    }
    return schema


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    own = {name: _strict(inner) for name, inner in schema.items()}
    if own.get("x-kubernetes-int-or-string"):
        own["type"] = ["integer", "string"]
    if own.get("nullable") is True:
        own["type"] = [own["type"], "null"]
    if own.get("x-kubernetes-list-type") == "set":
        own["uniqueItems"] = True
    if isinstance(own.get("properties"), dict):
        own.setdefault("additionalProperties", False)
    return own


def _differ(_: Any, keys: list[str], entries: Any, __: Any) -> Iterator[ValidationError]:
    seen = [tuple(entry.get(key) for key in keys) for entry in entries]
    for entry in {one for one in seen if seen.count(one) > 1}:
        yield ValidationError(f"more than one entry has {', '.join(keys)} {entry}")


Validator = extend(Draft202012Validator, {_KEYS: _differ})
"""Checks lists of named entries, too, as Kubernetes does."""
