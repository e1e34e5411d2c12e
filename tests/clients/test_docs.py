"""The examples of docs/clients.md work as they stand, but for the address and the model."""

import re
from pathlib import Path

import pytest

from tests.support.world import ALIAS

pytestmark = pytest.mark.unit

PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
ENVIRONMENTS = {
    "OpenAI in Python": "test",
    "OpenAI in JavaScript": "clients-node",
    "Anthropic in Python": "test",
    "Anthropic in JavaScript": "clients-node",
    "LangChain": "clients",
    "LlamaIndex": "clients-more",
    "Vercel AI SDK": "clients-node",
    "LiteLLM": "clients-more",
}
SECTIONS = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
EXAMPLES = [
    (heading, number, code)
    for heading, text in SECTIONS
    for number, code in enumerate(
        re.findall(r"^```(?:python|javascript)\n(.*?)^```$", text, re.M | re.S)
    )
]


def test_every_section_has_an_example():
    assert {heading for heading, _, _ in EXAMPLES} == ENVIRONMENTS.keys()


@pytest.fixture
def without_keys(site):
    """The site, which takes any key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site.world.services, "access", None)
        yield site


def adapted(site, text):
    text = text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", ALIAS)
    return text.replace("http://127.0.0.1:8000", site.url)


@pytest.mark.parametrize(
    ("heading", "code"),
    [pytest.param(heading, code, id=f"{heading}-{number}") for heading, number, code in EXAMPLES],
)
async def test_an_example(without_keys, heading, code):
    printed = await without_keys.run(ENVIRONMENTS[heading], adapted(without_keys, code))
    cost, tier = printed.split()
    assert await without_keys.billed() == [(tier, pytest.approx(float(cost)))]
    assert tier == "priority"


async def test_the_example_of_llm(without_keys):
    [text] = [text for heading, text in SECTIONS if heading == "The command llm"]
    [settings], [command] = (
        re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S) for language in ("yaml", "sh")
    )
    folder = without_keys.home / "llm"
    folder.mkdir()
    (folder / "extra-openai-models.yaml").write_text(adapted(without_keys, settings))
    await without_keys.run("clients", f"import subprocess\nsubprocess.run({command!r}, shell=True)")
    [(tier, _)] = await without_keys.billed()
    assert tier == "priority"
