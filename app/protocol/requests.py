"""The parts of OpenAI's API that Frontline uses: the fields that it reads, and stamping.

Everything else in requests and answers passes through unchanged, except nulls in requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final, NamedTuple

import orjson

from app.core import errors
from app.core.dialect import Dialect, Route
from app.core.pricing import TokenUsage, cost
from app.core.tier_decision import TierDecision
from app.core.tiers import Tier, TierReason, UnknownTierError, parse_requested
from app.protocol import anthropic, engine_errors
from app.protocol.form import Form, read_form
from app.protocol.json_body.members import LONGEST_KEPT_PARSED, Members, Reparsed
from app.protocol.json_body.parse import LONGEST_WHOLE, is_sparse, parse_plain, scan_object
from app.protocol.json_body.scan import Steps, run
from app.protocol.json_body.spliced import Spliced
from app.protocol.prompt_prefix import named_prefix, prompt_prefix
from app.protocol.recording import engine_form, estimate_recording, fields_of
from app.protocol.sse import Event
from app.protocol.start_within import (
    start_within_of_fields,
    start_within_of_header,
    start_within_tier,
)
from app.protocol.token_estimate import Estimate, choices_per_prompt, estimate_tokens
from app.protocol.usage import read_usage

FRONTLINE_FIELDS: Final = frozenset(
    {
        "service_tier",
        "priority",
        "fail_fast",
        "require_tier",
        "start_within",
        "start_within_tier",
        "lora_path",
    }
)
"""Request fields that never reach an engine: Frontline's own, and those of an engine that Frontline
sets: the priority, and SGLang's adapter, which requests name as their model."""

_PREAMBLE: Final = frozenset({b"message_start", b"ping"})
_STREAM_OPTION_ROUTES: Final = frozenset({Route.CHAT, Route.COMPLETIONS})


class Inbound(NamedTuple):
    """A client's request, with the fields that Frontline uses extracted.

    Attributes:
        route: the route of the request.
        fields: the JSON object as received. The fields of a long body are ``Members``, whose long
            values are ``RawJson``.
        model: the name of the model, an id or an alias.
        requested_tier: the tier in ``service_tier``; ``None`` for none or ``auto``.
        tier_reason: why it is not what ``service_tier`` says: no tier here is.
        require_tier: whether to refuse the request instead of serving it at another tier.
        stream: whether the answer is to be streamed.
        stream_options: the client's own options, empty if there are none.
        fail_fast: whether to refuse the request instead of queueing it.
        length: the length of the body, in bytes.
        prefix: a hash of ``prompt_cache_key`` if there is one, else of the prompt's prefix
            (``app.protocol.prompt_prefix``).
        user_prefix: a hash of ``user`` or ``metadata.user_id``; ``None`` where
            ``prompt_cache_key`` goes first.
        start_within_s: after how long in the queue it is raised to a better tier, in seconds;
            ``None`` for never.
        start_within_tier: the tier that it is raised to, ``default`` or ``priority``.
        expected_tokens: the estimated tokens of prompt and answer together.
        expected_prompt_tokens: the estimated tokens of all its prompts.
        choices_per_prompt: how many choices it wants per prompt.
        sequences: how many sequences an engine runs for it, at least 1: prompts times choices, or
            inputs. A value that is no such thing counts as 1, and engines reject it.
        images: how many images its prompt has, if they are billed (``app.protocol.images``).
        form: the form that the request is, on a route of forms; ``fields`` are its texts.
        recording_s: about how many seconds its recording has; 0 without one.
    """

    route: Route
    fields: Mapping[str, Any]
    model: str
    requested_tier: Tier | None
    stream: bool
    stream_options: Mapping[str, Any]
    fail_fast: bool = False
    length: int = 0
    prefix: int | None = None
    expected_tokens: int = 0
    expected_prompt_tokens: int = 0
    choices_per_prompt: int = 1
    sequences: int = 1
    tier_reason: TierReason | None = None
    require_tier: bool = False
    user_prefix: int | None = None
    start_within_s: float | None = None
    start_within_tier: Tier = Tier.DEFAULT
    images: int = 0
    form: Form | None = None
    recording_s: int = 0

    @property
    def wants_usage(self) -> bool:
        """Whether the client requested a last chunk with the usage."""
        return self.stream_options.get("include_usage") is True

    @property
    def wants_continuous_usage(self) -> bool:
        """Whether the client requested the usage on every chunk (vLLM's extension)."""
        return self.wants_usage and self.stream_options.get("continuous_usage_stats") is True


def parse_request(route: Route, body: bytes) -> Inbound:
    """Read a request body at once.

    Raises:
        InvalidRequest: it is not a JSON object, or a field that Frontline uses is invalid.
    """
    inbound = parse_plain_request(route, body) if len(body) <= LONGEST_WHOLE else None
    return run(read_long_request(route, body)) if inbound is None else inbound


