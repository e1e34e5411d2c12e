"""Settings of the webhook for budget alerts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, model_validator
from pydantic_core import PydanticCustomError

from app.core.paths import expand_path
from app.core.settings import Problem, Settings, SettingsError

_LONGEST: Final = 2000


def _check_url(value: Any) -> Any:
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if problem := _problem_of_url(text if isinstance(text, str) else ""):
        # The type keeps the value out of the message: it may hold a token.
        raise PydanticCustomError("secret", "{problem}", {"problem": problem})
    return value


def _problem_of_url(text: str) -> str | None:
    if len(text) > _LONGEST or not text.isascii() or not text.isprintable() or " " in text:
        return f"expected a URL of at most {_LONGEST} characters, without spaces"
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known:
        return "expected http://HOST/PATH or https://HOST/PATH"
    if parts.username is not None or parts.password is not None:
        return "a user and a password in the URL are not supported; the signature is for that"
    return None


WebhookUrl = Annotated[SecretStr, BeforeValidator(_check_url)]
"""The URL of a receiver, which may hold a token and is never shown."""


class BudgetWebhookSettings(Settings):
    """Where budget alerts are sent, signed as Standard Webhooks has it."""

    url: WebhookUrl = Field(
        description="The receiver, `https://HOST/PATH`, or `http://` on a network that you trust: "
        "alerts name keys, tenants and amounts. Redirects are not followed.",
    )
    secret_env: str | None = Field(
        default=None,
        min_length=1,
        description="Environment variable of the ingress's node that holds the secret: `whsec_` "
        "and the base64 of 24 to 64 random bytes. Several, separated by white space, sign side by "
        "side, so that a secret can be replaced without a gap.",
    )
    secret_file: str | None = Field(
        default=None,
        min_length=1,
        description="File that holds the same, instead of `secret_env`. `~` and environment "
        "variables are expanded on the node. It is read when the settings are applied.",
    )
    timeout_s: float = Field(
        default=15.0,
        gt=0,
        le=300,
        description="Longest time for one try, in seconds. The specification advises 15 to 30.",
    )
    retry_for_s: float = Field(
        default=3600.0,
        ge=0,
        description="How long an alert is tried again that was not answered with a status from "
        "200 to 299, in seconds; the pauses grow to a minute. An hour bridges a restart or a "
        "short outage of the receiver. Alerts wait in memory only, so more would promise too much.",
    )
    max_waiting: int = Field(
        default=1000,
        gt=0,
        le=100_000,
        description="Most alerts that wait to be sent; further ones are dropped, counted and "
        "alarmed. A thousand budgets may reach a percentage while the receiver is away, in some "
        "500 KB.",
    )

    @model_validator(mode="after")
    def _one_secret(self) -> Self:
        if (self.secret_env is None) is (self.secret_file is None):
            # The type keeps the URL out of the message.
            raise PydanticCustomError("secret", "set either secret_env or secret_file")
        return self

    def read_secret(self, *where: str | int) -> str:
        """Return the text with the secrets, from the variable or the file. May block.

        Args:
            where: the key of these settings in the configuration, for the error.

        Raises:
            SettingsError: it cannot be read; the message holds nothing of it.
        """
        if self.secret_env is not None:
            text = os.environ.get(self.secret_env)
            if text is None:
                message = f"the environment variable {self.secret_env!r} is not set here"
                raise SettingsError(Problem((*where, "secret_env"), message))
            return text
        assert self.secret_file is not None, "checked above"
        try:
            return Path(expand_path(self.secret_file)).read_text("ascii")
        except SettingsError as error:
            message = error.problems[0].message
        except OSError as error:
            message = f"it cannot be read: {error.strerror}"
        except UnicodeDecodeError:
            message = "it is no text in ASCII"
        raise SettingsError(Problem((*where, "secret_file"), message))
