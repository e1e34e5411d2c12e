import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.core.dialect import Route
from app.protocol.images import with_images
from app.protocol.json_body.raw import RawJson
from app.protocol.json_body.scan import run
from app.protocol.requests import parse_request, read_request

pytestmark = pytest.mark.unit

CHUNK = 256 * 1024


def counted(route, fields, *, scanned=False):
    body = orjson.dumps({"model": "m", **fields})
    inbound = run(read_request(route, memoryview(body))) if scanned else parse_request(route, body)
    return run(with_images(inbound)).images


def url(size=4):
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{'A' * size}"}}


def source(size=4):
    return {"type": "image", "source": {"type": "base64", "data": "A" * size}}


TEXT = {"type": "text", "text": 'say "image_url": {} and \\"type\\": \\"image\\"'}
CALL = {"type": "tool_use", "id": "t", "name": "draw", "input": {"type": "image", "image_url": "x"}}


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("size", [4, 3 * CHUNK])
@pytest.mark.parametrize(
    ("route", "part", "field"),
    [
        (Route.CHAT, url, "messages"),
        (Route.CHAT, lambda _: {"image_url": "https://e.com/a.png"}, "messages"),
        (Route.CHAT, lambda size: {"type": "image_embeds", "image_embeds": "A" * size}, "messages"),
        (Route.RESPONSES, lambda size: {"type": "input_image", "image_url": "A" * size}, "input"),
        (Route.RESPONSES, lambda _: {"type": "input_image", "file_id": "f"}, "input"),
        (Route.MESSAGES, source, "messages"),
        (Route.EMBEDDINGS, url, "messages"),
        (Route.SCORE, url, "data_1"),
    ],
)
def test_each_part_that_is_an_image_counts_once(route, part, field, size, scanned):
    content = [TEXT, part(size), part(size), {"type": "input_audio"}]
    asked = [{"role": "user", "content": "image_url"}, {"role": "user", "content": content}]
    assert counted(route, {field: asked, "tools": [url()]}, scanned=scanned) == 2


def test_images_in_results_of_tools_count_and_what_tools_are_called_with_does_not():
    result = {"type": "tool_result", "tool_use_id": "t", "content": [source(), TEXT]}
    asked = [{"role": "assistant", "content": [CALL]}, {"role": "user", "content": [result]}]
    assert counted(Route.MESSAGES, {"messages": asked}) == 1
    output = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image"}]}
    assert counted(Route.RESPONSES, {"input": [output]}) == 1


@pytest.mark.parametrize("route", [Route.COMPLETIONS, Route.COUNT_TOKENS, Route.TOKENIZE])
def test_routes_without_billed_images_have_none(route):
    assert counted(route, {"prompt": [url()], "messages": [{"content": [source()]}]}) == 0


anything = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.sampled_from(["content", "type", "output", "image_url", "x"]), inner)
    ),
)


@given(anything)
def test_any_value_has_a_count(value):
    assert counted(Route.CHAT, {"messages": value}) >= 0


payloads = st.integers(0, 5000) | st.integers(CHUNK - 2000, CHUNK + 2000)


@given(
    st.lists(st.tuples(payloads, st.sampled_from(["A", "é", '"', "\\", ",", " "]), st.booleans()))
)
@example([(CHUNK - 200 + shift, '"', True) for shift in range(60)])
def test_wherever_the_bytes_are_cut_a_long_body_has_the_count_of_a_short_one(parts):
    long = [url(size) if image else {"type": "text", "text": end + "A" * size + end}
            for size, end, image in parts]  # fmt: skip
    raw = RawJson(orjson.dumps([{"role": "user", "content": long}]))
    inbound = parse_request(Route.CHAT, orjson.dumps({"model": "m", "messages": []}))
    inbound = type(inbound)(Route.CHAT, {"messages": raw}, "m", None, False, {})
    assert run(with_images(inbound)).images == sum(image for *_, image in parts)


@pytest.mark.parametrize("data", [b"[" + b"1," * CHUNK, b'[{"a":' + b"1" * 2000 + b"}]", b"[[[["])
def test_what_is_no_json_or_has_strange_numbers_has_none(data):
    inbound = parse_request(Route.CHAT, orjson.dumps({"model": "m", "messages": []}))
    inbound = type(inbound)(Route.CHAT, {"messages": RawJson(data)}, "m", None, False, {})
    assert run(with_images(inbound)).images == 0
