"""How an ingress is: decided from what it knows of itself. The pure part of ``GET /health``.

An ingress is unavailable only where it cannot serve. Whatever else is wrong leaves it ready, and
degraded: a cause that all ingresses share, such as a database or a sleeping model, would otherwise
take every one of them away, and a model that no request reaches never wakes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from app.contracts.status import Availability

STORE_AWAY_S: Final = 30.0
"""How long the database may be away without a word: a restart of it takes less."""


class HealthReason(StrEnum):
    """Why an ingress is not well. Clients and alerts rely on these codes."""

    STARTING = "starting"
    """It has not taken over its settings yet, or does not know its models."""
    DRAINING = "draining"
    """It was told to stop."""
    KEYS_NEVER_READ = "keys_never_read"
    """Keys are asked for, and none could be read since the start."""
    LEDGER_UNAVAILABLE = "ledger_unavailable"
    """The journal is full or cannot be written; requests get 503 with the same code."""

    KEYS_AWAY = "keys_away"
    """Keys could not be read the last time; those known go on working."""
    KEYS_UNREADABLE = "keys_unreadable"
    """Some rows in the store are no keys; those keys do not work."""
    LIMITS_AWAY = "limits_away"
    """Limits are not shared; each ingress keeps to its own part of them."""
    STORE_AWAY = "store_away"
    """The ledger's database has been away for ``STORE_AWAY_S``; records wait in the journal."""
    JOURNALS_SET_ASIDE = "journals_set_aside"
    """Journals on this node hold something that cannot be read; they are kept for a person."""
    JOURNALS_FAILING = "journals_failing"
    """Journals of dead ingresses on this node cannot be moved to the database; they stay."""
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
"""The reasons for 503."""


class HealthStatus(StrEnum):
    """The word for it."""

    OK = "ok"
    DEGRADED = "degraded"
    UNAVAILABLE = "unavailable"


@dataclass(frozen=True, slots=True)
class Signs:
    """What an ingress knows of itself at one moment; by default all is well.

    Attributes:
        started: whether its settings are taken over and its models known.
        draining: whether it was told to stop.
        keys_read: whether the keys have been read since the start; true where none are asked for.
        keys_away: whether they could not be read the last time.
        unreadable_keys: how many rows are no keys.
        limits_away: whether the books of the limits did not answer the last time.
        has_room: whether the journal has room for another request.
        store_away_s: for how long the ledger's database has been away, in seconds.
        journals_set_aside: how many journals of this node are kept for a person.
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
    has_room: bool = True
    store_away_s: float = 0.0
    journals_set_aside: int = 0
    journals_failing: int = 0
    failures: int = 0
    models: Mapping[Availability, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Health:
    """How an ingress is.

    Attributes:
        reasons: why it is not well; those for 503 come first.
    """

    reasons: tuple[HealthReason, ...]

    @property
    def status(self) -> HealthStatus:
        """The word for it."""
        if not self.reasons:
            return HealthStatus.OK
        return (
            HealthStatus.DEGRADED
            if CANNOT_SERVE.isdisjoint(self.reasons)
            else HealthStatus.UNAVAILABLE
        )

    @property
    def code(self) -> int:
        """The HTTP status: 503 only where it cannot serve."""
        return 503 if self.status is HealthStatus.UNAVAILABLE else 200


def judge(signs: Signs) -> Health:
    """Return how an ingress with these signs is."""
    found = {
        HealthReason.STARTING: not signs.started,
        HealthReason.DRAINING: signs.draining,
        HealthReason.KEYS_NEVER_READ: not signs.keys_read,
        HealthReason.LEDGER_UNAVAILABLE: not signs.has_room,
        HealthReason.KEYS_AWAY: signs.keys_away,
        HealthReason.KEYS_UNREADABLE: signs.unreadable_keys > 0,
        HealthReason.LIMITS_AWAY: signs.limits_away,
        HealthReason.STORE_AWAY: signs.store_away_s >= STORE_AWAY_S,
        HealthReason.JOURNALS_SET_ASIDE: signs.journals_set_aside > 0,
        HealthReason.JOURNALS_FAILING: signs.journals_failing > 0,
        HealthReason.BACKGROUND_FAILURES: signs.failures > 0,
        HealthReason.NO_MODEL_READY: not signs.models.get(Availability.READY),
    }
    return Health(tuple(reason for reason in HealthReason if found[reason]))
