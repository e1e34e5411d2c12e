"""A provider of nodes for Ray's autoscaler: pretended ones, which take a while to come."""

from __future__ import annotations

import time
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

LATE_S = 8.0
"""How long a node takes to come, in seconds, beside the start of its processes."""
HEAD_NODE = FAKE_HEAD_NODE_ID
"""Ray's name for the head node."""
HEAD_ENV = {
    # The provider refuses to work without it.
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    # The autoscaler that knows labels, and tells what it cannot add.
    "RAY_enable_autoscaler_v2": "1",
    # It finds the head among the provider's nodes by these.
    "RAY_CLOUD_INSTANCE_ID": HEAD_NODE,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE,
}
"""What the head node is started with."""


class LateNodes(FakeMultiNodeProvider):
    """Ray's own provider of pretended nodes: each is a set of Ray's processes on this machine."""

    def create_node_with_resources_and_labels(self, *arguments: Any, **more: Any) -> None:
        """Start a node, later."""
        time.sleep(LATE_S)
        super().create_node_with_resources_and_labels(*arguments, **more)


def scaling_config(most: int, **resources: float) -> dict[str, Any]:
    """Configure Ray's autoscaler for up to so many nodes, each of which offers these resources."""
    small = {"object_store_memory": 80_000_000}
    return {
        "cluster_name": "late",
        "max_workers": most,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",
            "module": f"{__name__}.{LateNodes.__name__}",
            "head_node_id": HEAD_NODE,
            "launch_multiple": True,
            # The nodes share an address, and nothing is to be installed on them.
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "engines": {
                "resources": {"CPU": 1, **resources, **small},
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
            },
        },
        # Ray fills these in for its own providers alone, and fails without them.
        "auth": {},
        "docker": {},
        "file_mounts": {},
        **{name: [] for name in _EMPTY_LISTS},
    }


_EMPTY_LISTS = (
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "rsync_exclude",
    "rsync_filter",
)
