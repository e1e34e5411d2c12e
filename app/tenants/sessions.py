"""Sessions of browsers that have signed in with a key. Pure: the time is passed in.

A browser's navigation carries no API key, so it gets a cookie: a token that names the key and an
expiry, signed by HMAC-SHA-256. The signing secret is made of the key's stored hash. So every
ingress can check a token without another secret or a table of sessions, and a token ends when its
key is revoked. The key itself cannot be recovered from a token.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Final

from app.tenants.keys import ApiKey

SESSION_S: Final = 12 * 3600
"""How long a session lasts, in seconds: a working day, since nobody can end one elsewhere but by
revoking its key."""

_CONTEXT: Final = b"frontline browser session 1\n"
_FORM: Final = re.compile(r"1\.([0-9a-f]{1,64})\.([0-9]{1,12})\.([0-9a-f]{64})")


def create_session(key: ApiKey, now: float) -> str:
    """Return a token for the owner of a key, from ``now`` on, in Unix seconds."""
    expires = int(now) + SESSION_S
    return f"1.{key.key_id}.{expires}.{_signature(key, expires)}"


def session_key_id(token: str) -> str | None:
    """Return the id of the key that a token names, or ``None`` if it is no token."""
    match = _FORM.fullmatch(token)
    return match[1] if match else None


def is_valid(token: str, key: ApiKey, now: float) -> bool:
    """Return whether a token was made for this key and has not expired."""
    match = _FORM.fullmatch(token)
    if match is None or match[1] != key.key_id:
        return False
    expires = int(match[2])
    # One that lasts longer than any was signed by nobody here, whatever its signature says.
    lasts = now < expires <= now + SESSION_S + _SKEW_S
    return hmac.compare_digest(match[3], _signature(key, expires)) and lasts


_SKEW_S: Final = 300.0
"""How far the clocks of two ingresses may differ, in seconds."""


def _signature(key: ApiKey, expires: int) -> str:
    secret = hashlib.sha256(_CONTEXT + key.secret_hash.encode()).digest()
    return hmac.new(secret, f"{key.key_id}.{expires}".encode(), hashlib.sha256).hexdigest()
