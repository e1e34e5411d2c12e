import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.dialect import Route
from app.protocol.json_body.raw import RawJson
from app.protocol.prompt_prefix import prompt_prefix
from app.protocol.requests import parse_request

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


NAMES = st.one_of(st.none(), st.text(max_size=2000), st.integers(-9, 9), st.just({}))


@given(NAMES, NAMES, st.sampled_from(list(Route)), st.booleans())
def test_a_name_of_the_client_goes_before_the_prompts_beginning(key, user, route, long):
    prompt = "x" * (200_000 if long else 10)

    def read(text, **names):
        if route.is_anthropic and "user" in names:
            names["metadata"] = {"user_id": names.pop("user")}
        fields = {"model": "m", route.prompt_field: f"{text}{prompt}", **names}
        return parse_request(route, orjson.dumps(fields))

    one, another = read("a", prompt_cache_key=key, user=user), read("b", prompt_cache_key=key)
    named = isinstance(key, str) and key != ""
    assert (one.prefix == another.prefix) is named
    assert (one.user_prefix is not None) is (isinstance(user, str) and user != "" and not named)
    if isinstance(user, str) and user:
        assert one.user_prefix == read("b", prompt_cache_key=key, user=user).user_prefix
