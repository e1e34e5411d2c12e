from html import escape

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core import errors
from app.gateway.asgi import build_api
from app.web.pages import CONTENT_SECURITY_POLICY, accepts_html, add_page, error_page

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", True),
        ("application/json, text/html;q=0.1", True),
        ("TEXT/HTML ; charset=utf-8", True),
        ("text/html;q=0", False),
        ("text/html; q=0.000, */*", False),
        ("*/*", False),
        ("text/*", False),
        ("application/json", False),
        ("", False),
    ],
)
def test_a_page_is_for_those_who_name_html(accept, html):
    assert accepts_html(accept) is html


@given(st.text())
def test_any_accept_header_is_understood(accept):
    assert accepts_html(accept) in (True, False)


def test_a_page_may_load_only_what_this_ingress_serves():
    page = error_page(errors.ServerError())
    assert page.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert CONTENT_SECURITY_POLICY.startswith("default-src 'none'; ")
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "same-origin"
    assert page.headers["cache-control"] == "private, no-cache"


@given(st.text(min_size=1))
def test_every_value_is_shown_as_text(text):
    error = errors.InvalidRequest(f"<b>{text}</b>")
    page = bytes(error_page(error).body).decode()
    assert "<b>" not in page
    assert escape(error.message).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page


def test_a_page_has_no_script_or_style_of_its_own():
    page = bytes(error_page(errors.ServerError()).body).decode()
    assert "<style" not in page and "style=" not in page and "<script>" not in page


@pytest.mark.parametrize("path", ["/", "/models/a", "/models/a/b"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS"])
@pytest.mark.parametrize("accept", ["*/*", "application/json"])
async def test_for_clients_of_the_api_nothing_is_changed(browser, path, method, accept):
    answer = await browser.request(method, path, headers={"accept": accept})
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == f"Invalid URL ({method} {path})"


@pytest.mark.parametrize(
    ("error", "status", "sign_in"),
    [
        (errors.ModelNotFound("x"), 404, False),
        (errors.InvalidKey(given=False), 401, True),
        (errors.Unavailable("Not now.", "engine_not_ready", 5), 503, False),
    ],
)
async def test_an_error_is_a_page_too(services, error, status, sign_in):
    async def fails(_):
        raise error

    front = build_api(services, lambda api, _: add_page(api, "/page", fails))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(front), base_url="http://127.0.0.1"
    ) as http:
        answer = await http.get("/page", headers={"accept": "text/html"})
        head = await http.head("/page", headers={"accept": "text/html"})
    assert answer.status_code == head.status_code == status
    assert escape(error.message, quote=False).replace("'", "&#39;") in answer.text
    assert ("/login" in answer.text) is sign_in
    assert answer.headers.get("retry-after") == error.headers.get("retry-after")
