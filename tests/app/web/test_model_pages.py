import pytest

from app.contracts.status import Sleep
from app.core.tiers import Tier
from app.web.model_view import ModelView
from tests.app.web.snapshots import replica, snapshot

pytestmark = pytest.mark.unit

CHAT = "HuggingFaceTB/SmolLM2-135M-Instruct"
EVIL = "<script>alert(1)</script>/\"><img src=x onerror=alert(1)>'"


@pytest.fixture
def models(services):
    services.registry.snapshots = [
        snapshot(CHAT, replica(), replica(2, "sglang"), aliases=("smollm2",), adapters=("tuned",)),
        snapshot("org/embeds", replica(generates=False)),
        snapshot("org/plain", replica(native=False)),
        snapshot("org/sleeps", sleep=Sleep(tuple(Tier))),
    ]
    return services.registry.snapshots


async def test_all_models_are_cards(browser, models):
    page = await browser.get("/")
    assert page.status_code == 200
    assert page.text.count('class="card model-card"') == len(models)
    assert f'href="/models/{CHAT}"' in page.text
    assert "SGLang, vLLM" in page.text and "4,096 tokens" in page.text
    assert "$0.03" in page.text and "$0.016" in page.text
    assert "No running engine has native priority in force." in page.text


async def test_priority_is_tagged_only_where_it_holds_now(browser, models):
    page = (await browser.get("/")).text
    assert page.count("</svg>Priority") == 2
    assert page.count("No Priority now.") == 2


async def test_a_card_is_made_anew_only_when_its_model_has_changed(browser, models, monkeypatch):
    made = []
    of = ModelView.of
    monkeypatch.setattr(ModelView, "of", lambda snapshot: made.append(snapshot.id) or of(snapshot))
    before = (await browser.get("/live/models")).text
    assert (await browser.get("/live/models")).text == before
    assert sorted(made) == sorted(one.id for one in models)
    models[1] = snapshot("org/embeds", sleep=Sleep(tuple(Tier)))
    del models[0]
    after = (await browser.get("/live/models")).text
    assert made[4:] == ["org/embeds"]
    assert after.count("Asleep") == 2 and CHAT not in after


async def test_without_models_it_says_so(browser, services):
    assert "No model is served here yet." in (await browser.get("/")).text


@pytest.mark.parametrize("name", [CHAT, "smollm2", CHAT.replace("/", "%2F")])
async def test_a_model_has_a_page_under_each_of_its_names(browser, models, name):
    page = await browser.get(f"/models/{name}")
    assert page.status_code == 200
    assert f'data-model="{CHAT}"' in page.text
    assert "http://127.0.0.1/v1" in page.text.replace("</span>", "")
    assert 'value="priority" checked' in page.text


async def test_a_model_without_priority_has_default_chosen(browser, models):
    assert 'value="default" checked' in (await browser.get("/models/org/plain")).text


async def test_a_model_that_embeds_has_no_playground(browser, models):
    page = (await browser.get("/models/org/embeds")).text
    assert "playground.js" not in page and "embeddings, not with text" in page
    assert "/v1</span>/embeddings" in page.replace("</span>/v1", "/v1</span>")


async def test_a_model_that_is_not_there_has_a_page_that_says_so(browser, models):
    page = await browser.get("/models/nothing")
    assert page.status_code == 404
    assert "does not exist" in page.text and "<!doctype html>" in page.text


@pytest.mark.parametrize("page", ["/", f"/models/{CHAT}"])
async def test_what_changes_is_loaded_by_itself(browser, models, page):
    whole = (await browser.get(page)).text
    path = whole.partition('data-live="')[2].partition('"')[0]
    part = (await browser.get(path, headers={"accept": "*/*"})).text
    names = {text.partition('"')[0] for text in part.split('data-part="')[1:]}
    assert names and all(f'data-part="{name}"' in whole for name in names)
    assert "<html" not in part


@pytest.mark.parametrize("path", ["/", "/models/x/y", "/live/models", "/live/models/x/y"])
async def test_pages_are_as_public_as_the_models_list(browser, services, keys_required, path):
    refused = await browser.get(path)
    assert refused.status_code == 401 == (await browser.get("/v1/models")).status_code
    services.registry.snapshots = [snapshot("x/y", replica())]
    with_key = {"authorization": "Bearer good"}
    assert (await browser.get(path, headers=with_key)).status_code == 200


async def test_a_key_sees_the_pages_of_the_models_in_its_scope(browser, models, keys_required):
    with_key = {"authorization": "Bearer scoped"}
    pages = {
        path: await browser.get(path, headers=with_key)
        for path in ("/", "/live/models", "/models/org/plain", f"/models/{CHAT}", "/models/smollm2",
                     "/models/tuned", f"/live/models/{CHAT}")
    }  # fmt: skip
    assert [one.status_code for one in pages.values()] == [200, 200, 200, 404, 404, 404, 404]
    assert all("org/plain" in pages[path].text for path in ("/", "/live/models"))
    assert not any(CHAT in pages[path].text for path in ("/", "/live/models", "/models/tuned"))
    # What one visitor sees is not what the next one does.
    everything = (await browser.get("/", headers={"authorization": "Bearer good"})).text
    assert all(model.id in everything for model in models)


async def test_the_key_is_asked_for_only_where_one_is_required(browser, services, models):
    assert 'id="key"' not in (await browser.get(f"/models/{CHAT}")).text


async def test_with_keys_the_playground_asks_for_one(browser, models, keys_required):
    page = await browser.get(f"/models/{CHAT}", headers={"authorization": "Bearer good"})
    assert 'id="key" type="password" autocomplete="off"' in page.text
    assert "good" not in page.text.replace('class="tag good"', "")


async def test_other_names_of_this_machine_get_no_page(browser, models):
    answer = await browser.get("/", headers={"host": "evil.example"})
    assert answer.status_code == 403 and "SmolLM2" not in answer.text


async def test_a_name_is_text_wherever_it_is_shown(browser, services):
    services.registry.snapshots = [snapshot(EVIL, replica(engine=EVIL), aliases=(EVIL,))]
    for path in ("/", "/live/models", f"/models/{EVIL.replace('%', '%25')}"):
        page = (await browser.get(path)).text
        assert "<script>alert" not in page and "<img" not in page, path
    missing = await browser.get("/models/<script>alert(1)</script>x")
    assert "<script>alert" not in missing.text


async def test_head_is_answered_too(browser, models):
    answer = await browser.head("/")
    assert (answer.status_code, answer.content) == (200, b"")
