import asyncio
import time
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.ingress import IngressSettings
from app.core.errors import CrossSite
from app.gateway.cross_site import refuse_other_sites, require_same_origin
from app.tenants import key_cache
from app.tenants.access import Access
from app.tenants.keys import KeyTable, create_key
from app.tenants.sessions import SESSION_S, create_session
from app.web.login import FAILURES, FailureLimit
from app.web.visitors import COOKIE
from tests.support.waiting import until

pytestmark = pytest.mark.unit

SAME = {"sec-fetch-site": "same-origin"}
ORIGIN = {"origin": "http://127.0.0.1"}


class Keys:
    """Some keys, which may be revoked."""

    def __init__(self):
        made = {
            name: create_key(name, admin=name == "boss", created=datetime.now(UTC))
            for name in ("boss", "tenant")
        }
        self.keys = {name: key for name, (key, _) in made.items()}
        self.texts = {name: text for name, (_, text) in made.items()}

    def table(self):
        return KeyTable.of(self.keys.values())


@pytest.fixture
async def keys(services, monkeypatch):
    monkeypatch.setattr(key_cache, "SOONEST_S", 0.0)
    monkeypatch.setattr(key_cache, "REFRESH_S", 0.01)
    kept = Keys()
    services.settings = IngressSettings.load({"auth": "keys"}, "user_config")
    services.access = Access("ingress", kept, None)
    services.access.start()
    yield kept
    await services.access.stop()


async def sign_in(browser, key, headers=SAME, after="/board"):
    return await browser.post("/login", data={"key": key, "next": after}, headers=headers)


async def test_a_key_opens_the_board_and_its_cookie_does_not_show_it(browser, keys):
    asked = await browser.get("/board")
    assert (asked.status_code, asked.headers["location"]) == (303, "/login?next=/board")
    assert 'value="/board"' in (await browser.get("/login?next=/board")).text
    answer = await sign_in(browser, keys.texts["boss"])
    assert (answer.status_code, answer.headers["location"]) == (303, "/board")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/;" in cookie
    assert "Secure" not in cookie
    assert keys.texts["boss"] not in cookie and keys.keys["boss"].secret_hash not in cookie
    assert (await browser.get("/board")).status_code == 200


@pytest.mark.parametrize("scheme", ["https", "HTTPS, http"])
async def test_behind_https_the_cookie_is_sent_by_https_alone(browser, keys, scheme):
    headers = SAME | {"x-forwarded-proto": scheme}
    assert "Secure" in (await sign_in(browser, keys.texts["boss"], headers)).headers["set-cookie"]


async def test_a_key_that_is_no_admin_key_does_not_open_the_board(browser, keys):
    await sign_in(browser, keys.texts["tenant"])
    page = await browser.get("/board")
    assert page.status_code == 403 and "admin" in page.text and "/login" in page.text
    events = await browser.get("/board/events")
    assert events.status_code == 403
    assert events.json()["error"]["code"] == "admin_key_required"


@pytest.mark.parametrize("key", ["", "x", "fl-" + "0" * 16 + "-" + "0" * 64])
async def test_a_wrong_key_opens_nothing(browser, keys, key):
    answer = await sign_in(browser, key)
    assert answer.status_code == 401 and "Incorrect API key" in answer.text
    assert "set-cookie" not in answer.headers and "www-authenticate" not in answer.headers
    assert (await browser.get("/board/events")).status_code == 401


async def test_with_a_revoked_key_a_session_ends_everywhere(browser, keys):
    await sign_in(browser, keys.texts["boss"])
    assert (await browser.get("/board")).status_code == 200
    del keys.keys["boss"]
    while (await browser.get("/board")).status_code != 303:
        await asyncio.sleep(0.01)
    assert (await browser.get("/board/events")).status_code == 401


async def test_a_session_is_good_at_an_ingress_that_has_just_started(browser, keys):
    token = create_session(keys.keys["boss"], time.time())
    browser.cookies.set(COOKIE, token)
    assert (await browser.get("/board")).status_code == 200


async def test_an_expired_session_is_none(browser, keys):
    browser.cookies.set(COOKIE, create_session(keys.keys["boss"], time.time() - SESSION_S - 1))
    assert (await browser.get("/board")).status_code == 303


@pytest.mark.parametrize("cookie", ["", "x", "\xff", "1.x.1.x", "a=b; =; ;;", '"'])
async def test_any_cookie_may_come(browser, keys, cookie):
    headers = {"cookie": f"{COOKIE}={cookie}".encode("latin-1")}
    assert (await browser.get("/board", headers=headers)).status_code == 303