def parse_plain_request(route: Route, body: bytes) -> Inbound | None:
    """Read a request body of up to ``LONGEST_WHOLE`` bytes, if parsing it whole is quick.

    Returns ``None`` if ``read_request`` has to parse it.

    Raises:
        InvalidRequest: as ``parse_request``.
    """
    fields = parse_plain(body)
    return None if fields is None else _plain_inbound(route, body, fields)


def _plain_inbound(route: Route, body: bytes, fields: dict[str, Any]) -> Inbound:
    prefix = prompt_prefix(route, fields)
    tokens = estimate_tokens(route, fields, len(body))
    kept = fields if len(body) <= LONGEST_KEPT_PARSED else Reparsed(body, fields)
    return _inbound(route, fields, kept, len(body), prefix, tokens)


def read_form_request(
    route: Route, content_type: bytes, body: bytes | memoryview
) -> Steps[Inbound]:
    """Read a form with a file, yielding every few milliseconds.

    Raises:
        InvalidRequest: it is no such form, or a field that Frontline uses is invalid.
    """
    form = yield from read_form(content_type, body, route.prompt_field)
    fields = fields_of(form)
    seconds, tokens = estimate_recording(form.file)
    inbound = _inbound(route, fields, fields, len(body), None, tokens)
    return inbound._replace(form=form, recording_s=seconds)


def read_long_request(route: Route, body: bytes | memoryview) -> Steps[Inbound]:
    """Read a request body that ``parse_plain_request`` does not, yielding every few milliseconds.

    ``bytes`` are parsed whole if they are long and sparse, and are scanned otherwise.

    Raises:
        InvalidRequest: as ``parse_request``.
    """
    if isinstance(body, bytes) and len(body) > LONGEST_WHOLE and is_sparse(body):
        fields = parse_plain(body)
        yield
        if fields is not None:
            return _plain_inbound(route, body, fields)
    return (yield from read_request(route, memoryview(body)))


def read_request(route: Route, body: memoryview) -> Steps[Inbound]:
    """Read a request body of any length without parsing it whole, yielding every few milliseconds.

    Raises:
        InvalidRequest: as ``parse_request``.
    """
    fields = yield from scan_object(body)
    yield
    prefix = prompt_prefix(route, fields)
    yield
    tokens = estimate_tokens(route, fields, len(body))
    yield
    return _inbound(route, fields, fields, len(body), prefix, tokens)


def _inbound(
    route: Route,
    fields: Mapping[str, Any],
    kept: Mapping[str, Any],
    length: int,
    prefix: int | None,
    tokens: Estimate,
) -> Inbound:
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise errors.InvalidRequest("you must provide a model parameter", param="model")
    try:
        word = parse_requested(fields.get("service_tier"))
    except UnknownTierError as error:
        raise errors.InvalidRequest(
            str(error), param="service_tier", code="invalid_value"
        ) from None
    _require_supported(route, fields)
    cache_key = named_prefix(fields, "prompt_cache_key")
    return Inbound(
        route,
        kept,
        model,
        word.tier,
        _flag(fields, "stream") and route.streams,
        _stream_options(fields),
        _flag(fields, "fail_fast"),
        length,
        prefix if cache_key is None else cache_key,
        tokens.total,
        tokens.prompt,
        choices_per_prompt(fields),
        tokens.sequences,
        word.reason,
        _flag(fields, "require_tier"),
        _user_prefix(route, fields) if cache_key is None else None,
        start_within_of_fields(fields),
        start_within_tier(fields),
    )


def _require_supported(route: Route, fields: Mapping[str, Any]) -> None:
    """Refuse values for which an answer could not be counted and billed."""
    if route is Route.RESPONSES and fields.get("background") not in (None, False):
        # Its answer would be fetched later. Engines accept other values than `true` for it, too.
        raise errors.InvalidRequest(
            "Background responses are not supported: leave 'background' out.",
            param="background",
            code="unsupported_value",
        )
    encoding = fields.get("encoding_format")
    if not route.generates and isinstance(encoding, str) and encoding.startswith("bytes"):
        # vLLM's: the answer is no JSON, and has no usage.
        raise errors.InvalidRequest(
            "This 'encoding_format' is not supported: use 'float' or 'base64'.",
            param="encoding_format",
            code="unsupported_value",
        )


def _user_prefix(route: Route, fields: Mapping[str, Any]) -> int | None:
    if not route.is_anthropic:
        return named_prefix(fields, "user")
    metadata = fields.get("metadata")
    return named_prefix(metadata, "user_id") if isinstance(metadata, dict) else None


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise errors.InvalidRequest(
            f"Invalid type for '{name}': expected a boolean.", param=name, code="invalid_type"
        )
    return value


def with_start_within(inbound: Inbound, header: bytes | None) -> Inbound:
    """Return the request with ``start_within`` from its header, unless a field has it.

    Raises:
        InvalidRequest: the header is read, and is no duration.
    """
    if header is None or inbound.start_within_s is not None:
        return inbound
    return inbound._replace(start_within_s=start_within_of_header(header))


