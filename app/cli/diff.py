"""Compares a config file with the deployment, key by key. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ray.serve.schema import ServeApplicationSchema

from app.config.redaction import redact
from app.core.settings import Key

ABSENT: Final = "(not set)"


@dataclass(frozen=True, slots=True)
class Difference:
    """A key whose values differ. Entries of lists are keyed by their names.

    Attributes:
        key: the path of the key.
        file: its value in the file, without secrets; ``ABSENT`` if it is missing.
        deployed: its deployed value, likewise.
    """

    key: str
    file: Any
    deployed: Any


def differences(config: Mapping[str, Any], details: Mapping[str, Any]) -> list[Difference]:
    """Return the differences between a config file and the deployment.

    Args:
        config: the file, in which ``app.cli.check`` has found nothing wrong.
        details: Serve's report of what it runs (``ServeInstanceDetails``).
    """
    http = config.get("http_options") or {}
    running = details.get("http_options") or {}
    found = list(_compare(("http_options",), http, {name: running.get(name) for name in http}))
    file = {one["name"]: _normal(one) for one in config.get("applications") or ()}
    deployed = {
        name: _normal(application["deployed_app_config"])
        for name, application in (details.get("applications") or {}).items()
        if application.get("deployed_app_config")
    }
    return found + list(_compare(("applications",), file, deployed))


def _normal(application: Mapping[str, Any]) -> dict[str, Any]:
    """Return an application's entry, normalised to the form in which Serve writes it."""
    schema = ServeApplicationSchema.model_validate(application)
    return schema.model_dump(mode="json", exclude_unset=True)


def _compare(where: Key, file: Any, deployed: Any) -> Iterator[Difference]:
    file, deployed = _named(file), _named(deployed)
    if isinstance(file, Mapping) and isinstance(deployed, Mapping):
        for name in [*file, *(name for name in deployed if name not in file)]:
            yield from _compare((*where, name), file.get(name, ABSENT), deployed.get(name, ABSENT))
    elif file != deployed:
        name = str(where[-1])
        shown = (one if one == ABSENT else _brief(redact(one, name)) for one in (file, deployed))
        yield Difference(".".join(map(str, where)), *shown)


def _named(value: Any) -> Any:
    """Return a list of named entries as a mapping by name."""
    if isinstance(value, list) and value and all(_has_name(entry) for entry in value):
        return {entry["name"]: entry for entry in value}
    return value


def _has_name(entry: Any) -> bool:
    return isinstance(entry, Mapping) and isinstance(entry.get("name"), str)


def _brief(value: Any) -> Any:
    # An application that exists on one side only is named, without its contents.
    return "(set)" if isinstance(value, Mapping) and value else value
