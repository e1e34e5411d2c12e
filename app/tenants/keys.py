"""API keys: their format and how an ingress verifies them. The pure part.

A key has the form ``fl-<key id>-<secret>``. The key id is public: it finds the key and appears in
records and logs. Of the secret only a SHA-256 is stored. A slow password hash protects secrets that
people choose. This secret is 256 random bits, which cannot be guessed, so a slow hash would only
cost every request milliseconds of CPU.
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
from app.tenants.budget import Budget, Owner, parse_budgets
from app.tenants.scope import EVERYTHING, KeyScope

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
    """The limits of a key; ``None`` means no limit.

    Attributes:
        rpm: requests in any minute.
        tpm: tokens of prompts and answers in any minute.
        priority_share: the share of its requests that may be served as priority, from 0 to 1.
            Requests above it are served as default.
        in_flight: requests in flight at once, over all ingresses. The ingress's own bound on a key
            holds beside it.
    """

    rpm: int | None = None
    tpm: int | None = None
    priority_share: Decimal | None = None
    in_flight: int | None = None

    @property
    def any_rate(self) -> bool:
        """Whether there is a limit on requests or tokens."""
        return self.rpm is not None or self.tpm is not None

    def __post_init__(self) -> None:
        for name, limit in (("rpm", self.rpm), ("tpm", self.tpm), ("in_flight", self.in_flight)):
            if limit is not None and type(limit) is not int:
                raise ValueError(f"{name} is a whole number")
            if limit is not None and limit < 1:
                raise ValueError(f"{name} is at least 1")
        if self.priority_share is not None and not 0 <= self.priority_share <= 1:
            raise ValueError("priority_share is from 0 to 1")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is stored. The secret cannot be recovered from it.

    Attributes:
        key_id: the public part.
        secret_hash: the SHA-256 of the secret, in hexadecimal; left out of ``repr``.
        tenant: the tenant that is billed and sees the usage.
        name: a name for people.
        default_tier: the tier of requests that name none.
        tiers: the tiers that it may use; ``default`` is always among them.
        limits: its limits.
        created: when it was created, in UTC.
        revoked: when it was revoked, in UTC; ``None`` while it works.
        admin: whether it opens the board, which shows the traffic of all tenants.
        scope: the models and routes that it may use.
        expires: from when on it does not work, in UTC; ``None`` for never.
        budgets: its own budgets and those of its tenant.
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
    admin: bool = False
    scope: KeyScope = EVERYTHING
    expires: datetime | None = None
    budgets: tuple[Budget, ...] = ()

    def __post_init__(self) -> None:
        if not self.tenant:
            raise ValueError("a key has a tenant")
        check_name(self.tenant)
        check_name(self.name)
        if not _HASH.fullmatch(self.secret_hash):
            raise ValueError("the hash of a secret has 64 hexadecimal digits")
        if not {Tier.DEFAULT, self.default_tier} <= self.tiers:
            raise ValueError("the default tier of a key must be among its tiers")
        if self.expires is not None and self.expires.utcoffset() is None:
            raise ValueError("expires has a time zone")

    def works(self, now: datetime) -> bool:
        """Return whether it is neither revoked nor expired."""
        return self.revoked is None and (self.expires is None or now < self.expires)


def check_name(text: str) -> None:
    """Check the name of a tenant or a key.

    Raises:
        ValueError: it is too long, or has characters that are not printable.
    """
    if len(text) > MAX_NAME or not text.isprintable():
        raise ValueError(f"names have at most {MAX_NAME} characters, all of them printable")


def create_key(
    tenant: str,
    *,
    name: str = "",
    default_tier: Tier = Tier.DEFAULT,
    tiers: Iterable[Tier] = tuple(Tier),
    limits: KeyLimits | None = None,
    admin: bool = False,
    scope: KeyScope = EVERYTHING,
    expires: datetime | None = None,
    budgets: Iterable[str] = (),
    created: datetime,
) -> tuple[ApiKey, str]:
    """Return a new key and the text that its owner sends. The text cannot be recovered later.

    ``budgets`` are texts as ``parse_budget`` reads them.

    Raises:
        ValueError: a value is out of its bounds; the message names it.
    """
    key_id, secret = secrets.token_hex(_ID_BYTES), secrets.token_hex(_SECRET_BYTES)
    allowed = frozenset(tiers) | {Tier.DEFAULT}
    key = ApiKey(
        key_id, _hash(secret), tenant, name, default_tier, allowed, limits or KeyLimits(), created,
        admin=admin, scope=scope, expires=expires,
        budgets=parse_budgets(budgets, Owner.KEY, key_id),
    )  # fmt: skip
    return key, f"{_PREFIX}-{key_id}-{secret}"


@dataclass(frozen=True, slots=True)
class KeyTable:
    """The keys at one moment.

    Attributes:
        by_id: the keys that are not revoked, by key id. Some may have expired.
        unreadable: the error of each invalid row, by key id. Those keys do not work. The errors
            contain no secret.
    """

    by_id: Mapping[str, ApiKey]
    unreadable: Mapping[str, str] = field(default_factory=dict)
    # Texts that were found to be keys: at most one for each key, and gone with this table.
    _found: dict[str, ApiKey] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of(cls, keys: Iterable[ApiKey], unreadable: Mapping[str, str] | None = None) -> KeyTable:
        """Return a table of the keys that are not revoked."""
        by_id = {key.key_id: key for key in keys if key.revoked is None}
        return cls(by_id, unreadable or {})

    def get(self, key_id: str, now: datetime) -> ApiKey | None:
        """Return the key with an id, or ``None`` if it does not work now."""
        key = self.by_id.get(key_id)
        return key if key is not None and key.works(now) else None

    def find(self, text: str, now: datetime) -> ApiKey | None:
        """Return the key that a client has sent, or ``None`` if it does not work now.

        The secret is compared in constant time. A client can find out that a key id exists, which
        is no secret.
        """
        if (found := self._found.get(text)) is not None:
            return found if found.works(now) else None
        match = _FORM.fullmatch(text)
        key = self.get(match[1], now) if match else None
        if key is None or match is None:
            return None
        if not hmac.compare_digest(_hash(match[2]), key.secret_hash):
            return None
        self._found[text] = key
        return key


def key_id_of(text: str) -> str | None:
    """Return the key id in the text of a client, or ``None`` if the text is not a key."""
    match = _FORM.fullmatch(text)
    return match[1] if match else None


def bearer(authorization: str | None) -> str | None:
    """Return the bearer token of an ``Authorization`` header, or ``None``."""
    scheme, _, text = (authorization or "").partition(" ")
    return text.strip() if scheme.lower() == "bearer" and text.strip() else None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
