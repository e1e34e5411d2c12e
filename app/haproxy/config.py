"""Adds to Ray Serve's HAProxy configuration what Serve has no settings for.

Standard library only, because ``scripts/haproxy`` runs it alone at every start and reload:

    python3 -I -S config.py BINARY FILE

It adds a timeout for request heads, room for large heads, limits of connections, errors in
OpenAI's format, and a header with the client's address. A configuration that differs from what
Serve 2.60 writes, or that HAProxy would reject afterwards, stays unchanged; the reason is on stderr
and in ``keeper.log``.

HAProxy 2.8 answers two kinds of requests with HTML before it evaluates any rule: requests that are
not valid HTTP or whose head exceeds its buffer (400), and requests whose head never ends (408).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path

MARK = "# Completed by Frontline (app/haproxy/config.py)."
HEAD_BYTES = 32 * 1024
"""Longest request head that is forwarded: four times nginx's default buffer, for large cookies and
tokens. The OpenAI SDKs send less than 1 KiB."""
MAX_HEADERS = 200
"""Most headers that are forwarded: twice what other proxies allow."""
CLIENT_HEADER = "x-frontline-client"
"""The header with which an ingress gets the address that has connected to HAProxy: a proof that
HAProxy has written it (``client_proof``), a space, the address."""
NOT_WATCHED = ("x-request-disconnect-disabled", "?1")
"""The header, and its value, with which Serve leaves it to an ingress to notice that a client has
gone. It is set on requests to ``WATCHED_PATHS``, together with one for the longest time of a
request."""
WATCHED_PATHS = tuple(
    f"{prefix}/{route}"
    for prefix in ("/v1", "/v1/openai")
    for route in ("chat/completions", "completions", "responses", "messages", "embeddings")
)
"""Where an ingress notices both itself. Elsewhere, and in other applications, Serve does."""
BAD_SETTING = 78
"""Exit status if an environment variable has a bad value: HAProxy must not start then."""
_PARSED_HEADERS = 4096
"""Headers that HAProxy parses: far more than it forwards, so that a rule can reject the request."""
_OTHER_DESCRIPTORS = 200
"""Open files for listeners, event loops, logs, and what a reload inherits for a moment."""
_LEAST_CONNECTIONS = 100
_UNLIMITED = 1 << 30

# Serve's replica decodes these as UTF-8 outside our application, and answers 500 if that fails.
# The values are the longest that pass, in bytes: a trace's state has at most 512.
_DECODED = {"x-request-id": 200, "traceparent": 200, "tracestate": 512}
# Serve obeys these headers: a client could get a timeout error in plain text, or keep its request
# running after it disconnects.
_OBEYED = ("x-request-timeout-seconds", NOT_WATCHED[0])
# Serve decodes these too and accepts either separator. Frontline does not use them.
_UNUSED = "^(x[-_]session[-_]id|serve[-_]multiplexed[-_]model[-_]id)$"


class UnknownConfig(Exception):
    """The configuration is not one that Serve 2.60 writes; the message names what is missing."""


class BadSetting(Exception):
    """An environment variable has a bad value; the message names it."""


@dataclass(frozen=True)
class ProxyBounds:
    """The limits of HAProxy, from the environment.

    Attributes:
        head_timeout_s: how long a client may take to send a request's head, in seconds.
        client_connections: concurrent connections of one address; 0 for no limit.
        trusted_proxies: networks whose ``X-Forwarded-For`` names the client.
        descriptors: how many files HAProxy may have open.
        proof: what shows an ingress that HAProxy has written ``CLIENT_HEADER``; left out of
            ``repr``. Without it no ingress learns clients' addresses.
    """

    head_timeout_s: int = 10
    client_connections: int = 0
    trusted_proxies: tuple[str, ...] = ()
    descriptors: int = _UNLIMITED
    proof: str | None = field(default=None, repr=False)

    @classmethod
    def read(cls, environ: Mapping[str, str], descriptors: int) -> ProxyBounds:
        """Return the limits that environment variables set.

        Raises:
            BadSetting: a variable has a bad value.
        """
        return cls(
            head_timeout_s=whole_number(environ, "FRONTLINE_HEAD_TIMEOUT_S", cls.head_timeout_s, 1),
            client_connections=whole_number(environ, "FRONTLINE_CLIENT_CONNECTIONS", 0, 0),
            trusted_proxies=_networks(environ, "FRONTLINE_TRUSTED_PROXIES"),
            descriptors=descriptors,
            proof=client_proof(environ),
        )


def whole_number(environ: Mapping[str, str], name: str, default: int, least: int) -> int:
    """Return the value of an environment variable; the default if it is not set or empty.

    Raises:
        BadSetting: it is not a whole number of at least ``least``.
    """
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise BadSetting(f"{name}: expected a whole number of at least {least}, not {text!r}")
    return int(text)


def client_proof(environ: Mapping[str, str]) -> str | None:
    """Return what proves that ``CLIENT_HEADER`` is HAProxy's, or ``None`` without Ray's token.

    It is made of Ray's token, which all nodes share and clients do not know. The token does not
    follow from it.
    """
    token = environ.get("RAY_AUTH_TOKEN", "").strip()
    if not token:
        path = environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
        try:
            token = Path(path).read_text().strip()
        except (OSError, ValueError):
            # Without the file no token is required of anybody.
            return None
    return hmac.new(token.encode(), _PROOF_OF, hashlib.sha256).hexdigest() if token else None


_PROOF_OF = b"frontline client address 1"


def _networks(environ: Mapping[str, str], name: str) -> tuple[str, ...]:
    words = re.split(r"[,\s]+", environ.get(name, ""))
    try:
        return tuple(str(ip_network(word, strict=False)) for word in words if word)
    except ValueError as error:
        raise BadSetting(f"{name}: {error}") from None


def connections_for(requests: int) -> int:
    """Return the ``maxconn`` for this many concurrent requests, with room to refuse others."""
    return requests + requests // 9 + _LEAST_CONNECTIONS


def served_of(connections: int) -> int:
    """Return how many connections are served; requests on further ones get 429."""
    return connections - max(connections // 10, _LEAST_CONNECTIONS // 2)


def descriptors_for(connections: int, servers: int) -> int:
    """Return how many open files a ``maxconn`` needs: two per connection, one to an ingress."""
    return 2 * connections + 2 * servers + _OTHER_DESCRIPTORS


def complete(text: str, bounds: ProxyBounds) -> tuple[str, list[str]]:
    """Return Serve's configuration with the additions, and warnings for the operator.

    A configuration that already has them is returned unchanged.

    Raises:
        UnknownConfig: it is not one that Serve 2.60 writes, or too few open files are allowed.
    """
    if text.startswith(MARK):
        return text, []
    config = _Config(text)
    connections, warnings = _connections(config, bounds)
    config.replace("global", r"maxconn \d+", [
        f"    maxconn {connections}",
        # Otherwise HAProxy counts a pipe for every fourth connection, though splice() is off (-dS).
        "    maxpipes 1",
        f"    tune.http.maxhdr {_PARSED_HEADERS}",
    ])  # fmt: skip
    for status in (502, 503):
        config.replace("defaults", rf"errorfile {status} \S+", [])
    config.replace("defaults", r"errorfile 504 \S+", _own_errors())
    bind = config.line(FRONTEND, _BIND)
    config.replace(FRONTEND, _BIND, [
        # One HTTP/2 connection carries a hundred requests, which no limit here would count.
        f"{bind} proto h1",
        # Metrics and statistics use connections of the same total.
        f"    maxconn {connections - _LEAST_CONNECTIONS // 10}",
        f"    timeout http-request {bounds.head_timeout_s}s",
        # A connection without a single byte is closed without an answer: the connection pools of
        # SDKs open such connections.
        "    option http-ignore-probes",
        *_client_table(bounds),
    ])  # fmt: skip
    head_bytes = min(HEAD_BYTES, int(config.line("global", r"tune\.bufsize \d+").split()[1]) // 2)
    config.insert_before_routes([
        *_rules(_request_rules(served_of(connections), head_bytes, bounds)),
        *_rules(_response_rules()),
    ])  # fmt: skip
    _answer_without_routes(config)
    return f"{MARK}\n{config.text()}", warnings


FRONTEND = "frontend http_frontend"
_BIND = r"bind \S+:\d+"
_NOWHERE = r"http-request return status 404 .*"


def _answer_without_routes(config: _Config) -> None:
    """Answer 503, which clients retry, instead of 404 while Serve has not set its routes."""
    if config.has_routes:
        ours = _return("503", _NOT_READY, "if { var(txn.frontline) -m found }")
        lines = [f"    {ours}", config.line("backend default_backend", _NOWHERE)]
    else:
        lines = [f"    {_return('503', _NOT_READY)}"]
    config.replace("backend default_backend", _NOWHERE, lines)


class _Config:
    """The lines of a configuration, by section."""

    def __init__(self, text: str) -> None:
        self._sections: dict[str, list[str]] = {}
        name = ""
        for line in text.splitlines():
            if re.match(r"[a-z]", line):
                name = " ".join(line.split())
                if name in self._sections:
                    raise UnknownConfig(f"two sections {name!r}")
                self._sections[name] = []
            elif line.strip() and not name:
                raise UnknownConfig("a line before the first section")
            elif name:
                self._sections[name].append(line)

    def _find(self, section: str, pattern: str) -> int:
        found = [
            place
            for place, line in enumerate(self._sections.get(section, ()))
            if re.fullmatch(pattern, line.strip())
        ]
        if len(found) != 1:
            raise UnknownConfig(f"{len(found)} lines, not 1, match {pattern!r} in {section!r}")
        return found[0]

    def line(self, section: str, pattern: str) -> str:
        """Return the only line of a section that matches."""
        place = self._find(section, pattern)
        return self._sections[section][place]

    def replace(self, section: str, pattern: str, lines: Sequence[str]) -> None:
        """Replace the only line that matches by other lines."""
        place = self._find(section, pattern)
        self._sections[section][place : place + 1] = lines

    def insert_before_routes(self, lines: Sequence[str]) -> None:
        """Insert lines after Serve sets the variables of its metrics, before it chooses a route."""
        last = self._find(FRONTEND, r"default_backend default_backend")
        frontend = self._sections[FRONTEND]
        place = next(n for n in range(last + 1) if _ROUTE.match(frontend[n]) or n == last)
        frontend[place:place] = lines

    @property
    def has_routes(self) -> bool:
        """Whether requests are forwarded to any application."""
        return any(_ROUTE.match(line) for line in self._sections[FRONTEND])

    @property
    def servers(self) -> int:
        """How many servers there are in all sections."""
        every = (line for lines in self._sections.values() for line in lines)
        return sum(line.strip().startswith("server ") for line in every)

    def text(self) -> str:
        parts = ("\n".join([name, *lines]) for name, lines in self._sections.items())
        return "\n".join(parts) + "\n"


_ROUTE = re.compile(r"\s*use_backend ")


def _connections(config: _Config, bounds: ProxyBounds) -> tuple[int, list[str]]:
    """Return the limit of connections (Serve's, if enough files may be open) and warnings."""
    wanted = int(config.line("global", r"maxconn \d+").split()[1])
    needed = descriptors_for(wanted, config.servers)
    if needed <= bounds.descriptors:
        return max(wanted, _LEAST_CONNECTIONS), []
    fits = (bounds.descriptors - descriptors_for(0, config.servers)) // 2
    if fits < _LEAST_CONNECTIONS:
        raise UnknownConfig(f"{bounds.descriptors} open files are too few (ulimit -Hn)")
    return fits, [
        f"{fits} connections instead of {wanted} (RAY_SERVE_HAPROXY_MAXCONN): {bounds.descriptors} "
        f"open files are allowed (ulimit -Hn), and {needed} are needed"
    ]


def _error(message: str, *, code: str, type: str = "server_error") -> str:
    error = {"message": message, "type": type, "param": None, "code": code}
    # HAProxy cannot escape an apostrophe inside single quotes.
    return json.dumps({"error": error}).replace("'", r"\u0027")


_INVALID = "invalid_request_error"
_FAILED = _error("The server had an error while processing your request.", code="internal_error")
_NOT_READY = _error("No ingress is ready. Try again in a moment.", code="ingress_not_ready")
_MALFORMED = _error("The request is not valid HTTP.", code="malformed_request", type=_INVALID)
_LATE = _error("Timed out reading the request.", code="request_timeout", type=_INVALID)
_ERRORS = {
    "400": _MALFORMED,
    "408": _LATE,
    "500": _FAILED,
    "501": _FAILED,
    "502": _FAILED,
    "503": _NOT_READY,
    "504": _FAILED,
}
"""The errors of HAProxy itself, and of Serve's replica around our application."""


def _answer(status: str, body: str) -> str:
    retry = " hdr retry-after 1 hdr retry-after-ms 1000" if status in {"429", "503"} else ""
    return (
        f"status {status} content-type application/json string '{body}' "
        f"hdr x-request-id %[uuid]{retry}"
    )


def _return(status: str, body: str, condition: str = "", *, close: bool = False) -> str:
    closing = " hdr connection close" if close else ""
    return f"http-request return {_answer(status, body)}{closing} {condition}".rstrip()


def _rules(rules: Sequence[str]) -> list[str]:
    return [f"    {rule}" for rule in rules]


def _own_errors() -> list[str]:
    return _rules([f"http-error {_answer(status, body)}" for status, body in _ERRORS.items()])


def _client_table(bounds: ProxyBounds) -> list[str]:
    if not bounds.client_connections:
        return []
    # For IPv6 a /64 network counts as one client.
    rules = ["stick-table type ipv6 size 100k expire 60s store conn_cur"]
    unless = ""
    if bounds.trusted_proxies:
        rules.append(f"acl from_proxy src {' '.join(bounds.trusted_proxies)}")
        forwarded = "req.hdr_ip(x-forwarded-for,-1),ipmask(32,64)"
        unless = " if !from_proxy"
        rules.append(f"http-request track-sc0 {forwarded} if from_proxy")
    # A rule answers requests over the limit. This rejects connections whose heads never end.
    most = bounds.client_connections + bounds.client_connections // 4 + 4
    return _rules([
        rules[0],
        *rules[1:2],
        f"tcp-request connection track-sc0 src,ipmask(32,64){unless}",
        f"tcp-request connection reject if {{ sc0_conn_cur gt {most} }}",
        *rules[2:],
    ])  # fmt: skip


def _request_rules(served: int, head_bytes: int, bounds: ProxyBounds) -> list[str]:
    full = _error("Too many connections. Try again in a moment.", code="too_many_connections")
    too_large = _error(
        f"The request's headers are too large: at most {head_bytes} bytes and {MAX_HEADERS} "
        "headers are accepted.",
        code="headers_too_large",
        type=_INVALID,
    )
    too_long = _error(
        f"The request's URL is too long: at most {head_bytes // 2} bytes are accepted.",
        code="url_too_long",
        type=_INVALID,
    )
    watched = f"if METH_POST {{ path {' '.join(WATCHED_PATHS)} }}"
    return [
        "http-request set-var(txn.frontline) str(1) if { path_beg /v1/ } or { path /v1 /health }",
        # Connections over the limit get an answer and are closed, as far as there is room for them.
        _return("429", full, f"if {{ fe_conn gt {served} }}", close=True),
        *_client_rules(bounds),
        _return("414", too_long, f"if {{ url_len gt {head_bytes // 2} }}"),
        _return(
            "431", too_large,
            f"if {{ req.fhdr_cnt gt {MAX_HEADERS} }} or {{ req.hdrs,length gt {head_bytes} }}",
        ),
        _client_header(bounds.proof),
        *(f"http-request del-header {name}" for name in _OBEYED),
        # The ingress does both at less cost (app/gateway/request_watch.py).
        f"http-request set-header {' '.join(NOT_WATCHED)} {watched}",
        f"http-request set-header {_OBEYED[0]} 0 {watched}",
        *_decoded_rules(),
        f"http-request del-header {_UNUSED} -m reg",
        # The OpenAI SDKs' eight headers about themselves: nobody reads them, but Serve looks into
        # each.
        "http-request del-header x-stainless- -m beg",
        # An upgrade, for example to WebSocket, would be answered without our application.
        "http-request del-header upgrade if { var(txn.frontline) -m found }",
    ]  # fmt: skip


def _client_header(proof: str | None) -> str:
    """Set the header, in place of whatever a client has sent in it."""
    if proof is None:
        return f"http-request del-header {CLIENT_HEADER}"
    return f'http-request set-header {CLIENT_HEADER} "{proof} %[src]"'


def _decoded_rules() -> list[str]:
    """Remove headers that Serve decodes, unless each has one value of printable ASCII."""
    rules = []
    for name, longest in _DECODED.items():
        value = f"req.fhdr({name})"
        rules += [
            f"http-request del-header {name} if {{ req.fhdr_cnt({name}) gt 1 }}",
            f"http-request del-header {name} if {{ {value} -m found }} "
            rf"!{{ {value} -m reg '^[\x20-\x7e]{{1,{longest}}}$' }}",
        ]
    return rules


def _client_rules(bounds: ProxyBounds) -> list[str]:
    most = bounds.client_connections
    if not most:
        return []
    body = _error(
        f"Too many connections from one address: at most {most}.", code="too_many_connections"
    )
    return [_return("429", body, f"if {{ sc0_conn_cur gt {most} }}", close=True)]


def _response_rules() -> list[str]:
    """Convert errors of Serve's replica, or of its HTTP server, to JSON.

    They are recognised by their plain text: our application answers no error in plain text.
    """
    plain = "{ var(txn.frontline) -m found } { res.hdr(content-type) -m beg text/plain }"
    return [
        f"http-response return {_answer(status, body)} if {{ status {status} }} {plain}"
        for status, body in _ERRORS.items()
    ]


def _log(folder: Path, message: str) -> None:
    """Write a line to stderr, which Serve keeps for a while, and to ``keeper.log``."""
    print(f"scripts/haproxy: {message}", file=sys.stderr)
    try:
        with (folder / "keeper.log").open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
    except OSError as error:
        print(f"scripts/haproxy: {error}", file=sys.stderr)


def _accepted(binary: str, path: Path) -> bool:
    """Return whether HAProxy would start with this configuration."""
    return os.spawnv(os.P_WAIT, binary, [binary, "-dS", "-c", "-f", str(path)]) == 0


def main(binary: str, path: Path) -> None:
    """Complete a file in place, or log why it stays unchanged.

    Raises:
        BadSetting: an environment variable has a bad value.
    """
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if descriptors == resource.RLIM_INFINITY:
        descriptors = _UNLIMITED
    bounds = ProxyBounds.read(os.environ, descriptors)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        text, warnings = complete(path.read_text(), bounds)
        new.write_text(text)
        if not _accepted(binary, new):
            raise UnknownConfig("HAProxy does not accept it with Frontline's additions")
        new.rename(path)
    except (UnknownConfig, OSError, ValueError) as error:
        new.unlink(missing_ok=True)
        warnings = [f"{path} stays as Serve has written it, without Frontline's bounds: {error}"]
    for warning in warnings:
        _log(path.parent, warning)


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except BadSetting as error:
        print(f"scripts/haproxy: {error}", file=sys.stderr)
        sys.exit(BAD_SETTING)
