"""Authentication and limits of requests, on an ingress's event loop.

``Access`` finds the key of a request (``app.tenants.key_cache``) and charges the request to the
key's limits (``app.tenants.limiter``), which several ingresses share through the ``Limits``
deployment. If the ingress requires no keys, the caller of every request is ``NOBODY``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Final, Protocol

from app import alarms, supervision
from app.config.ingress import FlightBounds
from app.core import errors
from app.core.dialect import Route
from app.core.tier_decision import ALL_RIGHTS, TierRights
from app.core.tiers import Tier
from app.tenants.concurrency import InFlight, OverBound
from app.tenants.key_cache import KeyCache, Keys
from app.tenants.keys import ApiKey, bearer
from app.tenants.limiter import OverLimit, RateLimiter
from app.tenants.priority_share import PriorityShares, SharePart
from app.tenants.rate_limit import LEASE_S, Ask, Given
from app.tenants.sessions import is_valid, session_key_id

PATIENCE_S: Final = 1.0
"""How long a request waits for an allowance. Longer than the ``Limits`` deployment takes to
answer."""
ANSWERS_S: Final = 3.0
"""How long a request keeps trying if answers arrive, none refuses, and other requests use up the
allowances that they bring."""
_IN_FLIGHT_S: Final = 1.0
"""The retry interval for too many requests in flight: when one of them ends is unknown."""

_log = logging.getLogger("ray.serve")


class LimitSource(Protocol):
    """The source of allowances: ``app.tenants.deployment``."""

    async def answer(self, asks: Mapping[str, Ask]) -> Mapping[str, Given]:
        """Return the allowance for each ask, by the name of the limit."""
        ...


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request.

    Attributes:
        tenant: the tenant that is billed; empty if the ingress requires no keys.
        key_id: the public part of the key, or empty.
        default_tier: the tier of requests that name none; ``None`` for the ingress's default.
        key: the key, or ``None``.
    """

    tenant: str = ""
    key_id: str = ""
    default_tier: Tier | None = None
    key: ApiKey | None = None

    def require_route(self, route: Route) -> None:
        """Raise ``RouteNotAllowed`` if the key may not use a route."""
        if self.key is not None and not self.key.scope.allows_route(route):
            raise errors.RouteNotAllowed(route.value)

    @property
    def is_admin(self) -> bool:
        """Whether the caller has an admin key."""
        return self.key is not None and self.key.admin

    def sees(self, model_id: str) -> bool:
        """Return whether the caller may use a model, and know of it."""
        return self.key is None or self.key.scope.allows_model(model_id)


def caller_of(key: ApiKey) -> Caller:
    """Return the caller who has a key."""
    return Caller(key.tenant, key.key_id, key.default_tier, key)


NOBODY: Final = Caller()
"""The caller of every request to an ingress that requires no keys."""


