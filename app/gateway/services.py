"""What every request in an ingress uses."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from app.config.ingress import IngressSettings
from app.gateway.registry import ModelRegistry
from app.gateway.request_body import Bodies
from app.gateway.usage_reader import UsageReader
from app.ledger.ledger import Ledger
from app.tenants.access import Access
from app.upstream.client import EngineClient


@dataclass(slots=True)
class Services:
    """What every request uses; owned by the ``Ingress`` deployment.

    ``ledger`` and ``usage``, where its records are read, are there once the settings are, which is
    before the first request. ``access`` is there where keys are asked for. ``bodies`` reads
    request bodies and bounds their memory. ``ready`` is set once all of it is there and the models
    are known: Serve lets requests in before its first call of ``reconfigure``, and they wait for
    that. ``draining`` is set when this ingress comes to its end.
    """

    registry: ModelRegistry
    engines: EngineClient
    settings: IngressSettings
    ledger: Ledger | None = None
    access: Access | None = None
    usage: UsageReader | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    draining: bool = False
    bodies: Bodies = field(default_factory=Bodies)

    def current_ledger(self) -> Ledger:
        """Return the ledger that is in force; a change of the settings replaces it."""
        assert self.ledger is not None, "settings come before requests"
        return self.ledger
