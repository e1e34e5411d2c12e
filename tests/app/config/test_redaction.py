import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.redaction import REDACTED, is_secret, redact, redact_words

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "api_key",
        "--api-key",
        "AWS_SECRET_ACCESS_KEY",
        "password",
        "apikey",
        "OTEL_EXPORTER_OTLP_HEADERS",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    ],
)
def test_names_of_secrets(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "max_tokens",
        "tokenizer",
        "--tokenizer-mode",
        "tokens_per_second",
        "auth",
        "keys_file",
        "stream_headers_after_s",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
    ],
)
def test_names_of_what_is_no_secret(name):
    assert not is_secret(name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("abc {[", max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.sampled_from(["token", "engine_key", "PASSWORD"]))
def test_a_secret_is_hidden_however_deep_it_stands(value, name):
    secret = "s3cr3t-value"
    for nested in ({name: secret}, {"a": [{name: secret}]}, {"a": json.dumps({name: secret})}):
        assert secret not in json.dumps(redact({"x": value, "y": nested}))


@given(JSON)
def test_what_is_no_secret_stays(value):
    assert redact(value) == value


def test_a_urls_password_is_hidden():
    shown = redact({"ledger": "postgresql://frontline:pa:ss@db:5432/frontline"})
    assert shown == {"ledger": f"postgresql://frontline:{REDACTED}@db:5432/frontline"}


def test_a_command_line_is_shown_without_its_secrets():
    words = ["python", "-m", "server", "--hf-token", "a", "b", "--api-key=c", "--port", "1"]
    shown = ["python", "-m", "server", "--hf-token", REDACTED, REDACTED, f"--api-key={REDACTED}"]
    assert redact_words(words) == [*shown, "--port", "1"]
