"""Stamps answers and streams of Anthropic's messages route. Pure.

The tier is in ``usage``, as in Anthropic's own answers. vLLM repeats the prompt's tokens at the end
of a stream, less what was cached; SGLang tells them at its beginning only. Neither tells the tokens
of the answer in between, so that those of a stream that breaks off are estimated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from app.core import errors
from app.core.dialect import Route
from app.core.pricing import cost
from app.core.tier_decision import TierDecision
from app.protocol import anthropic, engine_errors
from app.protocol.events import BROKEN_OFF, EventStamper, error_event
from app.protocol.requests import Inbound, json_number
from app.protocol.sse import DONE, Event
from app.protocol.usage import Counted, read_usage, text_size, usage_fields


class MessagesStamper(EventStamper):
    """Stamps the events of a stream: implements ``app.protocol.stream.StreamStamper``."""

    def __init__(self, inbound: Inbound, decision: TierDecision) -> None:
        super().__init__(inbound, decision)
        # What the engine has told of its usage, the later over the earlier.
        self._told: dict[str, Any] = {}
        self._complete = False
        # Whether the client has seen the beginning of the message, and the usage at its end.
        self._begun = self._finished = False

    @property
    def odd_usage(self) -> bool:
        return self._count.odd or (self.ended and not self.failed and not self._complete)

    def break_off(self) -> bytes:
        error = error_event(errors.ServerError(BROKEN_OFF), Route.MESSAGES)
        return b"".join((*self._missing_end(), error))

    def _stamped(self, event: Event) -> Iterator[bytes]:
        if event.data == DONE:
            self.ended = True
            return
        fields = orjson.loads(event.data)
        kind = fields.get("type")
        if kind == "error" or fields.get("error"):
            self.ended = self.failed = True
            yield from self._missing_end()
            yield _scrubbed(fields)
            return
        if kind == "content_block_delta":
            size = text_size(fields.get("delta"))
            self._count.sent(bool(size), size)
            yield event.encode()
            return
        if kind == "message_start":
            self._begin(fields["message"])
        elif kind == "message_delta":
            self._finish(fields)
        elif kind == "message_stop":
            yield from self._missing_end()
            self.ended = True
        yield Event(orjson.dumps(fields), event.name).encode()

    def _begin(self, message: dict[str, Any]) -> None:
        usage = message.get("usage")
        reported = read_usage(anthropic.plain_usage(usage))
        if reported is not None and reported.prompt_tokens:
            # An engine that does not know the prompt's length yet says 0. The answer's tokens are
            # counted as they come, whatever it says of them now.
            self._told = dict(usage) if isinstance(usage, dict) else {}
            self._count.told(anthropic.plain_usage({**self._told, "output_tokens": 0}), 0)
        # Without a cost: Anthropic's SDKs keep unknown fields of this event alone, so their final
        # messages would report the prompt's cost as that of the whole.
        message["usage"] = _with_tier(usage, self._count.result(), self._decision)
        self._begun = True

    def _finish(self, fields: dict[str, Any]) -> None:
        usage = fields.get("usage")
        if isinstance(usage, dict):
            told = {name: value for name, value in usage.items() if value is not None}
            # An engine that tells the prompt again tells all of it again.
            self._told = told if "input_tokens" in told else self._told | told
            self._complete = self._count.told(anthropic.plain_usage(self._told))
        elif usage is not None:
            self._count.told(usage)
        fields["usage"] = shown_usage(self._told, self._count.result(), self._decision)
        self._finished = True

    def _missing_end(self) -> Iterator[bytes]:
        """Yield the event with what is billed, if the engine has not sent it."""
        if self._begun and not self._finished:
            fields: dict[str, Any] = {
                "type": "message_delta",
                "delta": {"stop_reason": None, "stop_sequence": None},
            }
            self._finish(fields)
            yield Event(orjson.dumps(fields), b"message_delta").encode()


def stamp_message(answer: dict[str, Any], counted: Counted, decision: TierDecision) -> None:
    """Set the tier and the cost in the ``usage`` of an answer that is not streamed."""
    answer["usage"] = shown_usage(answer.get("usage"), counted, decision)


def shown_usage(usage: object, counted: Counted, decision: TierDecision) -> dict[str, Any]:
    """Return the ``usage`` of a whole answer: the engine's, unless other tokens are billed."""
    amount = cost(counted.usage, decision.rate_card, decision.served)
    return _with_tier(usage, counted, decision) | {"estimated_cost": json_number(amount)}


def _with_tier(usage: object, counted: Counted, decision: TierDecision) -> dict[str, Any]:
    told = read_usage(anthropic.plain_usage(usage), counted.usage.images)
    if isinstance(usage, dict) and told == counted.usage and not counted.estimated:
        shown = dict(usage)
    else:
        shown = usage_fields(counted, Route.MESSAGES)
    shown["service_tier"] = decision.served.value
    return shown


def _scrubbed(fields: dict[str, Any]) -> bytes:
    status = anthropic.error_status(fields)
    error = engine_errors.from_engine(status, orjson.dumps(fields), Route.MESSAGES.prompt_field)
    return error_event(error, Route.MESSAGES)
