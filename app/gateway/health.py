"""The health of an ingress, computed from its own state. The pure part of ``GET /health``.

An ingress is unavailable only if it cannot serve. Any other problem leaves it ready but degraded.
Otherwise a cause that all ingresses share, such as the database or a sleeping model, would take all
of them out of rotation, and a model that no request reaches never wakes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from app.contracts.status import Availability

STORE_AWAY_S: Final = 30.0
"""How long the database may be away before that is reported. A restart of it takes less."""


class HealthReason(StrEnum):
    """Why an ingress is unavailable or degraded. Clients and alerts rely on these codes."""

    STARTING = "starting"
    """It has not applied its settings yet, or does not know its models."""
    DRAINING = "draining"
    """It is stopping."""
    KEYS_NEVER_READ = "keys_never_read"
    """Keys are required, and could not be read once since the start."""
    LEDGER_UNAVAILABLE = "ledger_unavailable"
    """The journal is full or cannot be written; requests get 503 with the same code."""

    KEYS_AWAY = "keys_away"
    """The last read of the keys failed; known keys keep working."""
    KEYS_UNREADABLE = "keys_unreadable"
    """Some rows of keys in the store are invalid; those keys do not work."""
    LIMITS_AWAY = "limits_away"
    """Limits are not shared; each ingress applies its own part of them."""
    BUDGETS_AWAY = "budgets_away"
    """Ingresses do not learn what the others spend; each goes by its own spend and the database."""
    BUDGETS_UNREAD = "budgets_unread"
    """What some keys or tenants have spent cannot be read from the database. Where it was never
    read, requests under hard budgets get 503."""
    STORE_AWAY = "store_away"
    """The ledger's database has been away for ``STORE_AWAY_S``; records wait in the journal."""
    JOURNALS_SET_ASIDE = "journals_set_aside"
    """Journals on this node contain unreadable data; they are kept for an operator."""
    JOURNALS_FAILING = "journals_failing"
    """Journals of dead ingresses cannot be moved to the database; they stay on this node."""
    BACKGROUND_FAILURES = "background_failures"
    """Background work has failed within the last minute."""
    NO_MODEL_READY = "no_model_ready"
    """No model has an engine that is ready."""


CANNOT_SERVE: Final = frozenset(
    {
        HealthReason.STARTING,
        HealthReason.DRAINING,
        HealthReason.KEYS_NEVER_READ,
        HealthReason.LEDGER_UNAVAILABLE,
    }
)
"""The reasons for which ``GET /health`` answers 503."""


class HealthStatus(StrEnum):
    """The health of an ingress in one word."""

    OK = "ok"
    DEGRADED = "degraded"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True)
class Signs:
    """The state of an ingress at one moment. The defaults mean that everything works.

    Attributes:
        started: whether its settings are applied and its models known.
        draining: whether it is stopping.
        keys_read: whether the keys have been read since the start; true if none are required.
        keys_away: whether the last read of the keys failed.
        unreadable_keys: how many rows of keys are invalid.
        limits_away: whether the ``Limits`` deployment did not answer the last call.
        budgets_away: whether the ``Limits`` deployment did not answer the last report of spend.
        budgets_unread: of how many budgets in use the spend could not be read at the last try.
        has_room: whether the journal has room for another request.
        store_away_s: for how long the ledger's database has been away, in seconds.
        journals_set_aside: how many journals of this node are kept for an operator.
        journals_failing: how many dead ingresses' journals cannot be moved to the database.
        failures: how many kinds of background work have failed within the last minute.
        models: how many models there are, by state.
    """

    started: bool = True
    draining: bool = False
    keys_read: bool = True
    keys_away: bool = False
    unreadable_keys: int = 0
    limits_away: bool = False
    budgets_away: bool = False
    budgets_unread: int = 0
    has_room: bool = True
    store_away_s: float = 0.0
    journals_set_aside: int = 0
    journals_failing: int = 0
    failures: int = 0
    models: Mapping[Availability, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Health:
    """The health of an ingress.

    Attributes:
        reasons: its problems; those that cause 503 come first.
    """

    reasons: tuple[HealthReason, ...]

    @property
    def status(self) -> HealthStatus:
        """The health in one word."""
        if not self.reasons:
            return HealthStatus.OK
        return (
            HealthStatus.DEGRADED
            if CANNOT_SERVE.isdisjoint(self.reasons)
            else HealthStatus.UNAVAILABLE
        )

    @property
    def code(self) -> int:
        """The HTTP status: 503 only if the ingress cannot serve."""
        return 503 if self.status is HealthStatus.UNAVAILABLE else 200


def judge(signs: Signs) -> Health:
    """Return the health of an ingress with these signs."""
    found = {
        HealthReason.STARTING: not signs.started,
        HealthReason.DRAINING: signs.draining,
        HealthReason.KEYS_NEVER_READ: not signs.keys_read,
        HealthReason.LEDGER_UNAVAILABLE: not signs.has_room,
        HealthReason.KEYS_AWAY: signs.keys_away,
        HealthReason.KEYS_UNREADABLE: signs.unreadable_keys > 0,
        HealthReason.LIMITS_AWAY: signs.limits_away,
        HealthReason.BUDGETS_AWAY: signs.budgets_away,
        HealthReason.BUDGETS_UNREAD: signs.budgets_unread > 0,
        HealthReason.STORE_AWAY: signs.store_away_s >= STORE_AWAY_S,
        HealthReason.JOURNALS_SET_ASIDE: signs.journals_set_aside > 0,
        HealthReason.JOURNALS_FAILING: signs.journals_failing > 0,
        HealthReason.BACKGROUND_FAILURES: signs.failures > 0,
        HealthReason.NO_MODEL_READY: not signs.models.get(Availability.READY),
    }
    return Health(tuple(reason for reason in HealthReason if found[reason]))
