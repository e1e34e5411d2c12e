"""What was counted lately, worked out from remembered states of counts. Pure."""

from __future__ import annotations

from collections import deque

from app.contracts.traffic import Traffic


class Window:
    """Recent states of counts that only grow.

    Args:
        span_s: how far back the window reaches, in seconds.
        step_s: shortest interval between two states that are remembered, in seconds. The window
            may reach that much further back.
    """

    def __init__(self, span_s: float, step_s: float = 0.0) -> None:
        self._span_s = span_s
        self._step_s = step_s
        self._states: deque[tuple[float, Traffic]] = deque()

    def __len__(self) -> int:
        """How many states are remembered."""
        return len(self._states)

    def add(self, now: float, traffic: Traffic) -> tuple[Traffic, float]:
        """Add the present state, which must not be changed any more.

        Returns:
            What was counted in the window, and how long the window is, in seconds; 0 for the first
            state.
        """
        states = self._states
        if not states or now - states[-1][0] >= self._step_s:
            states.append((now, traffic))
        while len(states) > 1 and states[1][0] <= now - self._span_s:
            states.popleft()
        began, first = states[0]
        return traffic.since(first), now - began
