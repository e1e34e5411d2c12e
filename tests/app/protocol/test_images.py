import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.dialect import Route
from app.protocol.images import with_images
from app.protocol.json_body.raw import RawJson
from app.protocol.json_body.scan import run
from app.protocol.requests import Inbound, parse_request, read_request

pytestmark = pytest.mark.unit

CHUNK = 64 * 1024


def counted(route, fields, *, scanned=False):
    body = orjson.dumps({"model": "m", **fields})
    inbound = run(read_request(route, memoryview(body))) if scanned else parse_request(route, body)
    return run(with_images(inbound)).images


def counted_raw(route, field, data):
    inbound = Inbound(route, {field: RawJson(data)}, "m", None, False, {})
    return run(with_images(inbound)).images


def url(size=4):
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{'A' * size}"}}


def source(size=4):
    return {"type": "image", "source": {"type": "base64", "data": "A" * size}}


TEXT = {"type": "text", "text": 'say "image_url": {} and \\"type\\": \\"image\\"'}
CALL = {"type": "tool_use", "id": "t", "name": "draw", "input": {"type": "image", "image_url": "x"}}
PARTS = [
    (Route.CHAT, url, "messages"),
    (Route.CHAT, lambda _: {"image_url": "https://e.com/a.png"}, "messages"),
    (Route.CHAT, lambda size: {"type": "image_embeds", "image_embeds": "A" * size}, "messages"),
    (Route.RESPONSES, lambda size: {"type": "input_image", "image_url": "A" * size}, "input"),
    (Route.RESPONSES, lambda _: {"type": "input_image", "file_id": "f"}, "input"),
    (Route.MESSAGES, source, "messages"),
    (Route.EMBEDDINGS, url, "messages"),
    (Route.SCORE, url, "data_1"),
]


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("size", [4, 3 * CHUNK])
@pytest.mark.parametrize(("route", "part", "field"), PARTS)
def test_each_part_that_is_an_image_counts_once(route, part, field, size, scanned):
    content = [TEXT, part(size), part(size), {"type": "input_audio"}]
    asked = [{"role": "user", "content": "image_url"}, {"role": "user", "content": content}]
    assert counted(route, {field: asked, "tools": [url()]}, scanned=scanned) == 2
    assert counted_raw(route, field, orjson.dumps(asked)) == 2
    assert counted_raw(route, field, json.dumps(asked, indent=3).encode()) == 2


def test_images_in_results_of_tools_count_and_what_tools_are_called_with_does_not():
    result = {"type": "tool_result", "tool_use_id": "t", "content": [source(), TEXT]}
    asked = [{"role": "assistant", "content": [CALL]}, {"role": "user", "content": [result]}]
    assert counted(Route.MESSAGES, {"messages": asked}) == 1
    output = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]}
    assert counted(Route.RESPONSES, {"input": [output]}) == 1


@pytest.mark.parametrize("route", [Route.COMPLETIONS, Route.COUNT_TOKENS, Route.TOKENIZE])
def test_routes_without_billed_images_have_none(route):
    assert counted(route, {"prompt": [url()], "messages": [{"content": [source()]}]}) == 0


def escaped(word):
    return "".join(f"\\u{ord(letter):04x}" for letter in word)


def test_another_spelling_in_a_long_body_is_no_way_to_have_images_for_nothing():
    for name in ("image_url", "image_embeds", "image_pil"):
        for spelling in (escaped(name), name[:3] + escaped(name[3:5]) + name[5:]):
            data = f'[{{"content": [{{"{spelling}" :\n "x"}}]}}]'
            assert counted_raw(Route.CHAT, "messages", data.encode()) == 1
    data = f'[{{"content": [{{"{escaped("type")}": "im\\u0061ge", "source": 1}}]}}]'
    assert counted_raw(Route.MESSAGES, "messages", data.encode()) == 1


anything = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["content", "type", "output", "image_url", "x"]), inner)
    ),
)


@given(anything, st.sampled_from([Route.CHAT, Route.RESPONSES, Route.MESSAGES]))
def test_any_value_has_a_count(value, route):
    assert counted(route, {"messages": value, "input": value}) >= 0
    assert counted_raw(route, "messages", orjson.dumps(value)) >= 0


@given(
    st.lists(st.tuples(st.integers(0, 900), st.sampled_from(['"', "\\", "é", " "]), st.booleans())),
    st.integers(CHUNK - 1500, CHUNK),
    st.sampled_from(PARTS),
)
def test_wherever_the_bytes_are_cut_a_long_body_has_the_count_of_a_short_one(parts, before, kind):
    route, part, field = kind
    content = [{"type": "text", "text": "A" * before}]
    for size, end, image in parts:
        text = {"type": "text", "text": end + "image_url" + "A" * size + end}
        content.append(part(size) if image else text)
    asked = [{"role": "user", "content": content}]
    expected = sum(image for *_, image in parts)
    assert counted_raw(route, field, orjson.dumps(asked)) == expected
    assert counted(route, {field: asked}, scanned=True) == expected


@pytest.mark.parametrize("data", [b"[" + b"1," * CHUNK, b"[[[[", b'"' * CHUNK, b'["image_url', b""])
def test_what_is_no_json_or_has_no_part_has_none(data):
    for route in (Route.CHAT, Route.MESSAGES):
        assert counted_raw(route, "messages", data) == 0
