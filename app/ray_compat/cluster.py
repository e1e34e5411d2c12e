"""Ray clusters: which run on this machine, Ray's token, and what is free on nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray._private.services import find_gcs_addresses
from ray._private.state import available_resources_per_node
from ray.core.generated import autoscaler_pb2, common_pb2

LabelChoice = tuple[str, frozenset[str], bool]
"""A label's name, some values, and whether its value must be one of them, or none of them."""
AskedBundle = tuple[frozenset[tuple[str, float]], frozenset[frozenset[LabelChoice]]]
"""What one node must have: resources, and the label selectors of which one has to match."""

_IN: Any = common_pb2.LABEL_OPERATOR_IN  # type: ignore[attr-defined]


def local_clusters() -> list[str]:
    """Return the addresses of the Ray clusters whose processes run on this machine."""
    return sorted(find_gcs_addresses())  # type: ignore[no-untyped-call]


def use_own_token() -> None:
    """Have Ray use this user's token from now on, if there is one."""
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def available_resources() -> Mapping[str, Mapping[str, float]]:
    """Return what is free now, by node id and name of the resource."""
    free: Mapping[str, Mapping[str, float]]
    free = available_resources_per_node()  # type: ignore[no-untyped-call]
    return free


def refused_requests(timeout_s: float) -> list[tuple[AskedBundle, ...]] | None:
    """Return the requests that fit none of the nodes that Ray's autoscaler (v2) can add.

    A request has one bundle, or those of a placement group. ``None`` if no autoscaler runs. Blocks
    for a question to Ray's head. Ray has no public way to learn this: ``ray status`` and
    ``ray.autoscaler.v2.sdk`` leave it out.
    """
    client: Any = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]
    # Its messages are made at run time, out of mypy's sight.
    messages: Any = autoscaler_pb2
    answer = client.get_cluster_status(timeout_s=timeout_s)
    return read_refused(messages.GetClusterStatusReply.FromString(answer).autoscaling_state)


def read_refused(state: Any) -> list[tuple[AskedBundle, ...]] | None:
    """Return the refused requests of an ``AutoscalingState``; ``None`` if nobody reported it."""
    if not state.autoscaler_state_version:
        return None
    gangs = (
        gang.bundle_selectors[0].resource_requests if gang.bundle_selectors else gang.requests
        for gang in state.infeasible_gang_resource_requests
    )
    single = ([request] for request in state.infeasible_resource_requests)
    return [tuple(map(_bundle, requests)) for requests in (*single, *gangs)]


def _bundle(request: Any) -> AskedBundle:
    selectors = (
        frozenset(
            (one.label_key, frozenset(one.label_values), one.operator == _IN)
            for one in selector.label_constraints
        )
        for selector in request.label_selectors
    )
    resources = ((name, amount) for name, amount in request.resources_bundle.items() if amount)
    return frozenset(resources), frozenset(filter(None, selectors))
