"""Keeps web pages of other sites away from an ingress that asks for no key. The pure part.

A page in a browser can send two kinds of request to `http://127.0.0.1:8000` without asking first:

- a "simple" cross-origin `POST`, whose content type is one of a form's, or missing. JSON is not
  among them: for it a browser asks with `OPTIONS`, which this API refuses. So JSON routes want a
  JSON content type (``require_json``).
- any request after DNS rebinding, where the page's own name resolves to 127.0.0.1. Such a request
  is same-origin to the browser, and its `Host` header has the page's name. So where no key is
  asked for, `Host` has to be a name that is known (``HostRule``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from app.core import errors

_JSON: Final = b"application/json"
_JSON_TYPE: Final = re.compile(rb"application/([a-z0-9!#$&^_.-]+\+)?json")


def require_json(headers: Mapping[bytes, bytes]) -> None:
    """Refuse a body that is not declared to be JSON.

    Raises:
        UnsupportedMediaType: the content type is missing, or another one.
    """
    given = headers.get(b"content-type")
    if given == _JSON:
        return
    essence = (given or b"").partition(b";")[0].strip(b" \t").lower()
    if not _JSON_TYPE.fullmatch(essence):
        raise errors.UnsupportedMediaType(given=bool(given))
