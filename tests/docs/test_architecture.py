"""docs/architecture.md has each package once, and the documentation names only what exists."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROW = re.compile(r"^\| `((?:app|deployments)/[\w/]*)` \| [^|]+ \| ([^|]+) \|$", re.M)
FOLDERS = "app|configs|deployments|requirements|scripts|tests"
FILE = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
MODULE = re.compile(r"(?<![\w./-])(?:app|deployments|scripts|tests)(?:\.[a-z_]\w*)+")


def packages():
    return {
        f"{init.parent.relative_to(ROOT)}/"
        for top in ("app", "deployments")
        for init in (ROOT / top).rglob("__init__.py")
    }


def rows():
    return ROW.findall((ROOT / "docs" / "architecture.md").read_text())


def is_module(name):
    """Whether a dotted name leads to a module, perhaps to something in it."""
    path = ROOT
    for part in name.split("."):
        if (path / f"{part}.py").is_file():
            return True
        path /= part
        if not path.is_dir():
            return False
    return True


def test_every_package_has_one_row():
    assert sorted(package for package, _ in rows()) == sorted(packages())


def test_rows_name_modules_of_their_package():
    named = [f"{package}{name}" for package, cell in rows() for name in re.findall("`(.*?)`", cell)]
    assert len(named) >= len(packages())
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    assert [name for name in FILE.findall(text) if not (ROOT / name).exists()] == []
    assert [name for name in MODULE.findall(text) if not is_module(name)] == []


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_names_that_do_not_exist_are_found():
    text = "`app/gone.py`, `scripts/run --x`, `app.core.gone`, `app.core.tiers.Tier`"
    assert FILE.findall(text) == ["app/gone.py", "scripts/run"]
    assert [name for name in MODULE.findall(text) if not is_module(name)] == ["app.core.gone"]
