"""Decisions of the autoscaling policy as a note that the Model reads. Pure.

Serve's controller, where the policy runs, must not wait for a Model. So the policy leaves its
latest decisions in Ray's key-value store, where a restarted Model finds them as well.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

import orjson

from app.contracts.news import PoolChange, ScalingDecision

DECISIONS_S: Final = 2.0
"""How often a Model reads the note, in seconds. Starting an engine takes far longer."""
_MOST: Final = 20
_LONGEST_WHY: Final = 500


def note_name(application: str) -> str:
    """Return the name of the note of a model's application."""
    return f"scaling/{application}"


class DecisionLog:
    """The latest decisions of one policy."""

    def __init__(self) -> None:
        self._latest: deque[ScalingDecision] = deque(maxlen=_MOST)

    def add(self, decision: ScalingDecision) -> None:
        """Add a decision."""
        self._latest.append(decision)

    def to_note(self) -> bytes:
        """Return the decisions as a note."""
        return orjson.dumps([_plain(one) for one in self._latest])


def read_decisions(note: bytes | None) -> list[ScalingDecision]:
    """Return the decisions in a note, oldest first; none without a note.

    Raises:
        ValueError, TypeError, LookupError: it is not a note of ``DecisionLog``.
    """
    if note is None:
        return []
    return [
        ScalingDecision(
            one["at"], one["why"], {name: PoolChange(*of) for name, of in one["pools"].items()}
        )
        for one in orjson.loads(note)
    ]


def _plain(decision: ScalingDecision) -> dict[str, Any]:
    pools = {name: [*change] for name, change in decision.pools.items()}
    return {"at": decision.at, "why": decision.why[:_LONGEST_WHY], "pools": pools}
