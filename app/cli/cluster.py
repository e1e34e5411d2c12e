"""The Ray cluster that the CLI monitors. Nothing here is on the path of a request."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ServeStatus

from app import supervision
from app.cli.board import Look, Sight
from app.contracts.stats import ModelBoard
from app.core.names import MODEL_DEPLOYMENT
from app.ray_compat.cluster import local_clusters, use_own_token

_CONNECT_TIMEOUT_S: Final = 10.0
_ANSWER_TIMEOUT_S: Final = 2.0
_OTHER_VERSION: Final = "Version mismatch"
"""How Ray's message begins where the cluster has another Python, or another Ray."""
_LOOPBACK: Final = ("127.", "localhost", "[::1]")


class NothingToShow(Exception):
    """There is no cluster, or no model on it. The message is for the user."""


class Cluster:
    """The Serve applications of the Ray cluster that this process is connected to."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._handles: dict[str, Any] = {}

    async def look(self) -> Look:
        """Return the current state of every model application.

        Raises:
            NothingToShow: there is no model application, or Serve does not answer.
        """
        status = await self._status()
        states = {
            name: application.status.value
            for name, application in status.applications.items()
            if MODEL_DEPLOYMENT in application.deployments
        }
        if not states:
            others = ", ".join(sorted(status.applications))
            what = f"no model among the Serve applications ({others})" if others else "no Serve"
            raise NothingToShow(f"{what} on the Ray cluster at {self.address}")
        boards = await asyncio.gather(*(self._board(name) for name in states))
        pairs = zip(states.items(), boards, strict=True)
        return {name: Sight(state, board) for (name, state), board in pairs}

    async def _status(self) -> ServeStatus:
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                return await asyncio.to_thread(serve.status)
        except (TimeoutError, RayError) as error:
            raise NothingToShow(f"Serve does not answer: {type(error).__name__}") from None

    async def _board(self, application: str) -> ModelBoard | None:
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                handle = self._handles.get(application)
                if handle is None:
                    handle = serve.get_deployment_handle(MODEL_DEPLOYMENT, app_name=application)
                    self._handles[application] = handle
                board: ModelBoard = await handle.board.remote()
                return board
        except Exception:
            # The Model is starting, restarting or hanging. The frame shows that it does not answer.
            self._handles.pop(application, None)
            return None


def connect(address: str | None) -> Cluster:
    """Connect to a Ray cluster; to the one on this machine if no address is given.

    Raises:
        NothingToShow: there is no cluster, or it refuses the connection.
    """
    local = local_clusters()
    address = address or only_one(local)
    if address in local or address.startswith(_LOOPBACK):
        # A local cluster requires its user's token. If an address is given, Ray does not load the
        # token by itself, so that it is not sent to strangers; here it stays on the machine.
        use_own_token()
    errors: list[Exception] = []
    connecting = supervision.keep_thread("ray-connect", partial(_init_ray, address, errors))
    # Ray itself would retry for minutes if another program listens at that address.
    connecting.join(_CONNECT_TIMEOUT_S)
    if connecting.is_alive() or not ray.is_initialized():
        raise NothingToShow(_refusal(address, errors))
    return Cluster(ray.get_runtime_context().gcs_address)


def only_one(clusters: Sequence[str]) -> str:
    # Ray's own "auto" would pick any of several clusters.
    if not clusters:
        raise NothingToShow("no Ray cluster on this machine; --address names another")
    if len(clusters) > 1:
        raise NothingToShow(f"several Ray clusters here: --address {' or '.join(clusters)}")
    return clusters[0]


def _refusal(address: str, errors: Sequence[Exception]) -> str:
    refusal = f"cannot connect to a Ray cluster at {address}"
    reason = " ".join(str(errors[-1]).split()) if errors else "no answer"
    if _OTHER_VERSION in reason:
        return f"{refusal}: {reason}. Use the environment that the cluster was started in."
    return f"{refusal}: does it run, and is RAY_AUTH_MODE set here as it is there? ({reason})"


def _init_ray(address: str, errors: list[Exception]) -> None:
    try:
        ray.init(
            address=address, namespace="serve", log_to_driver=False, logging_level=logging.ERROR
        )
    except Exception as error:
        errors.append(error)


def silence_ray() -> None:
    """Prevent Ray from writing to the terminal, for the rest of this process.

    Parts of Ray write to the descriptor directly, and continue after an error that we have
    reported.
    """
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
