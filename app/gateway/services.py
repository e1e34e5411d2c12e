"""The objects that all requests in an ingress share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from app.config.ingress import IngressSettings
from app.gateway.key_admin import KeyAdmin
from app.gateway.registry import ModelRegistry
from app.gateway.request_body import Bodies
from app.gateway.usage_reader import UsageReader
from app.ledger.ledger import Ledger
from app.observe.observers import Observers
from app.observe.request_trace import RequestTrace, pass_on
from app.observe.tallies import Tallies
from app.tenants.access import Access
from app.tenants.budget_gate import BudgetGate
from app.tenants.budget_webhook import BudgetWebhook
from app.upstream.client import EngineClient


@dataclass(slots=True)
class Services:
    """The objects that all requests share; owned by the ``Ingress`` deployment.

    Attributes:
        registry: the models.
        engines: the connections to engines.
        settings: the settings in force.
        ledger: the ledger in force. It is set together with the settings, before any request is
            handled.
        access: keys and limits; ``None`` if no keys are required.
        usage: reads the ledger's records; set together with ``ledger``.
        ready: set once all objects exist and the models are known. Serve admits requests before its
            first call of ``reconfigure``; they wait for this event.
        draining: set when this ingress is stopping.
        bodies: reads request bodies and bounds their memory.
        observers: are told of every request that has ended.
        begin_trace: returns the trace of a request with these headers, if there is one.
        tallies: one of them: counts the requests of each model.
        budgets: holds requests to budgets; set together with ``access``.
        budget_webhook: sends the alerts of budgets, if the settings have a receiver.
        key_admin: reads and changes keys for admin keys; set together with ``access``.
        proxy_proof: what HAProxy's word on a client's address begins with; ``None`` if there is no
            such word to believe (``app.gateway.client_address``).
        longest_request_s: Serve's ``request_timeout_s``; ``None`` for no limit.
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
    observers: Observers = field(default_factory=Observers)
    begin_trace: Callable[[Mapping[bytes, bytes]], RequestTrace | None] = pass_on
    tallies: Tallies = field(default_factory=Tallies)
    budgets: BudgetGate | None = None
    budget_webhook: BudgetWebhook = field(default_factory=BudgetWebhook)
    key_admin: KeyAdmin | None = None
    proxy_proof: str | None = None
    longest_request_s: float | None = None

    def __post_init__(self) -> None:
        self.observers.add(self.tallies)
        self.registry.traffic = self.tallies.of

    def current_ledger(self) -> Ledger:
        """Return the ledger in force. A change of the settings replaces it."""
        assert self.ledger is not None, "settings come before requests"
        return self.ledger