class Access:
    """The keys and limits that one ingress knows. Belongs to its event loop.

    Args:
        ingress: the name of the ingress.
        keys: where keys are read from.
        limits: where allowances come from.
        ingresses: returns how many ingresses there are. It is used while ``limits`` is away.
    """

    def __init__(
        self,
        ingress: str,
        keys: Keys,
        limits: LimitSource,
        ingresses: Callable[[], int] = lambda: 1,
        *,
        patience_s: float = PATIENCE_S,
        answers_s: float = ANSWERS_S,
    ) -> None:
        self._ingresses = ingresses
        self._patience_s = patience_s
        self._answers_s = answers_s
        self._ring = KeyCache(keys)
        self._allowances = RateLimiter(ingress)
        self._source = limits
        self._shares = PriorityShares()
        self.in_flight = InFlight()
        self._asking: asyncio.Task[None] | None = None
        self._sooner = asyncio.Event()
        self._answered = asyncio.Event()
        self._away = False
        self._answered_at = 0.0

    def start(self) -> None:
        """Start to read keys and to renew allowances."""
        self._ring.start()
        self._asking = supervision.keep_running("limits", self._keep_asking)

    def read_keys_from(self, store: Keys) -> None:
        """Read keys from another store. Usage that was counted for their limits is kept."""
        self._ring.read_from(store)

    async def stop(self) -> None:
        """Stop both tasks. A request that still waits for keys or limits is not answered."""
        await self._ring.stop()
        await supervision.stop(self._asking)

    async def identify(self, authorization: str | None) -> Caller:
        """Return the caller whose key is in an ``Authorization`` header.

        Raises:
            InvalidKey: the header has no key, or one that does not work.
        """
        text = bearer(authorization)
        key = await self._ring.find(text) if text else None
        if key is None:
            raise errors.InvalidKey(given=text is not None)
        return caller_of(key)

    async def sign_in(self, text: str) -> ApiKey | None:
        """Return the working key that somebody has typed, or ``None``."""
        return await self._ring.find(text)

    async def session(self, token: str, now: float) -> Caller | None:
        """Return who is signed in by a session token (``app.tenants.sessions``), or ``None``.

        ``now`` is in Unix seconds.
        """
        key_id = session_key_id(token)
        if key_id is None:
            return None
        await self._ring.look_up(key_id)
        return self.known_session(token, now)

    def known_session(self, token: str, now: float) -> Caller | None:
        """Do the same without reading the store."""
        key_id = session_key_id(token)
        key = None if key_id is None else self._ring.by_id(key_id)
        return caller_of(key) if key is not None and is_valid(token, key, now) else None

    async def charge(self, caller: Caller, tokens: int) -> None:
        """Charge a request with this many expected tokens to its key's limits.

        While the ``Limits`` deployment is away, this ingress's own part of each limit applies.

        Raises:
            RateLimited: the request exceeds one of the limits.
        """
        if caller.key is None:
            return
        came = time.monotonic()
        while over := self._allowances.take(caller.key, tokens, now := time.monotonic()):
            if self._away:
                raise self._limited(caller.key, over)
            # Measured at the last answer and not now: if the event loop was blocked, no answer
            # has arrived.
            tried_long = self._answered_at > came + self._answers_s
            if self._allowances.is_refused(caller.key, tokens, now) or tried_long:
                raise self._limited(caller.key, over)
            await self._ask_now()

    def known_caller(self, authorization: str | None) -> Caller | None:
        """Return the caller as ``identify`` does, or ``None``, without reading the store."""
        text = bearer(authorization)
        key = None if text is None else self._ring.known(text)
        return None if key is None else caller_of(key)

    def flight(self, caller: Caller, bounds: FlightBounds) -> AbstractContextManager[None]:
        """Count a request as in flight until the returned context has been left.

        Raises:
            TooManyInFlight: its key or tenant is at its limit; the request is not counted.
        """
        if caller.key is None:
            return nullcontext()
        own = caller.key.limits.in_flight
        if own is not None and own < bounds.key:
            bounds = replace(bounds, key=own)
        try:
            return self.in_flight.enter(
                caller.key_id, caller.tenant, bounds, max(self._ingresses(), 1)
            )
        except OverBound as over:
            error = errors.TooManyInFlight(over.holder.value, over.part, _IN_FLIGHT_S)
        raise error

    @property
    def keys_read(self) -> bool:
        """Whether the keys have been read since the start."""
        return self._ring.read

    @property
    def keys_away(self) -> bool:
        """Whether the last read of the keys failed."""
        return self._ring.away

    @property
    def unreadable_keys(self) -> int:
        """How many rows of keys were invalid at the last read; those keys do not work."""
        return self._ring.unreadable

    @property
    def limits_away(self) -> bool:
        """Whether the ``Limits`` deployment did not answer the last call."""
        return self._away

    def put_right(self, caller: Caller, expected: int, used: int, age_s: float) -> None:
        """Correct the tokens of a request that was charged ``age_s`` ago and has ended."""
        if caller.key is not None:
            self._allowances.put_right(caller.key, expected, used, age_s, time.monotonic())

    def rights(self, caller: Caller, wanted: Tier) -> tuple[TierRights, SharePart | None]:
        """Return the tiers that a request may have, and its part in its key's priority share.

        The caller must call ``decide`` and ``end`` of the part. It is ``None`` without a share.
        """
        key = caller.key
        if key is None:
            return ALL_RIGHTS, None
        share = key.limits.priority_share
        if share is None:
            return TierRights(key.tiers), None
        may_ask = wanted is Tier.PRIORITY and wanted in key.tiers
        part = self._shares.enter(key.key_id, float(share), time.monotonic(), wants=may_ask)
        return TierRights(key.tiers, over_share=may_ask and not part.allowed), part

    def known_key(self, key_id: str) -> ApiKey | None:
        """Return a working key by its id, without reading the store."""
        return self._ring.by_id(key_id)

    def knows_key(self, text: str) -> bool:
        """Return whether a text is a working key, without reading the store."""
        return self._ring.known(text) is not None

    def headers(self, caller: Caller) -> list[tuple[str, str]]:
        """Return the headers that show a client the state of its limits."""
        return [] if caller.key is None else self._allowances.headers(caller.key, time.monotonic())

    def _limited(self, key: ApiKey, over: OverLimit) -> errors.RateLimited:
        error = errors.RateLimited(over.measure.value, over.limit, over.retry_after_s)
        error.headers |= dict(self._allowances.headers(key, time.monotonic()))
        return error

    async def _ask_now(self) -> None:
        """Wait for the next answer of the ``Limits`` deployment, for one second at most."""
        answered = self._answered
        self._sooner.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience_s):
                await answered.wait()

    async def _keep_asking(self) -> None:
        while True:
            wait_s = self._allowances.next_ask() - time.monotonic()
            if wait_s > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s if wait_s < float("inf") else None):
                        await self._sooner.wait()
                self._sooner.clear()
                continue
            await self._ask()

    async def _ask(self) -> None:
        sent_at = time.monotonic()
        asks = self._allowances.asks(sent_at)
        try:
            async with asyncio.timeout(self._patience_s):
                answers = await self._source.answer(asks)
        except Exception as error:
            self._note_away(error)
        else:
            # Outside the `try`: an error of our own here does not mean that limits are away.
            self._receive(answers, sent_at)
        finally:
            self._answered.set()
            self._answered = asyncio.Event()
        # Waiting requests take from the allowance first, before the next ask gives up the amount
        # that seems unused.
        await asyncio.sleep(0)

    def _receive(self, answers: Mapping[str, Given], sent_at: float) -> None:
        now = time.monotonic()
        self._allowances.receive(answers, now)
        if now - sent_at < LEASE_S:
            self._answered_at = now
            self._set_away(False)
        else:
            # This process stood still: what the answers give has expired already.
            self._note_away(TimeoutError(f"limits answered after {now - sent_at:.1f} s"))

    def _note_away(self, error: Exception) -> None:
        alarms.PROCESS.raised("limits away", "each ingress keeps to its own part of them", error)
        self._set_away(True)

    def _set_away(self, away: bool) -> None:
        if self._away and not away:
            _log.warning("limits are shared again")
        self._away = away
        self._allowances.set_alone(away, self._ingresses())
