"""What happens while an engine sends nothing of an answer."""

from __future__ import annotations

from typing import Protocol


class Silence(Protocol):
    """Watches the pauses of one answer, without work for each of its events.

    Attributes:
        due: whether ``handle`` is to be called.
    """

    due: bool

    def look(self, received_at: float, now: float) -> float:
        """Set ``due`` if it is time; return when to look again at the latest.

        Called by a timer. All times are those of the event loop's clock, in seconds.

        Args:
            received_at: when the engine last gave a sign of life; at first, when the request was
                sent.
            now: the time.
        """
        ...

    async def handle(self) -> None:
        """Do what is due, and reset ``due``. Called by whoever waits for the answer."""
        ...

    async def pass_on(self, comments: bytes) -> None:
        """Take comments that the engine has sent before its first event."""
        ...
