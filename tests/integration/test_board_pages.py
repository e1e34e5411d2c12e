"""The board, the usage page and the form to sign in, in a real browser; the models are made up."""

import csv
import re

import pytest
from playwright.sync_api import expect

from tests.support.browser import DESKTOP, PHONE, chromium, tab_to, visiting
from tests.support.site import ASLEEP, BUSY, STARTING, Keys, served

pytestmark = pytest.mark.integration

SIZES = pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """An ingress that is open."""
    with served(tmp_path_factory.mktemp("open")) as site:
        yield site


@pytest.fixture(scope="module")
def keys():
    return Keys()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, keys):
    """An ingress that asks for keys."""
    with served(tmp_path_factory.mktemp("keys"), keys) as site:
        yield site


def picture(visit, what, size, scheme, part):
    """Keep the picture that the documentation shows: one of these sizes and lights is enough."""
    if (size, scheme) == (DESKTOP, "light"):
        visit.picture(f"{what}-desktop", part)


def model(page, name):
    return page.locator(".model", has=page.get_by_role("heading", name=name, exact=True))


def live(page):
    expect(page.get_by_text("Live", exact=True)).to_be_visible()


@SCHEMES
@SIZES
def test_the_board_is_live_in_every_size_and_light(browser, site, size, scheme):
    with visiting(browser, site, viewport=size, color_scheme=scheme) as visit:
        page = visit.open("/board")
        live(page)
        busy = model(page, BUSY)
        expect(busy.locator("canvas")).to_have_count(6)
        tiers = busy.get_by_role("region", name="Tiers now")
        row = tiers.get_by_role("row", name=re.compile("^default"))
        expect(row).to_contain_text(re.compile(r"\d+ ms"))
        expect(busy.get_by_role("row", name="shed queue full")).to_be_visible()
        expect(busy.get_by_role("region", name="Autoscaling decisions")).to_contain_text("1 → 2")
        objectives = busy.get_by_role("region", name="Service level objectives")
        for tier, words in (
            ("priority", r"95 % of streams begin within 300 ms.* of \d+k? met"),
            ("default", r"90 % .* not met"),
            ("flex", "99 % of streams begin within 9.00 s *\tno data"),
        ):
            expect(objectives.get_by_role("row", name=re.compile(f"^{tier}"))).to_have_text(
                re.compile(words), use_inner_text=True
            )
        expect(model(page, ASLEEP)).to_contain_text("Asleep: it has no replicas")
        expect(model(page, STARTING)).to_contain_text(
            re.compile(
                r"Starting: vllm: loading weights 40 %, since .*, last time it took 31.0 s; "
                r"vllm: compiling, since .*, last time it took 31.0 s\."
            )
        )
        before = row.inner_text()
        expect(row).not_to_have_text(before)
        assert visit.too_wide() <= 0
        picture(visit, "board", size, scheme, busy)


def test_the_board_is_used_by_keyboard_alone(browser, site):
    with visiting(browser, site, viewport=DESKTOP) as visit:
        page = visit.open("/board")
        live(page)
        tab_to(page, page.get_by_label("5 minutes"))
        page.keyboard.press("ArrowRight")
        expect(page.get_by_label("1 hour")).to_be_checked()
        busy = model(page, BUSY)
        # What scrolls can be reached.
        tab_to(page, busy.get_by_role("region", name="Tiers now"))
        slots = busy.locator("figure", has_text="Slots")
        expect(slots).to_contain_text("slots 16")
        tab_to(page, slots.get_by_label("Replica in the chart of slots"))
        page.keyboard.press("ArrowDown")
        expect(slots).to_contain_text("slots 8")
        for name in ("Replicas", "Sheds and downgrades", "Autoscaling decisions"):
            tab_to(page, busy.get_by_role("region", name=name))


def test_usage_is_seen_by_keyboard_alone(browser, guarded, keys):
    with visiting(browser, guarded, viewport=DESKTOP) as visit:
        page = visit.open("/usage")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type(keys.texts["acme"])
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="Usage of acme")).to_be_visible()
        tab_to(page, page.get_by_label("From", exact=True))
        tab_to(page, page.get_by_role("button", name="Show"))
        tab_to(page, page.get_by_role("link", name="Records as CSV"))
        with page.expect_download():
            page.keyboard.press("Enter")
        for name in ("Spend by day, model and tier", "What is left of them", "Requests"):
            tab_to(page, page.get_by_role("region", name=name, exact=True))
        tab_to(page, page.get_by_role("link", name="Older requests"))
        page.keyboard.press("Enter")
        rows = page.get_by_role("region", name="Requests", exact=True).get_by_role("row")
        expect(rows).to_have_count(11)
        tab_to(page, page.get_by_role("button", name="Sign out"))
        page.keyboard.press("Enter")
        expect(page.get_by_label("API key")).to_be_focused()


def test_a_lost_connection_is_told_and_comes_back(browser, site):
    with visiting(browser, site, viewport=DESKTOP) as visit:
        tries = []

        def stream(route):
            tries.append(route)
            route.fulfill(status=503, json={}) if len(tries) < 4 else route.continue_()

        visit.page.route("**/board/events", stream)
        page = visit.open("/board")
        expect(page.get_by_text("Reconnecting", exact=True)).to_be_visible()
        live(page)
        # The browser itself writes down each answer of 503.
        visit.complaints = [one for one in visit.complaints if "503" not in one]


@SCHEMES
@SIZES
def test_a_tenant_sees_its_usage(browser, guarded, keys, size, scheme):
    with visiting(browser, guarded, viewport=size, color_scheme=scheme) as visit:
        page = visit.open("/usage")
        sign_in(page, keys.texts["acme"])
        expect(page.get_by_role("heading", name="Usage of acme")).to_be_visible()
        expect(page.get_by_role("row", name="requests a minute")).to_contain_text("600")
        requests = page.get_by_role("region", name="Requests", exact=True)
        expect(requests.get_by_role("row")).to_have_count(51)
        expect(requests).to_contain_text("no replica honours priority")
        assert visit.too_wide() <= 0
        picture(visit, "usage", size, scheme, page.get_by_role("region", name="Spend", exact=True))
        with page.expect_download() as download:
            page.get_by_role("link", name="Records as CSV").click()
        rows = list(csv.DictReader(download.value.path().read_text().splitlines()))
        assert {row["tenant"] for row in rows} == {"acme"} and len(rows) == 60
        page.get_by_role("link", name="Older requests").click()
        expect(requests.get_by_role("row")).to_have_count(11)


def sign_in(page, key):
    page.get_by_label("API key").fill(key)
    page.keyboard.press("Enter")


def test_only_an_admin_sees_the_board(browser, guarded, keys):
    with visiting(browser, guarded, viewport=DESKTOP) as visit:
        page = visit.open("/board")
        sign_in(page, "wrong")
        expect(page.get_by_role("alert")).to_contain_text("Incorrect API key")
        sign_in(page, keys.texts["acme"])
        expect(page.get_by_text("It needs an admin key")).to_be_visible()
        page.get_by_role("link", name="Sign in").click()
        sign_in(page, keys.texts["ops"])
        expect(page.get_by_role("heading", name="Usage of ops")).to_be_visible()
        page.get_by_role("link", name="Board").click()
        live(page)
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("API key")).to_be_visible()
        # The browser itself writes down the answers of 401 and 403.
        visit.complaints = [one for one in visit.complaints if not re.search("40[13]", one)]
