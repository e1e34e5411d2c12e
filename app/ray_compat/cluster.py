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
from ray.core.generated import autoscaler_pb2


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


def autoscaling_state(timeout_s: float) -> Any:
    """Return Ray's ``AutoscalingState``. Blocks for a question to Ray's head.

    Ray has no public way to learn which requests fit no kind of node that its autoscaler can bring.
    """
    client: Any = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]
    # Its messages are made at run time, out of mypy's sight.
    messages: Any = autoscaler_pb2
    answer = client.get_cluster_status(timeout_s=timeout_s)
    return messages.GetClusterStatusReply.FromString(answer).autoscaling_state
