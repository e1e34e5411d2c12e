"""Protects an ingress from web pages of other sites. The pure part.

Without API keys, a page in a browser can send two kinds of request to `http://127.0.0.1:8000`
without a preflight:

- A "simple" cross-origin `POST`, whose content type is one of a form's, or missing. JSON is not
  among them: before a JSON request a browser sends `OPTIONS`, which this API rejects. So JSON
  routes require a JSON content type (``require_json``). The routes of forms look at where the
  request comes from instead (``refuse_senders``).
- Any request after DNS rebinding, where the page's own name resolves to 127.0.0.1. The browser
  treats such a request as same-origin, and its `Host` header has the page's name. So where no key
  is required, `Host` must be a known name (``HostRule``).

With keys, a browser that is signed in has a cookie. It is `SameSite=Strict`, so it comes with no
request that another site has caused. Routes that use it also require that the browser says where a
request comes from (``require_same_origin``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from app.core import errors
from app.protocol.form import boundary_of

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


def require_form(headers: Mapping[bytes, bytes]) -> None:
    """Reject a request whose content type is not that of a form with files.

    Raises:
        UnsupportedMediaType: the content type is missing, or another one.
    """
    given = headers.get(b"content-type")
    if given is None or boundary_of(given) is None:
        raise errors.UnsupportedMediaType(given=bool(given), form=True)


def refuse_senders(headers: Mapping[bytes, bytes]) -> None:
    """Reject a form that a browser sends for a page of another site: it asks nobody before.

    Clients that are no browsers send neither of the headers.

    Raises:
        CrossSite: another site has sent it.
    """
    if headers.keys() & {b"sec-fetch-site", b"origin"}:
        require_same_origin(headers)


def require_same_origin(headers: Mapping[bytes, bytes]) -> None:
    """Reject a request that changes something unless a page of this server has sent it.

    Every browser sends `Origin` with such a request, and newer ones `Sec-Fetch-Site`.

    Raises:
        CrossSite: another site has sent it, or neither header is there.
    """
    site = headers.get(b"sec-fetch-site")
    if site is not None:
        same = site == b"same-origin"
    else:
        _, _, origin = headers.get(b"origin", b"").partition(b"://")
        same = bool(origin) and origin.lower() == headers.get(b"host", b"").lower()
    if not same:
        raise errors.CrossSite


def refuse_other_sites(headers: Mapping[bytes, bytes]) -> None:
    """Reject a request that only reads if a browser says that another site has caused it.

    Raises:
        CrossSite: another site has caused it.
    """
    if headers.get(b"sec-fetch-site", b"none") not in (b"same-origin", b"none"):
        raise errors.CrossSite
