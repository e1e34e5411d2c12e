"""The OpenAI-compatible ingress: its routes and its Serve deployment."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from ray import serve
from sqlalchemy import Engine

from app import supervision
from app.config.ingress import LONGEST_STOP_S, IngressSettings
from app.core.settings import Problem, SettingsError
from app.gateway.asgi import Front, build_api
from app.gateway.gc_tuning import settle_in
from app.gateway.key_admin import KeyAdmin
from app.gateway.registry import ModelRegistry
from app.gateway.serve_source import ServeSource, serve_http
from app.gateway.services import Services
from app.gateway.spend_counter import SpendCounter
from app.gateway.telemetry import Telemetry
from app.gateway.usage_reader import UsageReader
from app.haproxy.config import client_proof
from app.ledger.ledger import open_ledger
from app.ledger.record_store import RecordStore
from app.observe.access_log import AccessLog
from app.observe.tracing import tracing_of
from app.ray_compat.serve_logs import leave_out_logged, note_logged, replica_log
from app.ray_compat.serve_port import keep_on_loopback
from app.store.database import connect
from app.store.database_url import resolve_url
from app.tenants import deployment
from app.tenants.access import Access
from app.tenants.budget_gate import BudgetGate
from app.tenants.budget_webhook import receiver_of
from app.tenants.deployment import ServeLimits
from app.tenants.key_store import KeyStore
from app.upstream.client import EngineClient
from app.web.routes import add_web_routes

# Longer than a Model's first answer takes on a busy machine; one that is away must not hold up the
# others for ever.
_KNOWN_WITHIN_S = 15.0


class Ingress:
    """The data plane: takes requests in, passes them to engines, and stamps the answers."""

    def __init__(self, limits: Any) -> None:
        keep_on_loopback()
        leave_out_logged()
        settings = IngressSettings()
        registry = ModelRegistry(ServeSource(), discover_s=settings.discovery_interval_s)
        self.services = Services(registry, EngineClient(), settings)
        self.services.proxy_proof = client_proof(os.environ)
        self._limits = ServeLimits(limits)
        self._store: Engine | None = None
        self._access: Access | None = None
        self._budgets: BudgetGate | None = None
        self._key_admin: KeyAdmin | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._access_log = AccessLog(partial(replica_log, "access"), note_logged)
        self.services.observers.add(self._access_log)
        self._tracing = tracing_of(os.environ, registry.ingress)
        if self._tracing is not None:
            self.services.begin_trace = self._tracing.begin
            self.services.observers.add(self._tracing)
        registry.start()
        exporter = Telemetry(self.services).exporter
        self._exporting = supervision.keep_running("metrics", exporter.run)

    # Not a plain function: those Serve calls on a thread, and the ledger belongs to the event loop.
    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over changed settings; requests under way keep those they began with.

        Raises:
            SettingsError: ``user_config`` has an unknown key or a bad value, lets everybody in
                from a network without saying so twice, or names a secret that is not there.
            OSError: the folder of the journal or of the access log cannot be written.
        """
        settings = IngressSettings.load(user_config, "user_config")
        http = await serve_http()
        settings.check_open(http.host, "user_config")
        self.services.longest_request_s = http.request_timeout_s
        receiver = None
        if (webhook := settings.budget_alert_webhook) is not None:
            where = ("user_config", "budget_alert_webhook")
            receiver = await asyncio.to_thread(receiver_of, webhook, *where)
        before, first = self.services.settings, self._store is None
        new_store = first or settings.ledger != before.ledger
        old, store = self._store, self._connect(settings) if new_store else self._store
        assert store is not None
        # The steps that may fail for what is on this machine: so nothing has been changed yet.
        with self._access_log.change(settings.access_log) as old_log:
            if new_store or settings.journal != before.journal:
                self._open_ledger(store, settings)
        if old_log is not None:
            self._retire("access log", partial(asyncio.to_thread, old_log.close))
        self._store, self.services.settings = store, settings
        self.services.budget_webhook.change(receiver)
        if new_store or settings.usage != before.usage:
            self._open_usage(settings)
        self._open_accounts(store, settings, new_store=new_store)
        if new_store and old is not None:
            self._retire("store disposal", partial(self._dispose, old))
        self.services.registry.set_interval(settings.discovery_interval_s)
        if not self.services.ready.is_set():
            await self.services.registry.wait_known(_KNOWN_WITHIN_S)
            settle_in()
            self.services.ready.set()

    def _connect(self, settings: IngressSettings) -> Engine:
        return connect(resolve_url(settings.ledger.get_secret_value()))

    def _open_ledger(self, store: Engine, settings: IngressSettings) -> None:
        old = self.services.ledger
        self.services.ledger = open_ledger(store, settings.journal)
        if old is not None:
            self._retire("ledger retirement", old.retire)

    def _open_usage(self, settings: IngressSettings) -> None:
        old = self.services.usage
        url = resolve_url(settings.ledger.get_secret_value())
        self.services.usage = UsageReader(url, settings.usage)
        if old is not None:
            self._retire("usage reader", partial(asyncio.to_thread, old.close))

    def _open_accounts(self, store: Engine, settings: IngressSettings, *, new_store: bool) -> None:
        """Have keys asked for or not, and read from the store that is in force.

        There is one ``Access`` as long as the ingress lives. Requests wait in it, and the books
        of the limits know what it has told them.
        """
        if self._access is None and settings.auth == "keys":
            registry = self.services.registry
            self._access = Access(
                registry.ingress, KeyStore(store), self._limits, lambda: registry.ingresses
            )
            self._access.start()
            self._key_admin = KeyAdmin(KeyStore(store))
            self._budgets = BudgetGate(
                registry.ingress, self._limits, RecordStore(store).spent,
                self.services.budget_webhook.tell,
            )  # fmt: skip
            self._budgets.start()
            self.services.observers.add(SpendCounter(self._budgets))
        elif self._access is not None and self._budgets is not None and new_store:
            self._access.read_keys_from(KeyStore(store))
            self._budgets.read_from(RecordStore(store).spent)
            if self._key_admin is not None:
                self._key_admin.use(KeyStore(store))
        keyed = settings.auth == "keys"
        self.services.access = self._access if keyed else None
        self.services.budgets = self._budgets if keyed else None
        self.services.key_admin = self._key_admin if keyed else None

    def _retire(self, name: str, end: Callable[[], Awaitable[None]]) -> None:
        """Let something come to its end that requests under way may still use."""
        task = supervision.run_once(name, end)
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _dispose(self, store: Engine) -> None:
        """Close a store's connections, once those are gone who use it."""
        users = self._retiring - {asyncio.current_task()}
        await asyncio.gather(*users, return_exceptions=True)
        store.dispose()

    def __serve_build_asgi_app__(self) -> Front:
        return build_api(self.services, add_web_routes)

    async def __del__(self) -> None:
        self.services.draining = True
        await supervision.stop(self._exporting)
        await self.services.registry.stop()
        await self.services.engines.close()
        if self.services.ledger is not None:
            await self.services.ledger.close()
        if self._access is not None:
            await self._access.stop()
        if self._budgets is not None:
            await self._budgets.stop()
        await self.services.budget_webhook.stop()
        if self._key_admin is not None:
            await asyncio.to_thread(self._key_admin.close)
        if self.services.usage is not None:
            await asyncio.to_thread(self.services.usage.close)
        await asyncio.to_thread(self._access_log.close)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        await asyncio.gather(*self._retiring)
        if self._store is not None:
            self._store.dispose()


_deployment = serve.deployment(
    name="Ingress",
    # Requests never wait in Serve's own queue, which knows no tiers.
    max_ongoing_requests=100_000,
    # Serve sees that one has died when it checks it.
    health_check_period_s=2.0,
    # Serve would cut what has not ended twenty seconds after an ingress was told to stop.
    graceful_shutdown_timeout_s=LONGEST_STOP_S,
    # Where the last one must go for a new one to come, nobody would be served meanwhile.
    max_surge_percent=100,
    # Serve passes settings on only where there are some.
    user_config={},
)(serve.ingress()(Ingress))


def build(args: dict[str, Any]) -> serve.Application:
    """Return the ingress application; the ``import_path`` in a Serve config file.

    Raises:
        SettingsError: ``args`` is not empty; the ingress is set by ``user_config``.
    """
    if args:
        raise SettingsError(
            *(Problem(("args", key), "the ingress is set by user_config") for key in args)
        )
    return _deployment.bind(deployment.deployment.bind())
