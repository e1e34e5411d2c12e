"""Hides secrets in everything that is shown to people. Pure.

A value is secret if its name marks it as one. In doubt it is hidden.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

REDACTED: Final = "(not shown)"

_SECRET: Final = re.compile(
    r"(?:^|[_\W])(?:\w*key|token|secret|passw(?:or)?d|passphrase|credentials?|"
    # Collectors' keys are in the headers of OpenTelemetry's exporters.
    r"otlp_(?:\w+_)?headers)(?:[_\W]|$)",
    re.IGNORECASE,
)
# The password of a URL: everything from the first colon after the user to the last "@".
_PASSWORD: Final = re.compile(r"(?P<user>\w+://[^/\s:@]*):[^/\s]+@")


def is_secret(name: str) -> bool:
    """Whether a setting, variable or option of this name holds a secret."""
    return _SECRET.search(name) is not None


def redact(value: Any, name: str = "") -> Any:
    """Return a value without its secrets, those inside mappings, lists and JSON included.

    Args:
        value: anything that YAML can hold.
        name: the setting, variable or option that holds it; empty if none does.
    """
    if value is not None and not isinstance(value, bool) and is_secret(name):
        return REDACTED
    if isinstance(value, Mapping):
        return {key: redact(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    return _redact_text(value) if isinstance(value, str) else value


def redact_words(words: Iterable[str]) -> list[str]:
    """Return a command line without its secrets."""
    shown: list[str] = []
    option = ""
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            shown.append(f"{name}={redact(value, name)}" if equals else word)
            option = "" if equals else word
        else:
            # An option may have several values.
            shown.append(redact(word, option))
    return shown


def _redact_text(text: str) -> str:
    if text.startswith(("{", "[")):
        try:
            return json.dumps(redact(json.loads(text)))
        except ValueError:
            pass
    return _PASSWORD.sub(rf"\g<user>:{REDACTED}@", text)
