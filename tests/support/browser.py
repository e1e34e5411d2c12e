"""Chromium, as ``scripts/setup browser`` unpacks it, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.support.environment import skip
from tests.support.waiting import SLOWEST

DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 360, "height": 740}
_IMAGES = Path(__file__).parents[2] / "docs" / "images"
_UNPACKED = Path(os.environ.get("FRONTLINE_HOME", "/nowhere")) / "browsers" / "chromium"
_MISSING = "Chromium is not there: scripts/setup browser"
# Without them Chromium looks for updates and for hosts of its maker at every start.
_QUIET = (
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_FONTS = """\
<?xml version="1.0"?>
<fontconfig>
  <dir>{root}/usr/share/fonts</dir>
  <cachedir>{cache}</cachedir>
  <alias><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
</fontconfig>
"""


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """Run Chromium; ``folder`` is for its own files. A test without it is skipped."""
    program = _UNPACKED / "usr/lib/chromium/chromium-headless-shell"
    if not program.exists():
        # Elsewhere than on Debian nothing provides it.
        skip(_MISSING) if shutil.which("apt-get") else pytest.skip(_MISSING)
    fonts = folder / "fonts.conf"
    fonts.write_text(_FONTS.format(root=_UNPACKED, cache=folder / "fonts"))
    libraries = [*_UNPACKED.glob("usr/lib/*-linux-gnu*"), *_UNPACKED.glob("usr/lib/*/pulseaudio")]
    environment: dict[str, str | float | bool] = {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
        "FONTCONFIG_FILE": str(fonts),
    }
    expect.set_options(timeout=SLOWEST * 20_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=list(_QUIET), env=environment
        )
        try:
            yield browser
        finally:
            browser.close()


_WATCH = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const one of list.getEntries()) if (!one.hadRecentInput) window.shifts.push(one.value);
}).observe({ type: "layout-shift", buffered: true });
"""


class Visit:
    """One visit of a site: what a reader would not see is noted.

    Attributes:
        page: the page that is open.
        complaints: messages on the console, errors of scripts, violations of the page's policy.
        elsewhere: the URLs that it asked for which are not the site's own.
    """

    def __init__(self, context: BrowserContext, site: str) -> None:
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self._context = context
        self._site = site
        context.add_init_script(_WATCH)
        self.page: Page = context.new_page()
        self.page.set_default_timeout(SLOWEST * 20_000)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._note)

    def _note(self, request: Any) -> None:
        if not request.url.startswith((self._site + "/", "data:")):
            self.elsewhere.append(request.url)

    def open(self, path: str) -> Page:
        """Open a page of the site."""
        self.page.goto(self._site + path)
        return self.page

    def shifted(self) -> float:
        """How far things moved by themselves since the page was opened (CLS; 0.1 is noticed)."""
        return float(self.page.evaluate("window.shifts.reduce((sum, one) => sum + one, 0)"))

    def too_wide(self) -> int:
        """By how many pixels the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))

    def picture(self, name: str, part: Locator | None = None) -> None:
        """Keep a picture of the whole page, or of a part, for the documentation.

        It does so only if FRONTLINE_IMAGES is set.
        """
        if not os.environ.get("FRONTLINE_IMAGES"):
            return
        self.page.mouse.move(0, 0)
        path = _IMAGES / f"{name}.png"
        if part is None:
            self.page.screenshot(path=path, full_page=True)
        else:
            part.screenshot(path=path)

    def close(self) -> None:
        """End the visit; fail if there was something to complain of."""
        self._context.close()
        assert self.complaints == []
        assert self.elsewhere == []


@contextmanager
def visiting(browser: Browser, site: str, **options: Any) -> Iterator[Visit]:
    """Visit a site; ``options`` are Playwright's of a browser context."""
    visit = Visit(browser.new_context(**options), site)
    try:
        yield visit
    except BaseException:
        # What the page complained of is often the reason.
        print("the page said:", *visit.complaints, sep="\n  ")
        raise
    visit.close()


def run(page: Page, tier: str) -> None:
    """Run the playground at a tier, to the end of the answer."""
    page.get_by_label(tier, exact=True).check()
    page.get_by_role("button", name="Run").click()
    done(page)


def done(page: Page) -> None:
    """Wait until the playground has its whole answer."""
    expect(page.get_by_role("status")).to_have_text("Done.", timeout=SLOWEST * 60_000)


def tab(page: Page) -> str:
    """Press Tab; return what has the focus then: its name, id or text.

    "unseen: " stands before it if nothing shows that it has the focus.
    """
    page.keyboard.press("Tab")
    focused: str = page.evaluate(
        """() => {
          const one = document.activeElement;
          if (one === document.body) return "nothing";  // after the last
          // The parts of a field for dates have rings of their own.
          const shown = one.type === "date" || [one, one.nextElementSibling].filter(Boolean)
            .some((part) => getComputedStyle(part).outlineStyle !== "none");
          const name = one.name || one.id || one.ariaLabel || one.innerText.trim();
          return (shown ? "" : "unseen: ") + name;
        }"""
    )
    return focused


def tab_to(page: Page, target: Locator) -> None:
    """Press Tab until an element has the focus; all on the way must be seen to have it."""
    reached: list[str] = []
    while not target.evaluate("(one) => one === document.activeElement"):
        reached.append(tab(page))
        assert len(reached) < 100 and "unseen" not in reached[-1], reached
