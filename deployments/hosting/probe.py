"""Finds out whether an engine hangs, by the smallest request that makes it generate."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from app.core.dialect import Dialect, Route
from app.core.tiers import Tier
from deployments.engines.base import POOLED_PROMPTS

DOUBT_S: Final = 2.0
"""How long a probe may take before the replica is offered no more, in seconds. A token at the head
of the engine's queue takes a step or two."""
_TEXT: Final = "1"


class HangProbe:
    """Whether an engine hangs, as far as probes have shown.

    Attributes:
        doubtful: whether a probe takes long, or the engine hangs: no requests should go there.
        hangs: whether a probe got no answer in time. Final.
    """

    def __init__(self, timeout_s: float) -> None:
        self.doubtful = self.hangs = False
        self._timeout_s = timeout_s
        self._runs = False

    async def run(self, ask: Callable[[], Awaitable[object]]) -> bool:
        """Ask for a token, unless a probe is under way or the engine is known to hang.

        Returns whether this probe has shown that it hangs.

        An engine that answers at once goes on getting requests meanwhile: one whose streams are
        silent only because they are suspended does.

        Raises:
            Exception: what ``ask`` raises. It shows that the engine does not hang.
        """
        if self._runs or self.hangs:
            return False
        self._runs = True
        doubt = asyncio.get_running_loop().call_later(DOUBT_S, self._doubt)
        try:
            async with asyncio.timeout(self._timeout_s):
                await ask()
        except TimeoutError:
            self.hangs = True
        finally:
            doubt.cancel()
            self._runs, self.doubtful = False, self.hangs
        return self.hangs

    def _doubt(self) -> None:
        self.doubtful = True


def probe_route(route: Route) -> Route:
    """Return the route on which to probe an engine that is silent on ``route``.

    Anthropic's routes run on those of chat completions, where the priority is in the body. Those
    that take no slot say nothing of what generates.
    """
    return Route.CHAT if route.is_anthropic or not route.takes_slot else route


def probe_request(model: str, route: Route, dialect: Dialect) -> dict[str, Any]:
    """Return the body of a request for a single token, with priority if the engine supports it.

    Where the engine preempts, it is ahead of priority, by as much as priority is ahead of default.
    The probe then takes a slot even if running priority requests have all of them.

    Args:
        model: the name that the engine serves the model under.
        route: the route that the request is for.
        dialect: the engine's request format.
    """
    prompt: Any = [{"role": "user", "content": _TEXT}] if route is Route.CHAT else _TEXT
    request = {"model": model, **POOLED_PROMPTS.get(route, {route.prompt_field: prompt})}
    if route is Route.RESPONSES:
        request["max_output_tokens"] = 1
    elif route.generates:
        request["max_tokens"] = 1
    if route in dialect.priority_routes:
        best, usual = (dialect.priority_values[tier] for tier in (Tier.PRIORITY, Tier.DEFAULT))
        request["priority"] = best + (best - usual) if dialect.preempts else best
    return request
