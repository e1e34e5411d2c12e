"""The pages in a real browser, on a running Frontline with simulated engines."""

import json
import re
from functools import partial

import httpx
import pytest
from playwright.sync_api import expect

from tests.support.browser import DESKTOP, PHONE, chromium, done, run, tab, tab_to, visiting
from tests.support.cluster import eventually, ingress_app, pooled_app, simulated_app
from tests.support.waiting import PATIENCE_S, SLOWEST

pytestmark = pytest.mark.integration

CHAT = "/models/test/shown"
EVIL = "<img src=x onerror=\"console.error('ran')\"><script>console.error('ran')</script>"


@pytest.fixture(scope="module")
def site(frontline):
    """Models that are shown: on two engines with priority, and with priority off."""
    pools = {
        "vllm": {"tokens_per_second": 60},
        "sglang": {"tokens_per_second": 60, "dialect": "sglang"},
    }
    frontline.deploy(
        pooled_app("shown", pools),
        simulated_app("unpaid", settings={"tiers": {"priority": "off"}}),
    )
    frontline.wait_ready("shown", "unpaid")
    yield frontline.root
    frontline.remove("shown", "unpaid")


@pytest.fixture(scope="module")
def browser(site, tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def visit(browser, site):
    with visiting(browser, site, viewport=DESKTOP) as visit:
        yield visit


def stamped(page, what):
    return page.locator(f"#stamp-{what}").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_pages_are_readable_in_every_size_and_light(browser, site, size, scheme):
    with visiting(browser, site, viewport=size, color_scheme=scheme) as visit:
        page = visit.open("/")
        card = page.locator(".model-card", has_text="shown")
        expect(card.get_by_text("Priority", exact=True)).to_be_visible()
        expect(card).to_contain_text("simulated SGLang, simulated vLLM")
        others = page.locator(".model-card", has_text="unpaid")
        expect(others).to_contain_text("The operator does not offer it for this model.")
        assert visit.too_wide() <= 0

        card.get_by_role("link", name="shown").click()
        expect(page).to_have_url(site + CHAT)
        page.get_by_label("Max tokens").fill("40")
        run(page, "Default")
        run(page, "Priority")
        assert len(page.locator("#answer").inner_text().split()) == 40
        assert visit.too_wide() <= 0
        assert visit.shifted() < 0.02


def test_the_playground_shows_what_the_answer_says(visit, frontline):
    page = visit.open(CHAT)
    page.get_by_label("Prompt").fill("one two three")
    page.get_by_label("Max tokens").fill("12")
    costs = {}
    for tier in ("Priority", "Default", "Flex"):
        run(page, tier)
        assert stamped(page, "tier") == tier.lower()
        assert re.fullmatch(r"\d+(\.\d)? ms", stamped(page, "queue"))
        assert re.fullmatch(r"[\d.]+ m?s", stamped(page, "ttft"))
        assert stamped(page, "output") == "12"
        costs[tier] = float(stamped(page, "cost").removeprefix("$"))
        record = eventually(partial(_last, frontline, tier.lower()))
        assert costs[tier] == pytest.approx(float(record["cost"]), rel=1e-9)
    assert costs["Priority"] == pytest.approx(1.5 * costs["Default"])
    # The speeds of what was just served are shown without loading the page anew.
    expect(page.locator(".tier-card.priority .speed")).to_contain_text(
        "ms", timeout=SLOWEST * 10_000
    )


def _last(frontline, tier):
    wanted = {"served_tier": tier, "completion_tokens": 12}
    records = frontline.records(model="test/shown", state="completed", **wanted)
    return records[-1] if records else None


def test_a_tier_that_is_not_delivered_is_said_with_its_reason(visit):
    page = visit.open("/models/test/fcfs")
    expect(page.locator(".tier-card.priority")).to_contain_text("No running engine has native")
    run(page, "Priority")
    assert stamped(page, "tier") == "default"
    expect(page.locator("#reason")).to_contain_text("you pay the default price")


def test_the_playground_works_by_keyboard_alone(visit):
    page = visit.open(CHAT)
    keys = page.keyboard
    seen = [tab(page) for _ in range(5)]
    assert seen == ["Skip to the content", "Frontline", "Models", "Board", "Usage"]
    tab_to(page, page.locator("#prompt"))
    keys.press("Control+A")
    keys.type("by keyboard")
    tab_to(page, page.locator("[name=tier]:checked"))
    keys.press("ArrowRight")
    expect(page.get_by_label("Default", exact=True)).to_be_checked()
    tab_to(page, page.locator("#limit"))
    keys.press("Control+A")
    keys.type("5")
    tab_to(page, page.locator("#run"))
    keys.press("Enter")
    done(page)
    # The focus is where the next run starts from.
    expect(page.get_by_role("button", name="Run")).to_be_focused()
    assert stamped(page, "output") == "5"
    page.get_by_label("Prompt").focus()
    keys.press("Control+Enter")
    done(page)


def test_stop_ends_the_stream_and_what_was_generated_is_kept(visit, frontline):
    page = visit.open(CHAT)
    page.get_by_label("Max tokens").fill("2000")
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#answer")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_contain_text("Stopped.")
    assert 0 < len(page.locator("#answer").inner_text().split()) < 2000
    eventually(lambda: frontline.records(model="test/shown", state="interrupted"))
    expect(page.get_by_role("button", name="Run")).to_be_enabled()


def test_an_answer_is_shown_as_text_whatever_the_model_writes(visit, site):
    page = visit.open(CHAT)

    def ask_for_html(route):
        schema = {"name": "evil", "schema": {"const": EVIL}}
        body = json.loads(route.request.post_data) | {
            "response_format": {"type": "json_schema", "json_schema": schema}
        }
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", ask_for_html)
    run(page, "Default")
    assert json.loads(page.locator("#answer").inner_text()) == EVIL
    assert page.locator("#answer img, #answer script").count() == 0


def test_what_a_model_thinks_is_shown_apart_from_what_it_says(visit):
    page = visit.open(CHAT)
    deltas = [{"reasoning_content": "Let me "}, {"reasoning": "see."}, {"content": "Yes."}]
    events = [json.dumps({"choices": [{"delta": delta}]}) for delta in deltas]
    body = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])
    headers = {"x-service-tier": "default", "x-queue-time-ms": "0.0"}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, headers=headers))
    run(page, "Default")
    assert page.locator("#answer .thought").inner_text() == "Let me see."
    assert page.locator("#answer .said").inner_text() == "Yes."


