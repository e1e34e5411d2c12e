"""Finding model applications, and following what each can do now."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from app import supervision
from app.contracts.stats import QueueReport
from app.contracts.status import ModelSnapshot, Renewal
from app.core import errors
from app.core.tiers import PriorityMode, Tier
from app.flow.admission import Admission
from app.flow.credits import Demand
from app.ray_compat.controller import serve_controller

logger = logging.getLogger("ray.serve")

MODEL_DEPLOYMENT = "Model"
"""The deployment that makes a Serve application a model application."""
_CALL_TIMEOUT_S = 5.0
# Well below the silence after which credits are lost: a Model that is away must be noticed before.
_RENEWAL_TIMEOUT_S = 1.0
_LISTEN_AGAIN_S = 1.0
# A model that has not told its names for this long is none that a request can wait for.
_NAMELESS_S = 30.0
_TRY_AGAIN_S = 1.0


class SourceAway(Exception):
    """Serve's controller or a Model cannot be asked now; what is known stands meanwhile."""


class ModelSource(Protocol):
    """Where a catalogue learns about models.

    Every method raises ``SourceAway`` or ``TimeoutError`` where it cannot be asked; anything else
    that it raises is a fault.
    """

    async def applications(self) -> set[str]:
        """Return the names of the model applications that exist now."""
        ...

    async def renew(
        self, application: str, demand: Demand, report: QueueReport | None, known: str
    ) -> Renewal:
        """Renew the credits of this ingress.

        Args:
            application: the model's.
            demand: what the ingress holds and wants.
            report: what it has to tell people, where that is due.
            known: the version of the last snapshot.
        """
        ...

    async def nudged(self, application: str, ingress: str) -> bool:
        """Wait until this ingress ought to renew at once; ``False`` if nothing came up.

        It returns after a few seconds at the latest, so that a Model can end.
        """
        ...


class ServeSource:
    """Learns about models from Ray Serve."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        self._controller: Any = None

    async def applications(self) -> set[str]:
        # `serve.status()` tells this too, but it takes milliseconds of the ingress's event loop
        # for every deployment, as it builds each one's whole configuration.
        with _away_translated():
            if self._controller is None:
                # Ray restarts it under the same handle.
                self._controller = await asyncio.to_thread(serve_controller)
            deployments = await self._controller.list_deployment_ids.remote()
        return {one.app_name for one in deployments if one.name == MODEL_DEPLOYMENT}

    async def renew(
        self, application: str, demand: Demand, report: QueueReport | None, known: str
    ) -> Renewal:
        with _away_translated():
            renewal: Renewal = await self._model(application).renew.remote(demand, report, known)
        return renewal

    async def nudged(self, application: str, ingress: str) -> bool:
        with _away_translated():
            nudged: bool = await self._model(application).nudged.remote(ingress)
        return nudged

    def _model(self, application: str) -> Any:
        handle = self._handles.get(application)
        if handle is None:
            handle = serve.get_deployment_handle(MODEL_DEPLOYMENT, app_name=application)
            self._handles[application] = handle
        return handle


@contextmanager
def _away_translated() -> Iterator[None]:
    """Translate what Ray and Serve raise where somebody cannot be asked, or fails to answer."""
    try:
        yield
    # Of these Ray's `get_actor` raises the ValueError, where Serve does not run.
    except (RayError, RayServeException, ConnectionError, ValueError) as error:
        raise SourceAway(type(error).__name__) from error


async def serve_host() -> str | None:
    """Return the address that Serve's HTTP front listens on; ``None`` for all of them."""
    controller = await asyncio.to_thread(serve_controller)
    options = await controller.get_http_config.remote()
    host: str | None = options.host
    return host


