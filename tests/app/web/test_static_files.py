import re
from importlib.resources import files

import pytest

from app.web.static_files import FILES, VERSION, static_url

pytestmark = pytest.mark.unit


def test_every_file_of_the_folder_is_served():
    there = {one.name for one in files("app.web").joinpath("static").iterdir()}
    assert there == set(FILES)


@pytest.mark.parametrize("name", sorted(FILES))
async def test_a_file_is_kept_for_ever_under_its_url(browser, name):
    answer = await browser.get(static_url(name))
    assert answer.status_code == 200
    assert answer.content == FILES[name].body
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.headers["content-type"] == FILES[name].type
    assert "immutable" in answer.headers["cache-control"]


async def test_a_client_without_gzip_gets_it_plain(browser):
    answer = await browser.get(static_url("site.css"), headers={"accept-encoding": "identity"})
    assert "content-encoding" not in answer.headers
    assert answer.content == FILES["site.css"].body


async def test_a_client_that_has_it_gets_it_no_more(browser):
    tag = (await browser.get(static_url("site.css"))).headers["etag"]
    answer = await browser.get(static_url("site.css"), headers={"if-none-match": f"W/{tag}"})
    assert (answer.status_code, answer.content) == (304, b"")


async def test_an_ingress_of_another_version_answers_what_is_not_kept(browser):
    answer = await browser.get(static_url("site.css").replace(VERSION, "0" * 16))
    assert answer.content == FILES["site.css"].body
    assert answer.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("name", ["nothing.css", "..%2fpages.py", "..", "%2e%2e/pages.py", ""])
async def test_nothing_else_is_there(browser, name):
    answer = await browser.get(f"/static/{VERSION}/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_url"


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_loads_nothing_from_elsewhere(name):
    text = FILES[name].body.decode()
    addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", text)
    # The names of XML's vocabularies are never asked for; licences name their projects.
    allowed = ("http://www.w3.org/", "https://github.com/")
    assert [one for one in addresses if not one.startswith(allowed)] == []
