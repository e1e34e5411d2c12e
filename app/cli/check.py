"""Checks a Serve config file without starting anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from app.autoscaling import POLICY_PATH
from app.cli.applications import builder
from app.config.ingress import IngressSettings
from app.config.model import ModelArgs, ModelSettings
from app.contracts.adapters import plan_adapters
from app.core.names import MODEL_DEPLOYMENT
from app.core.settings import Key, Problem, Settings, SettingsError
from app.ray_compat.application import deployments_of

INGRESS_DEPLOYMENT = "Ingress"
_USER_CONFIGS: Mapping[str, type[Settings]] = {
    INGRESS_DEPLOYMENT: IngressSettings,
    MODEL_DEPLOYMENT: ModelSettings,
}

_SERVE_DELAYS = {"upscale_delay_s": 30, "downscale_delay_s": 600}
"""Serve's default delays before it follows an autoscaling policy (ray.serve.config)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem and its line, counted from 1."""

    line: int
    problem: Problem


def check_config(text: str) -> list[Finding]:
    """Return all problems of a Serve config file of Frontline, by line."""
    try:
        root, config = yaml.compose(text), yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        return [Finding(mark.line + 1 if mark else 1, Problem((), f"not valid YAML: {error}"))]
    if not isinstance(config, dict) or root is None:
        return [Finding(1, Problem((), "expected a mapping with `applications`"))]
    found = [Finding(_line(root, problem.key), problem) for problem in _problems(config)]
    return sorted(found, key=lambda finding: finding.line)


def _problems(config: dict[str, Any]) -> Iterator[Problem]:
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        for problem in error.errors():
            yield Problem(problem["loc"], problem["msg"])
        return
    host = (config.get("http_options") or {}).get("host")
    for place, application in enumerate(config.get("applications") or ()):
        yield from _application_problems(("applications", place), application, host)


def _application_problems(
    where: Key, application: Mapping[str, Any], host: str | None
) -> Iterator[Problem]:
    try:
        build = builder(application["import_path"])
    except (ImportError, AttributeError, ValueError) as error:
        yield Problem((*where, "import_path"), f"cannot be imported: {error}")
        return
    known: set[str] = set()
    try:
        known = {one.name for one in deployments_of(build(application.get("args") or {}))}
    except SettingsError as error:
        yield from (Problem((*where, *p.key), p.message) for p in error.problems)
    for place, deployment in enumerate(application.get("deployments") or ()):
        key = (*where, "deployments", place)
        if known and deployment["name"] not in known:
            expected = ", ".join(sorted(known))
            message = f"expected one of {expected} (got {deployment['name']!r})"
            yield Problem((*key, "name"), message)
        yield from _user_config_problems((*key, "user_config"), deployment, host)
    if MODEL_DEPLOYMENT in known:
        yield from _price_problems(where, application)
        yield from _adapter_problems(where, application)
    yield from _scaling_problems(where, application)
    if known:
        yield from _span_problems(where, application)


def _price_problems(where: Key, application: Mapping[str, Any]) -> Iterator[Problem]:
    """Check that a model has prices, or says that it is free."""
    message = "a model has a rate_card: its prices, or `{free: true}`"
    for place, deployment in enumerate(application.get("deployments") or ()):
        if deployment["name"] == MODEL_DEPLOYMENT:
            if "rate_card" not in (deployment.get("user_config") or {}):
                yield Problem((*where, "deployments", place, "user_config", "rate_card"), message)
            return
    yield Problem((*where, "deployments"), f"{message}, in the user_config of {MODEL_DEPLOYMENT}")