def _stream_options(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    options = fields.get("stream_options")
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise errors.InvalidRequest(
            "Invalid type for 'stream_options': expected an object.",
            param="stream_options",
            code="invalid_type",
        )
    return options


def rewrite_request(
    inbound: Inbound, model_id: str, dialect: Dialect, tier: Tier, adapter: str = ""
) -> bytes | Spliced:
    """Return the body for the engine, for an adapter of the model if one is named.

    - Frontline's own fields and any priority of the client are removed.
    - The engine's priority for ``tier`` is set if the engine has priority in force on this route.
    - A stream always requests its usage, whether or not the client wants it.
    - Nulls are removed: in OpenAI's API null means absent, and engines reject some nulls.
    - An engine that rejects unknown fields gets only those that it knows.

    Values that are kept as bytes pass through unchanged.
    """
    if inbound.form is not None:
        return engine_form(inbound.form, model_id, FRONTLINE_FIELDS, inbound.fields)
    accepted = dialect.accepted_fields.get(inbound.route)
    fields: dict[str, Any] = {}
    source = inbound.fields
    # Not `isinstance`, which takes 0.4 us for an abstract class.
    if type(source) is Members:
        _set_own_fields(fields, inbound, model_id, dialect, tier, adapter)
        own = fields if accepted is None else _only(fields, accepted)
        withheld = FRONTLINE_FIELDS | fields.keys()
        names = (name for name in source if accepted is None or name in accepted)
        kept = source.pieces(name for name in names if name not in withheld)
        return Spliced.of(orjson.dumps(own), kept)
    if type(source) is Reparsed:
        source = source.fields
    fields = {
        key: value
        for key, value in source.items()
        if key not in FRONTLINE_FIELDS and value is not None
    }
    _set_own_fields(fields, inbound, model_id, dialect, tier, adapter)
    return orjson.dumps(fields if accepted is None else _only(fields, accepted))


def _set_own_fields(
    fields: dict[str, Any],
    inbound: Inbound,
    model_id: str,
    dialect: Dialect,
    tier: Tier,
    adapter: str,
) -> None:
    route = inbound.route
    fields["model"] = adapter or model_id
    if adapter and dialect.adapter_field:
        fields[dialect.adapter_field] = adapter
    if route in dialect.priority_routes and route not in dialect.priority_headers:
        fields["priority"] = dialect.priority_values[tier]
    if inbound.stream and route in _STREAM_OPTION_ROUTES:
        clients = {} if route in dialect.accepted_fields else inbound.stream_options
        fields["stream_options"] = {**clients, **dialect.stream_options}


def priority_header(route: Route, dialect: Dialect, tier: Tier) -> bytes:
    """Return the header line with the engine's priority for ``tier``, if it takes it there."""
    name = dialect.priority_headers.get(route)
    if name is None or route not in dialect.priority_routes:
        return b""
    return f"{name}: {dialect.priority_values[tier]}\r\n".encode()


def _only(fields: Mapping[str, Any], accepted: frozenset[str]) -> Mapping[str, Any]:
    return {name: value for name, value in fields.items() if name in accepted}


def json_number(amount: Decimal) -> orjson.Fragment:
    """Return an amount as a JSON number with every digit of it."""
    return orjson.Fragment(format(amount.normalize(), "f") if amount else "0.0")


def stamp(
    answer: dict[str, Any],
    decision: TierDecision,
    tokens: TokenUsage | None = None,
    images: int = 0,
) -> None:
    """Set the served tier in an answer, chunk or Responses object, and the cost in its ``usage``.

    ``usage`` must have the billed tokens. ``tokens`` are those of ``usage``, if already read;
    otherwise ``images`` are those of the request that are billed.
    """
    answer["service_tier"] = decision.served.value
    usage = answer.get("usage")
    if tokens is None:
        tokens = read_usage(usage, images)
    if tokens is not None and isinstance(usage, dict):
        usage["estimated_cost"] = json_number(cost(tokens, decision.rate_card, decision.served))


def is_preamble(event: Event, route: Route) -> bool:
    """Return whether an event may be followed by an error although nothing was generated.

    SGLang begins each stream of messages with ``message_start``, also one that it refuses.
    """
    if route is not Route.MESSAGES:
        return False
    return event.name in _PREAMBLE or b'"type":"message_start"' in event.data[:64]


def stream_error(event: Event, route: Route) -> errors.ApiError | None:
    """Return the error in a stream's first event, if there is one.

    If an engine answers 200 and then sends an error (SGLang 0.5 does when it is overloaded), no
    part of an answer was sent, and the client gets the error's own status.
    """
    if b'"error"' not in event.data:
        return None
    fields = orjson.loads(event.data)
    if not isinstance(fields, dict) or not fields.get("error") or fields.get("choices"):
        return None
    if route.is_anthropic:
        status = anthropic.error_status(fields)
        return engine_errors.from_engine(status, event.data, route.prompt_field)
    code = fields["error"].get("code") if isinstance(fields["error"], dict) else None
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    return engine_errors.from_engine(status, event.data, route.prompt_field)
