"""How many slots a replica has, by what its running engine reports. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from app.config.model import FALLBACK_SLOTS, MOST_AUTO_SLOTS, PoolSettings
from app.contracts.findings import Finding, ok, warning
from deployments.engines.base import EngineFacts
from deployments.preflight.memory import USUAL_TOKENS, Fit


@dataclass(frozen=True, slots=True)
class Sized:
    """The slots of a replica.

    Attributes:
        slots: how many.
        finding: how they compare with the engine's memory; ``None`` if nothing is known of that.
    """

    slots: int
    finding: Finding | None = None


def size(pool: PoolSettings, facts: EngineFacts, estimated: int | None) -> Sized:
    """Return the slots of a replica whose engine is ready.

    With ``slots: auto`` it is the number of requests of a usual length that fit into the KV cache
    that the engine reports. An engine that reports none gets what was computed before its start,
    or the default of ``slots``. It is never more than the engine runs at once.

    Args:
        pool: the pool's settings.
        facts: what the engine reports.
        estimated: how many such requests fit by arithmetic; ``None`` if that is unknown.
    """
    fits = Fit(facts.kv_tokens, facts.context_length or USUAL_TOKENS) if facts.kv_tokens else None
    if isinstance(pool.slots, int):
        known = fits is not None and facts.context_length
        return Sized(pool.slots, _compare(fits, pool.slots) if fits and known else None)
    most = min(facts.most_running or MOST_AUTO_SLOTS, MOST_AUTO_SLOTS)
    if fits is not None:
        slots = min(max(1, fits.usual), most)
        return Sized(slots, ok(f"{_holds(fits)}; slots: auto takes {slots}"))
    what = "the engine does not report the size of its KV cache"
    if estimated:
        slots = min(estimated, most)
        return Sized(slots, ok(f"{what}; slots: auto takes {slots}, as computed before its start"))
    slots = min(FALLBACK_SLOTS, most)
    return Sized(
        slots,
        warning(
            f"{what}; slots: auto takes {slots}",
            "it may run more at once, or fewer, and nothing here can compute it",
            "set slots to a number",
        ),
    )


def _compare(fits: Fit, slots: int) -> Finding:
    holds = f"{_holds(fits)}; slots is {slots}"
    if fits.usual >= slots:
        return ok(holds)
    why = "with more requests than fit, the engine suspends some and computes them again"
    return warning(holds, why, f"slots: {max(1, fits.usual)}, or a larger KV cache")


def _holds(fits: Fit) -> str:
    return (
        f"the KV cache holds {int(fits.tokens):,} tokens, {fits.usual} requests of a usual "
        f"{fits.usual_tokens:,}"
    )
