import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.dialect import Route
from app.protocol.json_body.raw import RawJson
from app.protocol.prompt_prefix import prompt_prefix

pytestmark = pytest.mark.unit

text = st.text(st.sampled_from('ab"\\ \n\tä語😀'), max_size=400)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": text}),
    max_size=6,
)


@given(st.one_of(text, messages.filter(lambda m: any(x["role"] == "user" for x in m))))
def test_a_raw_prompt_has_the_prefix_of_a_parsed_one(prompt):
    field = Route.CHAT.prompt_field
    parsed = prompt_prefix(Route.CHAT, {field: prompt, "instructions": "x"})
    for written in (orjson.dumps(prompt), json.dumps(prompt, indent=1).encode()):
        assert prompt_prefix(Route.CHAT, {field: RawJson(written), "instructions": "x"}) == parsed


def test_it_stays_as_a_conversation_grows():
    first = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    longer = [*first, {"role": "assistant", "content": "a" * 100_000}]
    begun = prompt_prefix(Route.CHAT, {"messages": first})
    assert prompt_prefix(Route.CHAT, {"messages": longer}) == begun
    assert prompt_prefix(Route.CHAT, {"messages": RawJson(orjson.dumps(longer))}) == begun


@pytest.mark.parametrize("raw", [b"[1,", b"[x", b'"\\q', b"[" * 500, b"3", b"{}"])
def test_what_is_no_prompt_has_none(raw):
    assert prompt_prefix(Route.EMBEDDINGS, {"input": RawJson(raw)}) is None or raw[:1] == b'"'
    prompt_prefix(Route.CHAT, {"messages": RawJson(raw)})
