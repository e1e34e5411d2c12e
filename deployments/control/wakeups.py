"""Telling ingresses that they ought to renew now, on an event loop."""

from __future__ import annotations

import asyncio

from app.flow.credits import SILENCE_S


class Wakeups:
    """Who listens for wakeups, and who was woken while it did not listen. Kept by a Model actor."""

    def __init__(self) -> None:
        self._listeners: dict[str, asyncio.Future[None]] = {}
        self._missed: dict[str, float] = {}

    def wake(self, ingress: str, now: float) -> None:
        """Tell an ingress to renew: at once, or as soon as it listens again."""
        listener = self._listeners.pop(ingress, None)
        if listener is not None and not listener.done():
            listener.set_result(None)
            return
        # Who has not listened for so long is not heard of any more.
        self._missed = {one: at for one, at in self._missed.items() if now - at < SILENCE_S}
        self._missed[ingress] = now

    def renewed(self, ingress: str) -> None:
        """Note that an ingress renews, whatever it was woken for."""
        self._missed.pop(ingress, None)

    async def wait(self, ingress: str, timeout_s: float) -> bool:
        """Return ``True`` as soon as an ingress is woken, ``False`` after a while."""
        if self._missed.pop(ingress, None) is not None:
            return True
        listener = self._listeners[ingress] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                await listener
        except TimeoutError:
            return False
        finally:
            if self._listeners.get(ingress) is listener:
                del self._listeners[ingress]
        return True
