"""API keys: what a key is, and how an ingress knows it. The pure part.

A key reads ``fl-<key id>-<secret>``. The key id is public: it finds the key and stands in records
and logs. Of the secret only a SHA-256 is stored. A slow password hash would add nothing: it makes
guessing hard where people choose the secret, and this one is 256 random bits, which nobody
guesses; but it would cost every request milliseconds of CPU.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Final

from app.core.tiers import Tier

_PREFIX: Final = "fl"
_ID_BYTES: Final = 8
_SECRET_BYTES: Final = 32
_FORM: Final = re.compile(
    rf"{_PREFIX}-([0-9a-f]{{{2 * _ID_BYTES}}})-([0-9a-f]{{{2 * _SECRET_BYTES}}})"
)
_HASH: Final = re.compile(r"[0-9a-f]{64}")
MAX_NAME: Final = 100
"""Longest name of a tenant or a key, in characters."""


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """How much a key may use; ``None`` sets no limit.

    Attributes:
        rpm: requests in any minute.
        tpm: tokens, of prompts and answers, in any minute.
        priority_share: which part of its requests may be served as priority, from 0 to 1; above
            it they are served as default.
    """

    rpm: int | None = None
    tpm: int | None = None
    priority_share: Decimal | None = None

    @property
    def any_rate(self) -> bool:
        """Whether there is a limit on requests or tokens."""
        return self.rpm is not None or self.tpm is not None

    def __post_init__(self) -> None:
        for name, limit in (("rpm", self.rpm), ("tpm", self.tpm)):
            if limit is not None and type(limit) is not int:
                raise ValueError(f"{name} is a whole number")
            if limit is not None and limit < 1:
                raise ValueError(f"{name} is at least 1")
        if self.priority_share is not None and not 0 <= self.priority_share <= 1:
            raise ValueError("priority_share is from 0 to 1")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is stored; it cannot be made into one that works.

    Attributes:
        key_id: its public part.
        secret_hash: of the secret; kept out of ``repr``.
        tenant: who pays, and who sees the usage.
        name: what people call it.
        default_tier: the tier of requests that ask for none.
        tiers: the tiers that it may use; ``default`` is always among them.
        limits: how much it may use.
        created: in UTC.
        revoked: in UTC; ``None`` while it works.
    """

    key_id: str
    secret_hash: str = field(repr=False)
    tenant: str
    name: str
    default_tier: Tier
    tiers: frozenset[Tier]
    limits: KeyLimits
    created: datetime
    revoked: datetime | None = None

    def __post_init__(self) -> None:
        if not self.tenant:
            raise ValueError("a key has a tenant")
        if any(len(text) > MAX_NAME or not text.isprintable() for text in (self.tenant, self.name)):
            raise ValueError(f"names have at most {MAX_NAME} characters, all of them printable")
        if not _HASH.fullmatch(self.secret_hash):
            raise ValueError("the hash of a secret has 64 hexadecimal digits")
        if not {Tier.DEFAULT, self.default_tier} <= self.tiers:
            raise ValueError("the default tier of a key must be among its tiers")


def create_key(
    tenant: str,
    *,
    name: str = "",
    default_tier: Tier = Tier.DEFAULT,
    tiers: Iterable[Tier] = tuple(Tier),
    limits: KeyLimits | None = None,
    created: datetime,
) -> tuple[ApiKey, str]:
    """Return a new key and the text that its owner sends, which nobody can find out later.

    Raises:
        ValueError: a value is out of its bounds; the message says which.
    """
    key_id, secret = secrets.token_hex(_ID_BYTES), secrets.token_hex(_SECRET_BYTES)
    allowed = frozenset(tiers) | {Tier.DEFAULT}
    key = ApiKey(
        key_id, _hash(secret), tenant, name, default_tier, allowed, limits or KeyLimits(), created
    )
    return key, f"{_PREFIX}-{key_id}-{secret}"


@dataclass(frozen=True, slots=True)
class KeyTable:
    """The keys that work, as they were at one moment.

    Attributes:
        by_id: those that work, by key id.
        unreadable: what is wrong with each row that cannot be read, by key id; those keys do not
            work. It names no secret.
    """

    by_id: Mapping[str, ApiKey]
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, keys: Iterable[ApiKey], unreadable: Mapping[str, str] | None = None) -> KeyTable:
        """Return a table of those keys that are not revoked."""
        by_id = {key.key_id: key for key in keys if key.revoked is None}
        return cls(by_id, unreadable or {})

    def find(self, text: str) -> ApiKey | None:
        """Return the key that a client has sent, or ``None`` if it does not work.

        The secret is compared in constant time. That a key id exists can be found out, and is no
        secret.
        """
        match = _FORM.fullmatch(text)
        key = self.by_id.get(match[1]) if match else None
        if key is None or match is None:
            return None
        return key if hmac.compare_digest(_hash(match[2]), key.secret_hash) else None


def key_id_of(text: str) -> str | None:
    """Return the public part of what a client has sent, or ``None`` if it is no key at all."""
    match = _FORM.fullmatch(text)
    return match[1] if match else None


def bearer(authorization: str | None) -> str | None:
    """Return what an ``Authorization`` header holds for us, or ``None``."""
    scheme, _, text = (authorization or "").partition(" ")
    return text.strip() if scheme.lower() == "bearer" and text.strip() else None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