ERRORS = [
    (
        {"status": 429, "headers": {"retry-after": "7"}, "json": {"code": "engine_overloaded"}},
        "The model is busy, and its queue is full. Try again in 7 s.",
    ),
    ({"status": 503, "json": {"code": "x", "message": "Away."}}, "Away."),
    ({"status": 502, "text": "<html>bad gateway"}, "The server answered with status 502."),
    ({"status": 200, "text": "data: {}\n\n"}, "The answer ended too early."),
    (
        {"status": 200, "text": 'data: {"error": {"code": "engine_error"}}\n\n'},
        "The engine failed.",
    ),
    (None, "The connection to the server was lost. Try again."),
]


@pytest.mark.parametrize(("answer", "said"), ERRORS)
def test_errors_are_told_in_plain_words(browser, site, answer, said):
    with visiting(browser, site, viewport=DESKTOP) as visit:
        page = visit.open(CHAT)

        def fail(route):
            if answer is None:
                return route.abort()
            body = answer.get("text") or json.dumps({"error": answer["json"]})
            headers = {"content-type": "application/json", **answer.get("headers", {})}
            route.fulfill(status=answer["status"], headers=headers, body=body)

        page.route("**/v1/chat/completions", fail)
        page.get_by_role("button", name="Run").click()
        expect(page.get_by_role("status")).to_have_text(said)
        expect(page.get_by_role("button", name="Run")).to_be_enabled()
        # The browser itself notes on the console that a request has failed.
        visit.complaints = [one for one in visit.complaints if "Failed to load resource" not in one]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("Prompt", " ", "Write a prompt first."), ("Max tokens", "0", "must be a whole number")],
)
def test_what_cannot_be_sent_is_said_where_it_is(visit, field, value, said):
    page = visit.open(CHAT)
    page.get_by_label(field).fill(value)
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("status")).to_contain_text(said)
    expect(page.get_by_label(field)).to_be_focused()


def test_a_request_is_copied_as_it_is_shown(browser, site):
    permissions = ["clipboard-read", "clipboard-write"]
    with visiting(browser, site, viewport=DESKTOP, permissions=permissions) as visit:
        page = visit.open(CHAT)
        page.get_by_label("Flex", exact=True).check()
        page.get_by_label("Python", exact=True).check()
        page.locator("[data-language=python] button").click()
        expect(page.locator("[data-language=python] button")).to_have_text("Copied")
        text = page.evaluate("navigator.clipboard.readText()")
    assert f'base_url="{site}/v1"' in text and 'model="test/shown"' in text
    assert 'service_tier="flex"' in text
    compile(text, "copied", "exec")


def test_motion_is_left_out_for_those_who_want_none(browser, site):
    with visiting(browser, site, reduced_motion="reduce") as visit:
        page = visit.open("/")
        lasts = page.evaluate(
            "getComputedStyle(document.querySelector('.model-card')).transitionDuration"
        )
    assert float(lasts.removesuffix("s")) < 0.001


def test_a_key_is_used_and_kept_nowhere(browser, site, frontline):
    from tests.integration.test_keys import create

    frontline.deploy(ingress_app(auth="keys"))
    eventually(lambda: httpx.get(f"{site}/v1/models", timeout=PATIENCE_S).status_code == 401, 40)
    try:
        key = create("reader")
        eventually(lambda: _works(site, key))
        _visit_with(browser, site, key)
    finally:
        frontline.restore_ingress()
        eventually(
            lambda: httpx.get(f"{site}/v1/models", timeout=PATIENCE_S).status_code == 200, 40
        )


def _works(site, key):
    headers = {"authorization": f"Bearer {key}"}
    return httpx.get(f"{site}/v1/models", headers=headers, timeout=PATIENCE_S).status_code == 200


def _visit_with(browser, site, key):
    with visiting(browser, site, viewport=DESKTOP) as visit:

        def open_with_key(route):
            headers = {**route.request.headers, "authorization": f"Bearer {key}"}
            route.continue_(headers=headers)

        visit.page.route(re.compile(r"/(models|live)/"), open_with_key)
        page = visit.open(CHAT)
        page.get_by_role("button", name="Run").click()
        expect(page.get_by_role("status")).to_have_text("The key is missing, or does not work.")
        page.get_by_label("API key").fill(key)
        run(page, "Priority")
        kept = page.evaluate(
            "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
        )
        assert key not in kept and key not in page.content()
        visit.complaints = [one for one in visit.complaints if "401" not in one]