class ModelRegistry:
    """The models that requests can name, kept up to date in the background."""

    def __init__(self, source: ModelSource, *, discover_s: float) -> None:
        self._source = source
        self._discover_s = discover_s
        self._ingress = uuid.uuid4().hex
        self._admissions: dict[str, Admission] = {}
        self._by_name: dict[str, Admission] = {}
        self._followers: dict[str, tuple[asyncio.Task[None], ...]] = {}
        self._found: dict[str, float] = {}
        self._discoverer: asyncio.Task[None] | None = None
        self._discovered = False
        self._news = asyncio.Event()

    @property
    def ingress(self) -> str:
        """The name of this ingress, never used again after a restart."""
        return self._ingress

    @property
    def ingresses(self) -> int:
        """How many ingresses there are, as the models said last; at least 1."""
        return max((one.ingresses for one in self._admissions.values()), default=1)

    def start(self) -> None:
        """Begin to follow the models. Call it on the running event loop."""
        self._discoverer = supervision.keep_running("model discovery", self._discover)

    async def wait_known(self, timeout_s: float) -> None:
        """Return once every model is known, or after a time: one of them may be away.

        An ingress that takes requests before would answer that there is no such model.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._all_known:
                    self._news.clear()
                    await self._news.wait()

    @property
    def _all_known(self) -> bool:
        return self._discovered and next(self._nameless(), None) is None

    def _nameless(self) -> Iterator[str]:
        """Yield the applications that were found and have not told their models' names."""
        for application in self._found:
            admission = self._admissions.get(application)
            if admission is None or not admission.known:
                yield application

    async def stop(self) -> None:
        """End the background tasks."""
        followers = (task for tasks in self._followers.values() for task in tasks)
        await supervision.stop(self._discoverer, *followers)

    def set_interval(self, discover_s: float) -> None:
        """Change how often models are looked for, from the next time on."""
        self._discover_s = discover_s

    def find(self, name: str) -> Admission | None:
        """Return the model with this id or alias."""
        return self._by_name.get(name)

    def require(self, name: str) -> Admission:
        """Return the model with this id or alias.

        Raises:
            ModelNotFound: there is none.
            Unavailable: it may be that of an application that has not told its names yet.
        """
        admission = self._by_name.get(name)
        if admission is not None:
            return admission
        since = time.monotonic() - _NAMELESS_S
        if not self._discovered or any(self._found[one] > since for one in self._nameless()):
            raise errors.unlisted(name, _TRY_AGAIN_S)
        raise errors.ModelNotFound(name)

    def models(self) -> list[ModelSnapshot]:
        """Return every model, by id."""
        return sorted(
            {one.snapshot.id: one.snapshot for one in self._by_name.values()}.values(),
            key=lambda snapshot: snapshot.id,
        )

    async def _discover(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_CALL_TIMEOUT_S):
                    applications = await self._source.applications()
            except (SourceAway, TimeoutError) as error:
                # Serve's controller is away; what is known goes on being served.
                logger.warning("cannot list model applications: %s", str(error) or "no answer")
            else:
                self._follow_only(applications)
                self._discovered = True
                self._news.set()
            await asyncio.sleep(self._discover_s)

    def _follow_only(self, applications: set[str]) -> None:
        for gone in self._followers.keys() - applications:
            for task in self._followers.pop(gone):
                task.cancel()
            del self._found[gone]
            self._admissions.pop(gone).close()
            self._reindex()
        for new in applications - self._followers.keys():
            self._found[new] = time.monotonic()
            self._follow(new)

    def _follow(self, application: str) -> None:
        admission = self._admissions[application] = Admission(self._ingress)

        async def renew() -> None:
            await self._renew(application, admission)

        async def listen() -> None:
            await self._listen(application, admission)

        self._followers[application] = (
            supervision.keep_running("credit renewal", renew, about=application),
            supervision.keep_running("nudge listener", listen, about=application),
        )

    async def _listen(self, application: str, admission: Admission) -> None:
        """Renew when the Model asks for it. Should that fail, renewals go on as they are due."""
        while True:
            try:
                async with asyncio.timeout(_CALL_TIMEOUT_S):
                    nudged = await self._source.nudged(application, self._ingress)
            except (SourceAway, TimeoutError) as error:
                logger.debug("cannot listen to %s: %s", application, error)
                await asyncio.sleep(_LISTEN_AGAIN_S)
            else:
                if nudged:
                    admission.nudge()

    async def _renew(self, application: str, admission: Admission) -> None:
        """Renew credits, and follow the model. Begun anew, it asks for the whole model again."""
        known, away = "", False
        while True:
            demand, report = admission.demand(), admission.report()
            try:
                async with asyncio.timeout(_RENEWAL_TIMEOUT_S):
                    renewal = await self._source.renew(application, demand, report, known)
            except (SourceAway, TimeoutError) as error:
                # The Model actor is away or starting: its last word stands until it is back.
                admission.renewal_failed(demand)
                if not away:
                    logger.info("no news of %s: %s", application, str(error) or "no answer")
                away = True
            else:
                away = False
                self._take(admission, renewal)
                # Only now: a snapshot that could not be applied must be sent again.
                known = renewal.version
            await admission.wait_for_renewal()

    def _take(self, admission: Admission, renewal: Renewal) -> None:
        """Apply a Model's answer: its grant also where its snapshot cannot be applied."""
        try:
            if renewal.snapshot is not None:
                self._update(admission, renewal.snapshot)
        finally:
            admission.receive(renewal.grant)

    def _update(self, admission: Admission, snapshot: ModelSnapshot) -> None:
        names = _names(admission.snapshot) if admission.known else ()
        admission.update(snapshot)
        if names != _names(snapshot):
            self._reindex()
        self._news.set()

    def _reindex(self) -> None:
        by_name: dict[str, Admission] = {}
        # Ids come before aliases, and applications in the order of their names, so that every
        # ingress gives a name that is claimed twice to the same model.
        admissions = [one for _, one in sorted(self._admissions.items()) if one.known]
        for admission in admissions:
            _claim(by_name, [admission.snapshot.id], admission)
        for admission in admissions:
            _claim(by_name, admission.snapshot.aliases, admission)
        self._by_name = by_name


def _names(snapshot: ModelSnapshot) -> tuple[str, ...]:
    return (snapshot.id, *snapshot.aliases)


def _claim(by_name: dict[str, Admission], names: Iterable[str], admission: Admission) -> None:
    for name in names:
        owner = by_name.setdefault(name, admission)
        if owner is not admission:
            logger.error("model name %r is claimed twice; %s keeps it", name, owner.snapshot.id)


def model_entry(snapshot: ModelSnapshot) -> dict[str, Any]:
    """Return a model as the models list shows it.

    ``metadata`` follows DeepInfra's models list (``tags``, ``context_length``, ``pricing`` with
    ``input_tokens``, ``output_tokens`` and ``cache_read_tokens`` in USD for a million tokens),
    with the prices by tier; ``service_tiers`` follows Telnyx's. ``state`` is our own
    (``Availability``).
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
            "state": snapshot.state.value,
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
