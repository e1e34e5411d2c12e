"""The models that requests can name, by id, alias and adapter, found among Serve's applications."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial

from app import supervision
from app.contracts.news import ModelNews
from app.contracts.source import ModelSource, SourceAway
from app.contracts.status import ModelSnapshot
from app.contracts.traffic import Traffic
from app.core import errors
from app.flow.admission import Admission
from app.flow.renewal import Renewals

logger = logging.getLogger("ray.serve")

_CALL_TIMEOUT_S = 5.0
_TRY_AGAIN_S = 1.0
_NEWS_TIMEOUT_S = 1.0


class ModelRegistry:
    """The models that requests can name, kept up to date in the background.

    Args:
        source: where they are.
        discover_s: seconds between two looks for applications that have come or gone.
        nameless_s: how long a request for an unknown name is asked to try again because a model
            has not told its names yet, in seconds.

    Attributes:
        traffic: returns what has happened to the requests of a model, by its id; it is reported to
            the Model. ``Services`` sets it.
    """

    def __init__(self, source: ModelSource, *, discover_s: float, nameless_s: float = 30.0) -> None:
        self._source = source
        self.traffic: Callable[[str], Traffic] = lambda _: Traffic()
        self._nameless_s = nameless_s
        self._discover_s = discover_s
        self._ingress = uuid.uuid4().hex
        self._admissions: dict[str, Admission] = {}
        self._by_name: dict[str, Admission] = {}
        self._renewals: dict[str, Renewals] = {}
        self._found: dict[str, float] = {}
        self._discoverer: asyncio.Task[None] | None = None
        self._discovered = False
        self._news = asyncio.Event()

    @property
    def ingress(self) -> str:
        """The name of this ingress; a restarted ingress gets another one."""
        return self._ingress

    @property
    def ingresses(self) -> int:
        """How many ingresses there are, as last reported by the models; at least 1."""
        return max((one.ingresses for one in self._admissions.values()), default=1)

    def start(self) -> None:
        """Start to track the models. Call it on the running event loop."""
        self._discoverer = supervision.keep_running("model discovery", self._discover)

    async def wait_known(self, timeout_s: float) -> None:
        """Wait until every model is known, for ``timeout_s`` seconds at most: one may be away.

        An ingress that accepted requests earlier would answer that there is no such model.
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
        """Yield the applications that were found but have not reported their models' names."""
        for application in self._found:
            admission = self._admissions.get(application)
            if admission is None or not admission.known:
                yield application

    async def stop(self) -> None:
        """End the background tasks."""
        stops = [renewals.stop() for renewals in self._renewals.values()]
        await asyncio.gather(supervision.stop(self._discoverer), *stops)

    def set_interval(self, discover_s: float) -> None:
        """Change the interval of discovery, in seconds, from the next round on."""
        self._discover_s = discover_s

    def find(self, name: str) -> Admission | None:
        """Return the model with this id, alias or adapter; ``None`` if there is none."""
        return self._by_name.get(name)

    def require(self, name: str) -> Admission:
        """Return the model with this id, alias or adapter.

        Raises:
            ModelNotFound: there is none.
            Unavailable: it may belong to an application that has not reported its names yet.
        """
        admission = self._by_name.get(name)
        if admission is not None:
            return admission
        since = time.monotonic() - self._nameless_s
        if not self._discovered or any(self._found[one] > since for one in self._nameless()):
            raise errors.unlisted(name, _TRY_AGAIN_S)
        raise errors.ModelNotFound(name)

    def admissions(self) -> list[Admission]:
        """Return the admissions of all models that are known."""
        return [one for one in self._admissions.values() if one.known]

    def models(self) -> list[ModelSnapshot]:
        """Return every model, by id."""
        return sorted(
            {one.snapshot.id: one.snapshot for one in self._by_name.values()}.values(),
            key=lambda snapshot: snapshot.id,
        )

    async def news(self, seen: Mapping[str, tuple[str, int]]) -> dict[str, ModelNews | None]:
        """Return the news of every model application; ``None`` for one that does not answer.

        ``seen`` is what is known of each: the life and the number in its last news.
        """
        applications = list(self._renewals)
        asked = [self._news_of(name, *seen.get(name, ("", 0))) for name in applications]
        return dict(zip(applications, await asyncio.gather(*asked), strict=True))

    async def news_of(self, model: str, seen: tuple[str, int]) -> ModelNews | None:
        """Return the news of the model with this id; ``None`` if it is gone or does not answer.

        ``seen`` is the life and the number in its last news; an empty life for none.
        """
        wanted = self._by_name.get(model)
        for application, admission in self._admissions.items():
            if admission is wanted:
                return await self._news_of(application, *seen)
        return None

    async def _news_of(self, application: str, life: str, number: int) -> ModelNews | None:
        try:
            async with asyncio.timeout(_NEWS_TIMEOUT_S):
                return await self._source.news(application, life, number)
        except (SourceAway, TimeoutError) as error:
            # Its renewals, which go to the same actor, log that it is away.
            logger.debug("no news of %s: %s", application, type(error).__name__)
            return None

    async def _discover(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_CALL_TIMEOUT_S):
                    applications = await self._source.applications()
            except (SourceAway, TimeoutError) as error:
                # Serve's controller is away. Known models are still served.
                logger.warning("cannot list model applications: %s", str(error) or "no answer")
            else:
                self._follow_only(applications)
                self._discovered = True
                self._news.set()
            await asyncio.sleep(self._discover_s)

    def _follow_only(self, applications: set[str]) -> None:
        for gone in self._renewals.keys() - applications:
            self._renewals.pop(gone).cancel()
            del self._found[gone]
            self._admissions.pop(gone).close()
            self._reindex()
        for new in applications - self._renewals.keys():
            self._found[new] = time.monotonic()
            self._follow(new)

    def _follow(self, application: str) -> None:
        admission = self._admissions[application] = Admission(self._ingress)
        renewals = self._renewals[application] = Renewals(
            self._source,
            application,
            self._ingress,
            admission,
            partial(self._update, admission),
            lambda model: self.traffic(model),
        )
        renewals.start()

    def _update(self, admission: Admission, snapshot: ModelSnapshot) -> None:
        names = _names(admission.snapshot) if admission.known else ()
        admission.update(snapshot)
        if names != _names(snapshot):
            self._reindex()
        self._news.set()

    def _reindex(self) -> None:
        by_name: dict[str, Admission] = {}
        # Ids take precedence over aliases, and those over adapters. Applications are sorted by
        # name, so that every ingress assigns a name that is claimed twice to the same model.
        admissions = [one for _, one in sorted(self._admissions.items()) if one.known]
        for admission in admissions:
            _claim(by_name, [admission.snapshot.id], admission)
        for admission in admissions:
            _claim(by_name, admission.snapshot.aliases, admission)
        for admission in admissions:
            _claim(by_name, admission.snapshot.adapters, admission)
        self._by_name = by_name


def _names(snapshot: ModelSnapshot) -> tuple[str, ...]:
    return (snapshot.id, *snapshot.aliases, *snapshot.adapters)


def _claim(by_name: dict[str, Admission], names: Iterable[str], admission: Admission) -> None:
    for name in names:
        owner = by_name.setdefault(name, admission)
        if owner is not admission:
            logger.error("model name %r is claimed twice; %s keeps it", name, owner.snapshot.id)