async def test_a_session_opens_the_pages_of_models(browser, keys):
    assert (await browser.get("/")).status_code == 401
    await sign_in(browser, keys.texts["tenant"])
    assert (await browser.get("/")).status_code == 200


async def test_a_cookie_does_not_open_the_api(browser, keys):
    await sign_in(browser, keys.texts["boss"])
    assert (await browser.get("/v1/models")).status_code == 401
    assert (await browser.get("/v1/usage")).status_code == 401


async def test_a_key_in_the_header_does_without_a_session(browser, keys):
    headers = {"authorization": f"Bearer {keys.texts['boss']}"}
    assert (await browser.get("/board", headers=headers)).status_code == 200
    browser.cookies.set(COOKIE, create_session(keys.keys["boss"], time.time()))
    headers = {"authorization": f"Bearer {keys.texts['tenant']}"}
    assert (await browser.get("/board", headers=headers)).status_code == 403


@pytest.mark.parametrize("path", ["/login", "/logout"])
@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": "cross-site", **ORIGIN},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8080"},
        {},
    ],
)
async def test_a_page_of_another_site_signs_nobody_in_or_out(browser, keys, path, headers):
    answer = await browser.post(path, data={"key": keys.texts["boss"]}, headers=headers)
    assert answer.status_code == 403 and "set-cookie" not in answer.headers


async def test_an_older_browser_names_the_origin_alone(browser, keys):
    assert (await sign_in(browser, keys.texts["boss"], ORIGIN)).status_code == 303


async def test_signing_out_removes_the_cookie(browser, keys):
    await sign_in(browser, keys.texts["boss"])
    answer = await browser.post("/logout", headers=SAME)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert (await browser.get("/board")).status_code == 303


@pytest.mark.parametrize("after", ["//evil.example", "https://evil.example", "/\\evil", "", "x"])
async def test_after_signing_in_one_stays_here(browser, keys, after):
    answer = await sign_in(browser, keys.texts["tenant"], after=after)
    assert answer.headers["location"] == "/usage"


async def test_failures_are_bounded_and_lock_nobody_out(browser, keys, services):
    await until(lambda: services.access.keys_read)
    answers = [(await sign_in(browser, f"wrong {n}")).status_code for n in range(FAILURES + 3)]
    assert answers[:FAILURES] == [401] * FAILURES and answers[-1] == 429
    assert (await sign_in(browser, keys.texts["boss"])).status_code == 303


async def test_a_form_is_bounded(browser, keys):
    assert (await sign_in(browser, "x" * 5000)).status_code == 413


async def test_where_no_key_is_required_nobody_signs_in(browser):
    assert (await browser.get("/board")).status_code == 200
    answer = await browser.get("/login?next=/board")
    assert (answer.status_code, answer.headers["location"]) == (303, "/board")


@pytest.mark.parametrize("path", ["/board", "/board/events", "/login"])
async def test_a_host_that_is_not_served_sees_nothing(browser, path):
    assert (await browser.get(path, headers={"host": "evil.example"})).status_code == 403


async def test_a_page_of_another_site_does_not_look(browser):
    answer = await browser.get("/board/events", headers={"sec-fetch-site": "cross-site"})
    assert answer.status_code == 403


@pytest.mark.parametrize("path", ["/login", "/logout", "/board"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_for_clients_of_the_api_nothing_is_there(browser, path, method):
    answer = await browser.request(method, path, headers={"accept": "*/*"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_url"


@given(st.binary(max_size=30), st.binary(max_size=30))
def test_no_origin_but_ours_passes(origin, site):
    headers = {b"host": b"127.0.0.1:8000", b"origin": origin}
    if origin.partition(b"://")[2].lower() != b"127.0.0.1:8000":
        with pytest.raises(CrossSite):
            require_same_origin(headers)
    if site != b"same-origin":
        with pytest.raises(CrossSite):
            require_same_origin(headers | {b"sec-fetch-site": site})
    if site not in (b"same-origin", b"none"):
        with pytest.raises(CrossSite):
            refuse_other_sites({b"sec-fetch-site": site})


@given(st.lists(st.floats(0, 30), max_size=200))
def test_no_more_fail_than_the_bound_and_what_a_minute_gives_back(pauses):
    limit, now, failed = FailureLimit(), 0.0, 0
    for pause in pauses:
        now += pause
        if limit.wait_s(now) == 0:
            limit.failed(now)
            failed += 1
    assert failed <= FAILURES + now * FAILURES / 60 + 1
    later = now + limit.wait_s(now) + 0.001
    assert limit.wait_s(later) == 0
