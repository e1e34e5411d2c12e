"""Protects an ingress without API keys from web pages of other sites. The pure part.

A page in a browser can send two kinds of request to `http://127.0.0.1:8000` without a preflight:

- A "simple" cross-origin `POST`, whose content type is one of a form's, or missing. JSON is not
  among them: before a JSON request a browser sends `OPTIONS`, which this API rejects. So JSON
  routes require a JSON content type (``require_json``).
- Any request after DNS rebinding, where the page's own name resolves to 127.0.0.1. The browser
  treats such a request as same-origin, and its `Host` header has the page's name. So where no key
  is required, `Host` must be a known name (``HostRule``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from app.core import errors

_JSON: Final = b"application/json"
_JSON_TYPE: Final = re.compile(rb"application/([a-z0-9!#$&^_.-]+\+)?json")


def require_json(headers: Mapping[bytes, bytes]) -> None:
    """Reject a request whose content type is not JSON.

    Raises:
        UnsupportedMediaType: the content type is missing, or another one.
    """
    given = headers.get(b"content-type")
    if given == _JSON:
        return
    essence = (given or b"").partition(b";")[0].strip(b" \t").lower()
    if not _JSON_TYPE.fullmatch(essence):
        raise errors.UnsupportedMediaType(given=bool(given))
