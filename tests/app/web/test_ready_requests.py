import json
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.web.ready_requests import ready_requests

pytestmark = pytest.mark.unit

ORIGIN = "http://127.0.0.1:8000"
MODELS = st.just("a/b-c") | st.text(st.characters(codec="utf-8", exclude_characters="\0"))


def texts(model, *, chats=True, tier="priority"):
    return {
        one.key: "".join(piece.text for piece in one.pieces(ORIGIN, tier))
        for one in ready_requests(model, chats=chats)
    }


@given(MODELS, st.booleans())
def test_curl_sends_the_model_whatever_it_is_called(model, chats):
    words = shlex.split(texts(model, chats=chats)["curl"])
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == model and body["service_tier"] == "priority"
    assert words[1] == f"{ORIGIN}/v1/{'chat/completions' if chats else 'embeddings'}"


@given(MODELS, st.booleans())
def test_python_sends_the_model_whatever_it_is_called(model, chats):
    text = texts(model, chats=chats)["python"]
    compile(text, "request", "exec")
    assert f"model={json.dumps(model)}," in text


def test_what_is_filled_in_is_marked():
    for one in ready_requests("m", chats=True):
        fills = [piece.fill for piece in one.pieces(ORIGIN, "flex") if piece.fill]
        assert fills == ["origin", "tier"]
