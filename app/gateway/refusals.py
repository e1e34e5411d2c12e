"""The errors and reasons of requests that are not answered, for clients and records."""

from __future__ import annotations

from typing import Final

from app.contracts.status import Availability
from app.core import errors
from app.core.shed_reason import ShedReason
from app.core.tiers import TierReason
from app.flow.admission import ModelGone, Shed
from app.upstream.client import EngineFailed

NOT_READY: Final = "engine_not_ready"
ENGINE_FAILED: Final = "engine_failed"

# How long an engine's start or a store's outage takes is unknown; this is a useful retry interval.
_TRY_AGAIN_S: Final = 5.0
# An operator has to act, for example to add a machine.
_OPERATOR_S: Final = 60.0
_TIER_STATUS: Final = {
    TierReason.KEY_MAY_NOT_USE_TIER: 403,
    # These change without anybody changing the request or the settings.
    TierReason.OVER_PRIORITY_SHARE: 429,
    TierReason.NO_REPLICA_HONOURS_PRIORITY: 429,
}


def error_of(failure: Exception, model: str, why_failed: str | None = None) -> errors.ApiError:
    """Return the error for the client of a request for ``model`` that was shed or failed.

    ``why_failed`` is why the model's engines have failed to start, if they have.
    """
    match failure:
        case Shed():
            return _shed(failure.request.shed, failure.request.retry_after_s, model, why_failed)
        case ModelGone():
            return errors.ModelNotFound(model)
        case EngineFailed():
            return failure.error
        case errors.ApiError():
            return failure
        case _:
            return not_ready(model)


def _shed(
    reason: ShedReason | None, retry_after_s: float, model: str, why_failed: str | None
) -> errors.ApiError:
    error: errors.ApiError
    match reason:
        case ShedReason.NOT_OFFERED:
            error = not_offered(model)
        case ShedReason.ENGINE_FAILED:
            error = failed_to_start(model, why_failed)
        case ShedReason.NO_OTHER_REPLICA:
            error = not_ready(model)
        case _:
            error = errors.Overloaded(retry_after_s)
    if reason is not None:
        error.headers["x-shed-reason"] = reason.value
    return error


def not_offered(model: str) -> errors.Unavailable:
    """Return the error for a model that no machine can run."""
    return errors.Unavailable(
        f"No machine here can run the model `{model}` at the moment.",
        Availability.NOT_OFFERED.value,
        _OPERATOR_S,
    )


def not_ready(model: str) -> errors.Unavailable:
    """Return the error for a model of which no engine is ready or about to be."""
    return errors.Unavailable(
        f"No engine of the model `{model}` is ready. Try again in a few seconds.",
        NOT_READY,
        _TRY_AGAIN_S,
    )


def failed_to_start(model: str, reason: str | None) -> errors.Unavailable:
    """Return the error for a model whose engines have failed to start; ``reason`` if known."""
    why = f": {reason}" if reason else ""
    return errors.Unavailable(
        f"The engine of the model `{model}` failed to start{why}. Its operator has to act.",
        ENGINE_FAILED,
        _OPERATOR_S,
    )


def unrecordable() -> errors.Unavailable:
    """Return the error for a request whose record cannot be written."""
    return errors.Unavailable(
        "Usage cannot be recorded at the moment, so the request was not served. Try again in a "
        "few seconds.",
        "ledger_unavailable",
        _TRY_AGAIN_S,
    )


def tier_unavailable(reason: TierReason) -> errors.TierUnavailable:
    """Return the error for a request that insists on a tier which it would not get."""
    status = _TIER_STATUS.get(reason, 400)
    return errors.TierUnavailable(status, reason.value, _TRY_AGAIN_S if status == 429 else None)


def reason_of(error: errors.ApiError) -> str:
    """Return the reason in the record of a request that was not answered."""
    if isinstance(error, errors.EngineRejected):
        # Its code comes from the engine and may be of any length.
        return "engine_rejected"
    return error.headers.get("x-shed-reason") or error.code or error.type
