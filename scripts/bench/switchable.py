"""The ingress of the overhead benchmark: a request may ask that no observer hears of its end.

So turns with and without metrics, access log and traces go through the same process. The ingress
itself has no such switch: the board and the reports to the Models need the same counts.
"""

from __future__ import annotations

from typing import Any, Final

from ray import serve

from app.gateway.asgi import Front
from app.gateway.handler import Receive, Scope
from app.gateway.response import Send
from app.gateway.services import Services
from app.ingress import Ingress
from app.observe.observers import Observers
from app.tenants import deployment

UNOBSERVED: Final = "x-bench-metrics: off"
"""The request header. Requests with it and without must not run at the same time."""
_HEADER: Final = (b"x-bench-metrics", b"off")


class Switchable:
    """The HTTP application of an ingress, behind the switch."""

    routes: tuple[()] = ()

    def __init__(self, services: Services, front: Front) -> None:
        self._services = services
        self._front = front
        self._all = services.observers
        self._nobody = Observers()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            off = _HEADER in scope["headers"]
            self._services.observers = self._nobody if off else self._all
        await self._front(scope, receive, send)


class SwitchableIngress(Ingress):
    """The Serve deployment."""

    def __serve_build_asgi_app__(self) -> Any:
        return Switchable(self.services, super().__serve_build_asgi_app__())


_deployment = serve.deployment(
    name="Ingress", max_ongoing_requests=100_000, health_check_period_s=2.0, user_config={}
)(serve.ingress()(SwitchableIngress))


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application, in place of ``app.ingress:build``."""
    return _deployment.bind(deployment.deployment.bind())
