"""Finding model applications, and following what each can do now."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, Protocol

from ray import serve

from app.placement import Placer
from app.snapshot import ModelSnapshot
from app.tiers import PriorityMode, Tier

logger = logging.getLogger("ray.serve")

MODEL_DEPLOYMENT = "Model"
"""The deployment that makes a Serve application a model application."""
_CALL_TIMEOUT_S = 5.0


class ModelSource(Protocol):
    """Where a catalogue learns about models."""

    async def applications(self) -> set[str]:
        """Return the names of the model applications that exist now."""
        ...

    async def snapshot(self, application: str, known: str) -> tuple[str, ModelSnapshot] | None:
        """Return a model as it is now, with its version; ``None`` if that is still ``known``."""
        ...


class ServeSource:
    """Learns about models from Ray Serve."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}

    async def applications(self) -> set[str]:
        status = await asyncio.to_thread(serve.status)
        return {
            name
            for name, application in status.applications.items()
            if MODEL_DEPLOYMENT in application.deployments
        }

    async def snapshot(self, application: str, known: str) -> tuple[str, ModelSnapshot] | None:
        handle = self._handles.get(application)
        if handle is None:
            handle = serve.get_deployment_handle(MODEL_DEPLOYMENT, app_name=application)
            self._handles[application] = handle
        answer: tuple[str, ModelSnapshot] | None = await handle.snapshot.remote(known)
        return answer


class Catalog:
    """The models that requests can name, kept up to date in the background."""

    def __init__(self, source: ModelSource, *, discover_s: float, follow_s: float) -> None:
        self._source = source
        self._discover_s = discover_s
        self._follow_s = follow_s
        self._placers: dict[str, Placer] = {}
        self._by_name: dict[str, Placer] = {}
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._discoverer: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow the models. Call it on the running event loop."""
        self._discoverer = asyncio.create_task(self._discover())

    async def stop(self) -> None:
        """End the background tasks."""
        tasks = [task for task in (self._discoverer, *self._followers.values()) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def set_intervals(self, *, discover_s: float, follow_s: float) -> None:
        """Change how often models are looked for and asked, from the next time on."""
        self._discover_s, self._follow_s = discover_s, follow_s

    def find(self, name: str) -> Placer | None:
        """Return the model with this id or alias."""
        return self._by_name.get(name)

    def models(self) -> list[ModelSnapshot]:
        """Return every model, by id."""
        return sorted(
            {placer.snapshot.id: placer.snapshot for placer in self._by_name.values()}.values(),
            key=lambda snapshot: snapshot.id,
        )

    async def _discover(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_CALL_TIMEOUT_S):
                    self._follow_only(await self._source.applications())
            except Exception as error:
                # Serve's controller is away; what is known goes on being served.
                logger.warning("cannot list model applications: %s", type(error).__name__)
            await asyncio.sleep(self._discover_s)

    def _follow_only(self, applications: set[str]) -> None:
        for gone in self._followers.keys() - applications:
            self._followers.pop(gone).cancel()
            self._placers.pop(gone, None)
            self._reindex()
        for new in applications - self._followers.keys():
            self._followers[new] = asyncio.create_task(self._follow(new))

    async def _follow(self, application: str) -> None:
        known, away = "", False
        while True:
            try:
                async with asyncio.timeout(_CALL_TIMEOUT_S):
                    news = await self._source.snapshot(application, known)
                if news is not None:
                    known, snapshot = news
                    self._take(application, snapshot)
                away = False
            except Exception as error:
                # The Model actor is away or starting: its last word stands until it is back.
                if not away:
                    logger.info("no news of %s: %s", application, type(error).__name__)
                away = True
            await asyncio.sleep(self._follow_s)

    def _take(self, application: str, snapshot: ModelSnapshot) -> None:
        placer = self._placers.get(application)
        if placer is None:
            self._placers[application] = Placer(snapshot)
            self._reindex()
            return
        renamed = _names(placer.snapshot) != _names(snapshot)
        placer.update(snapshot)
        if renamed:
            self._reindex()

    def _reindex(self) -> None:
        by_name: dict[str, Placer] = {}
        # Ids come before aliases, and applications in the order of their names, so that every
        # ingress gives a name that is claimed twice to the same model.
        placers = [self._placers[name] for name in sorted(self._placers)]
        for placer in placers:
            _claim(by_name, [placer.snapshot.id], placer)
        for placer in placers:
            _claim(by_name, placer.snapshot.aliases, placer)
        self._by_name = by_name


def _names(snapshot: ModelSnapshot) -> tuple[str, ...]:
    return (snapshot.id, *snapshot.aliases)


def _claim(by_name: dict[str, Placer], names: Iterable[str], placer: Placer) -> None:
    for name in names:
        owner = by_name.setdefault(name, placer)
        if owner is not placer:
            logger.error("model name %r is claimed twice; %s keeps it", name, owner.snapshot.id)


def model_entry(snapshot: ModelSnapshot) -> dict[str, Any]:
    """Return a model as the models list shows it.

    ``metadata`` follows DeepInfra's models list (``tags``, ``context_length``, ``pricing`` with
    ``input_tokens``, ``output_tokens`` and ``cache_read_tokens`` in USD for a million tokens),
    with the prices by tier; ``service_tiers`` follows Telnyx's.
    """
    served = snapshot.service_tiers
    return {
        "id": snapshot.id,
        "object": "model",
        "created": snapshot.created,
        "owned_by": snapshot.owned_by,
        "service_tiers": [tier.value for tier in served],
        "metadata": {
            "tags": _tags(snapshot),
            "context_length": snapshot.context_length,
            "engines": list(snapshot.engines),
            "aliases": list(snapshot.aliases),
            "pricing": _pricing(snapshot),
        },
    }


def _tags(snapshot: ModelSnapshot) -> list[str]:
    tags = [tier.value for tier in snapshot.service_tiers if tier is not Tier.DEFAULT]
    if any(replica.dialect.simulated for replica in snapshot.replicas):
        tags.append("simulated")
    return tags


def _pricing(snapshot: ModelSnapshot) -> dict[str, Any]:
    card, tiers = snapshot.settings.rate_card, snapshot.settings.tiers
    offered = {
        Tier.PRIORITY: tiers.priority is not PriorityMode.OFF,
        Tier.DEFAULT: True,
        Tier.FLEX: tiers.flex,
    }
    # While nothing is ready the offer stands in for what would be served.
    shown = snapshot.service_tiers or [tier for tier in Tier if offered[tier]]
    return {
        tier.value: {
            "input_tokens": float(card.by_tier[tier]["input"]),
            "output_tokens": float(card.by_tier[tier]["output"]),
            "cache_read_tokens": float(card.by_tier[tier]["cached_input"]),
        }
        for tier in shown
    }
