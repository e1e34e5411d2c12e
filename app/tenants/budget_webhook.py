"""Sends budget alerts to a receiver over HTTP, on an ingress's event loop.

``BudgetGate`` tells of an alert and goes on. The alert waits in a bounded queue for one of a few
tasks, which tries again while the receiver does not take it. What is not delivered is counted and
alarmed. Nothing of the URL or the secrets is logged.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_before_delay
from tenacity.wait import wait_random_exponential

from app import alarms, supervision
from app.config.budget_webhook import BudgetWebhookSettings
from app.core.settings import Problem, SettingsError
from app.tenants.budget_alert import BudgetAlert, InvalidSecret, parse_secrets, sign

LONGEST_PAUSE_S: Final = 60.0
"""Longest pause between two tries: how late an alert comes once the receiver is back."""
GRACE_S: Final = 5.0
"""How long a stopping ingress goes on sending what waits."""
_SENDERS: Final = 4
"""Alerts that are sent side by side, so that one that the receiver cannot take holds up no other
one at once."""
_GONE: Final = 410


class Outcome(StrEnum):
    """What has become of an alert, or of a try to send it."""

    DELIVERED = "delivered"
    """The receiver has taken it."""
    FAILED = "failed"
    """A try failed; another one follows."""
    GIVEN_UP = "given_up"
    """The last try failed, or the receiver wants no more (410)."""
    DROPPED = "dropped"
    """It was not sent: the queue was full, the webhook was removed, or the ingress stopped."""


@dataclass(frozen=True, slots=True)
class Receiver:
    """Where alerts are sent.

    Attributes:
        url: its URL.
        keys: the keys that sign, at least one.
        timeout_s: longest time for a try, in seconds.
        retry_for_s: how long an alert is tried again, in seconds.
        max_waiting: most alerts that wait.
    """

    url: str = field(repr=False)
    keys: tuple[bytes, ...] = field(repr=False)
    timeout_s: float
    retry_for_s: float
    max_waiting: int


def receiver_of(settings: BudgetWebhookSettings, *where: str | int) -> Receiver:
    """Return the receiver in settings, with its secret from this machine. May block.

    Args:
        settings: the settings.
        where: their key in the configuration, for the error.

    Raises:
        SettingsError: the secret cannot be read, or is invalid; the message holds nothing of it.
    """
    text = settings.read_secret(*where)
    try:
        keys = parse_secrets(text)
    except InvalidSecret as error:
        name = "secret_file" if settings.secret_env is None else "secret_env"
        raise SettingsError(Problem((*where, name), str(error))) from None
    return Receiver(
        settings.url.get_secret_value(), keys, settings.timeout_s, settings.retry_for_s,
        settings.max_waiting,
    )  # fmt: skip


class BudgetWebhook:
    """The webhook of one ingress. Belongs to its event loop.

    Attributes:
        counts: how many alerts had which outcome.
    """

    def __init__(self) -> None:
        self.counts: Counter[Outcome] = Counter()
        self._receiver: Receiver | None = None
        self._waiting: asyncio.Queue[BudgetAlert] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    def change(self, receiver: Receiver | None) -> None:
        """Send to another receiver from now on, also what waits; ``None`` for none."""
        self._receiver = receiver
        if receiver is not None and not self._tasks:
            self._tasks = [
                supervision.keep_running("budget webhook", self._keep_sending)
                for _ in range(_SENDERS)
            ]

    def tell(self, alert: BudgetAlert) -> None:
        """Have an alert sent, if there is a receiver. Never waits."""
        if self._receiver is None:
            return
        if self._waiting.qsize() >= self._receiver.max_waiting:
            self._lost(alert, Outcome.DROPPED, "too many wait")
        else:
            self._waiting.put_nowait(alert)

    async def stop(self) -> None:
        """Stop, after a short time for what waits."""
        if self._tasks:
            with suppress(TimeoutError):
                async with asyncio.timeout(GRACE_S):
                    await self._waiting.join()
        await supervision.stop(*self._tasks)
        while not self._waiting.empty():
            self._lost(self._waiting.get_nowait(), Outcome.DROPPED, "the ingress stops")

    async def _keep_sending(self) -> None:
        while True:
            alert = await self._waiting.get()
            try:
                await self._deliver(alert)
            except BaseException as error:
                # The ingress stops, or it is an error of our own, which supervision reports.
                stops = isinstance(error, asyncio.CancelledError)
                outcome = Outcome.DROPPED if stops else Outcome.GIVEN_UP
                self._lost(alert, outcome, "the ingress stops" if stops else type(error).__name__)
                raise
            finally:
                self._waiting.task_done()

    async def _deliver(self, alert: BudgetAlert) -> None:
        receiver = self._receiver
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_NotTaken),
            wait=_pause_s,
            stop=stop_before_delay(receiver.retry_for_s if receiver is not None else 0.0),
            before_sleep=self._note_failure,
            reraise=True,
        )
        try:
            await retrying(self._try, alert.id, alert.body())
        except _Removed:
            self._lost(alert, Outcome.DROPPED, "the webhook was removed")
        except (_NotTaken, _Unwanted) as error:
            self._lost(alert, Outcome.GIVEN_UP, str(error))
        else:
            self.counts[Outcome.DELIVERED] += 1

    async def _try(self, message_id: str, body: bytes) -> None:
        """Send a message once.

        Raises:
            _NotTaken: it was not answered with a status from 200 to 299 in time.
            _Unwanted: the receiver wants no messages.
            _Removed: there is no receiver any more.
        """
        receiver = self._receiver
        if receiver is None:
            raise _Removed
        at = int(time.time())
        headers = {
            "content-type": "application/json",
            "user-agent": "Frontline",
            "webhook-id": message_id,
            "webhook-timestamp": str(at),
            "webhook-signature": sign(receiver.keys, message_id, at, body),
        }
        try:
            async with (
                asyncio.timeout(receiver.timeout_s),
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session,
                session.post(
                    receiver.url, data=body, headers=headers, allow_redirects=False
                ) as answer,
            ):
                status, after = answer.status, answer.headers.get("retry-after", "")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # Their messages may have the URL.
            raise _NotTaken(type(error).__name__) from None
        if status == _GONE:
            raise _Unwanted(f"status {status}")
        if not 200 <= status < 300:
            raise _NotTaken(f"status {status}", asked_pause_s(after))

    def _note_failure(self, state: RetryCallState) -> None:
        self.counts[Outcome.FAILED] += 1
        error = None if state.outcome is None else state.outcome.exception()
        pause_s = 0.0 if state.next_action is None else state.next_action.sleep
        alarms.PROCESS.raised(
            "budget webhook failing",
            f"an alert was not taken ({error}), and is sent again in {pause_s:.1f} s",
        )

    def _lost(self, alert: BudgetAlert, outcome: Outcome, why: str) -> None:
        self.counts[outcome] += 1
        alarms.PROCESS.raised(
            "budget alert lost",
            f"{alert.percent} % of the budget of {alert.of.owner} {alert.of.name} "
            f"({alert.of.period}) was not told to the webhook: {why}",
        )


class _NotTaken(Exception):
    """A message was not taken; another try may succeed, after a pause that was asked for."""

    def __init__(self, why: str, asked_s: float = 0.0) -> None:
        super().__init__(why)
        self.asked_s = asked_s


class _Unwanted(Exception):
    """The receiver wants no messages."""


class _Removed(Exception):
    """There is no receiver any more."""


backoff_s: Final = wait_random_exponential(multiplier=1, max=LONGEST_PAUSE_S)
"""The pause before the next try, in seconds: it grows, and is random."""


def asked_pause_s(retry_after: str) -> float:
    """Return the pause that a header ``Retry-After`` asks for, in seconds, within bounds.

    It is 0 for none, for a date, and for what is neither.
    """
    is_number = retry_after.isascii() and retry_after.isdigit()
    return min(float(retry_after), LONGEST_PAUSE_S) if is_number else 0.0


def _pause_s(state: RetryCallState) -> float:
    error = None if state.outcome is None else state.outcome.exception()
    return max(backoff_s(state), error.asked_s if isinstance(error, _NotTaken) else 0.0)
