"""Wakes ingresses that should renew their credits now. Runs on an event loop."""

from __future__ import annotations

import asyncio

from app.flow.credits import SILENCE_S


class Wakeups:
    """The ingresses that wait for a wakeup, and wakeups sent while an ingress did not wait.

    A Model actor owns it.
    """

    def __init__(self) -> None:
        self._listeners: dict[str, asyncio.Future[None]] = {}
        self._missed: dict[str, float] = {}

    def wake(self, ingress: str, now: float) -> None:
        """Wake an ingress at once, or as soon as it waits again."""
        listener = self._listeners.pop(ingress, None)
        if listener is not None and not listener.done():
            listener.set_result(None)
            return
        # Drop wakeups of ingresses that have not waited for so long: they are gone.
        self._missed = {one: at for one, at in self._missed.items() if now - at < SILENCE_S}
        self._missed[ingress] = now

    def renewed(self, ingress: str) -> None:
        """Clear the wakeup of an ingress that is renewing: that serves any reason to wake it."""
        self._missed.pop(ingress, None)

    async def wait(self, ingress: str, timeout_s: float) -> bool:
        """Return ``True`` as soon as an ingress is woken, ``False`` after ``timeout_s`` seconds."""
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
