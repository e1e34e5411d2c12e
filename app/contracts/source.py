"""Where an ingress learns about models: the interface of it."""

from __future__ import annotations

from typing import Protocol

from app.contracts.credits import Demand, Renewal
from app.contracts.stats import QueueReport


class SourceAway(Exception):
    """Serve's controller or a Model cannot be asked now; what is known stands meanwhile."""


class ModelSource(Protocol):
    """Where a registry learns about models.

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

    async def wait_for_wakeup(self, application: str, ingress: str) -> bool:
        """Wait until this ingress ought to renew at once; ``False`` if nothing came up.

        It returns after a few seconds at the latest, so that a Model can end.
        """
        ...
