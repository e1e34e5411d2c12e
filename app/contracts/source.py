"""The interface through which an ingress receives news of models."""

from __future__ import annotations

from typing import Protocol

from app.contracts.credits import Demand, Renewal
from app.contracts.news import ModelNews
from app.contracts.stats import QueueReport


class SourceAway(Exception):
    """Serve's controller or a Model cannot be reached now; the last known state applies."""


class ModelSource(Protocol):
    """Supplies a registry with the models and their snapshots.

    Every method raises ``SourceAway`` or ``TimeoutError`` if the source cannot be reached. Any
    other exception is a fault.
    """

    async def applications(self) -> set[str]:
        """Return the names of the model applications that exist now."""
        ...

    async def renew(
        self, application: str, demand: Demand, report: QueueReport | None, known: str
    ) -> Renewal:
        """Renew the credits of this ingress.

        Args:
            application: the model's application.
            demand: what the ingress holds and wants.
            report: the ingress's report; ``None`` if none is due.
            known: the version of the last snapshot; empty for none.
        """
        ...

    async def news(self, application: str, life: str, number: int) -> ModelNews:
        """Return the state of a model, and its history after a point.

        Args:
            application: the model's application.
            life: the life of the Model in the last news; empty for none.
            number: the number in the last news.
        """
        ...

    async def wait_for_wakeup(self, application: str, ingress: str) -> bool:
        """Wait until this ingress should renew at once; ``False`` if that did not occur.

        It returns within a few seconds, so that a Model can shut down.
        """
        ...