def _adapter_problems(where: Key, application: Mapping[str, Any]) -> Iterator[Problem]:
    """Check that adapters can be loaded, and that prices are those of adapters of the model."""
    try:
        args = ModelArgs.load(application.get("args") or {}, "args")
    except SettingsError:
        return
    for place, deployment in enumerate(application.get("deployments") or ()):
        if deployment["name"] != MODEL_DEPLOYMENT:
            continue
        key = (*where, "deployments", place, "user_config")
        try:
            settings = ModelSettings.load(deployment.get("user_config") or {}, *key)
        except SettingsError:
            continue
        for number, problem in plan_adapters(args, settings.adapters).problems.items():
            yield Problem((*key, "adapters", number), problem)
        known = {*args.adapters, *(one.name for one in settings.adapters)}
        for name in sorted(settings.adapter_rate_cards.keys() - known):
            yield Problem(
                (*key, "adapter_rate_cards", name), "the model has no adapter of this name"
            )


def _span_problems(where: Key, application: Mapping[str, Any]) -> Iterator[Problem]:
    """Check that an engine on several nodes reserves a bundle of resources on each of them."""
    deployments = {one["name"]: at for at, one in enumerate(application.get("deployments") or ())}
    for place, pool in enumerate((application.get("args") or {}).get("pools") or ()):
        nodes, at = pool.get("nodes", 1), deployments.get(pool["name"])
        if nodes == 1:
            continue
        if at is None:
            message = f"needs a deployment {pool['name']!r} with placement_group_bundles"
            yield Problem((*where, "args", "pools", place, "nodes"), message)
            continue
        deployment, key = application["deployments"][at], (*where, "deployments", at)
        bundles = deployment.get("placement_group_bundles") or ()
        if len(bundles) != nodes:
            message = f"expected a bundle for each of the pool's {nodes} nodes (got {len(bundles)})"
            yield Problem((*key, "placement_group_bundles"), message)
        strategy = deployment.get("placement_group_strategy")
        if strategy != "STRICT_SPREAD":
            message = f"expected STRICT_SPREAD, a node for each bundle (got {strategy!r})"
            yield Problem((*key, "placement_group_strategy"), message)


def _scaling_problems(where: Key, application: Mapping[str, Any]) -> Iterator[Problem]:
    """Check that our autoscaling policy has a pool to scale, and no unintended default delays."""
    policy = application.get("autoscaling_policy") or {}
    if policy.get("policy_function") != POLICY_PATH:
        return
    if policy.get("policy_kwargs"):
        message = (
            "not used, and Serve restarts the model when it changes; set `scaling` in the "
            "`user_config` of Model"
        )
        yield Problem((*where, "autoscaling_policy", "policy_kwargs"), message)
    scaled = False
    for place, deployment in enumerate(application.get("deployments") or ()):
        config = deployment.get("autoscaling_config")
        if config is None or deployment["name"] == MODEL_DEPLOYMENT:
            continue
        scaled = True
        for name, default_s in _SERVE_DELAYS.items():
            if name not in config:
                message = (
                    f"must be set beside this policy: Serve would add {default_s} s to what the "
                    "policy waits by itself; 0 adds nothing"
                )
                yield Problem((*where, "deployments", place, "autoscaling_config", name), message)
    if not scaled:
        message = "no pool has an `autoscaling_config`, so there is nothing to scale"
        yield Problem((*where, "autoscaling_policy"), message)


def _user_config_problems(
    where: Key, deployment: Mapping[str, Any], host: str | None
) -> Iterator[Problem]:
    values = deployment.get("user_config")
    if values is None:
        return
    settings = _USER_CONFIGS.get(deployment["name"])
    if settings is None:
        yield Problem(where, f"the deployment {deployment['name']!r} has no user_config")
        return
    try:
        loaded = settings.load(values, *where)
        if isinstance(loaded, IngressSettings):
            loaded.check_open(host, *where)
    except SettingsError as error:
        yield from error.problems


def _line(node: yaml.Node, key: Key) -> int:
    """Return the line of the value at ``key``, or of its innermost parent that exists."""
    line = node.start_mark.line + 1
    for part in key:
        step = _step(node, part)
        if step is None:
            break
        line, node = step
    return line


def _step(node: yaml.Node, part: str | int) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        item = node.value[part]
        return item.start_mark.line + 1, item
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == str(part):
                return name.start_mark.line + 1, value
    return None
