"""Where the store is: a database URL, which may hold a password and is never shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BeforeValidator, SecretStr
from pydantic_core import PydanticCustomError

from app.core.paths import expand_path

if TYPE_CHECKING:
    from sqlalchemy import URL

DEFAULT_URL: Final = "sqlite:///${FRONTLINE_HOME}/ledger/usage.db"
_DRIVERS: Final = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}


def parse_url(text: str) -> URL:
    """Return a database URL with the driver that Frontline uses.

    Raises:
        ValueError: it is none, or of another database; the message holds nothing of it.
    """
    # Processes that know the settings but use no store should not load SQLAlchemy.
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError("expected a database URL") from None
    if url.drivername not in {*_DRIVERS, *_DRIVERS.values()}:
        raise ValueError("expected sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE")
    return url.set(drivername=_DRIVERS[url.get_backend_name()])


def resolve_url(text: str) -> URL:
    """Return the URL with environment variables replaced, on this machine.

    Raises:
        SettingsError: it names a variable that is not set here.
        ValueError: as ``parse_url``.
    """
    return parse_url(expand_path(text))


def _check(value: Any) -> Any:
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    try:
        parse_url(text if isinstance(text, str) else "")
    except ValueError as error:
        # The type keeps the value out of the message (app.core.settings).
        raise PydanticCustomError("secret", "{problem}", {"problem": str(error)}) from None
    return value


StoreUrl = Annotated[SecretStr, BeforeValidator(_check)]
"""A database URL in a configuration. ``${VARIABLE}`` is replaced on the node that uses it."""
