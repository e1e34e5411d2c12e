import io
import re
import wave

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.errors import InvalidRequest
from app.protocol.form import (
    LONGEST_HEAD,
    LONGEST_TEXT,
    MOST_PARTS,
    File,
    boundary_of,
    read_form,
    write_form,
)
from app.protocol.json_body.scan import run
from app.protocol.recording import engine_form, estimate_recording

pytestmark = pytest.mark.unit

TYPE = b"multipart/form-data; boundary=x"
names = st.text("abcdefgh_", min_size=1, max_size=9).filter(lambda name: name != "file")
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
# With what a parser could stumble over.
files = st.lists(
    st.sampled_from([b"\r\n", b"--", b"x", b"--x", b"\r\n-", b"\r\n--x", b"\0"])
    | st.binary(max_size=20),
    min_size=1,
).map(b"".join)  # fmt: skip


def encoded(data, file, **more):
    """A form as httpx writes it, as the SDK does."""
    request = httpx.Request(
        "POST", "http://x", data=data, files={"file": ("a.wav", file, "audio/wav")}, **more
    )
    return request.headers["content-type"].encode(), request.read()


def as_file(content):
    return File((content,), "a.wav", "audio/wav")


def read(content_type, body):
    return run(read_form(content_type, body, "file"))


@given(
    st.dictionaries(names, st.lists(texts, min_size=1, max_size=3), max_size=20),
    files.filter(bool),
)
def test_what_a_client_writes_is_read(data, file):
    form = read(*encoded(data, file))
    assert b"".join(form.file.pieces) == file
    assert form.texts == {name: tuple(values) for name, values in data.items()}
    assert (form.file.name, form.file.media_type) == ("a.wav", "audio/wav")


@given(st.dictionaries(names, texts, max_size=60), files.filter(bool))
def test_what_is_written_for_an_engine_is_read(data, file):
    form = read(*encoded(data, file))
    written = write_form(form, data.items(), "file", b"0123456789abcdef" * 2)
    body = b"".join(written)
    assert len(body) == len(written)
    assert read(written.content_type, body) == form


@given(st.integers(0, 600_000))
def test_a_file_is_found_wherever_it_ends(size):
    _, body = encoded({"model": "m"}, b"\r\n-" * (size // 3 + 1))
    content_type, body = encoded({"model": "m"}, b"\r\n-" * (size // 3 + 1))
    assert len(read(content_type, memoryview(body)).file) == 3 * (size // 3 + 1)


@given(st.binary(max_size=300), st.integers(0, 300), st.integers(0, 300))
def test_any_other_body_is_refused_or_read_without_a_crash(noise, start, length):
    content_type, body = encoded({"model": "m"}, b"abc")
    for damaged in (noise, body[:start] + noise + body[start + length :]):
        try:
            form = read(content_type, damaged)
        except InvalidRequest as error:
            assert error.status == 400
        else:
            assert len(form.file)


def part(name, value=b"v", head=b"", file=False):
    file_name = b'; filename="a"' if file else b""
    start = b'--x\r\nContent-Disposition: form-data; name="%b"%b\r\n' % (name, file_name)
    return start + head + b"\r\n" + value + b"\r\n"


FILE = part(b"file", file=True)


def refused(*parts, end=b"--x--"):
    with pytest.raises(InvalidRequest) as found:
        read(TYPE, b"".join((*parts, end)))
    return found.value


def test_bounds_and_strange_parts():
    assert read(TYPE, b"preamble\r\n" + FILE + b"--x--\r\nepilogue")
    assert refused(part(b"a", b"v" * (LONGEST_TEXT + 1)), FILE).param == "a"
    assert refused(part(b"a", b"\xff"), FILE).param == "a"
    assert "parts" in refused(*[part(b"a")] * MOST_PARTS, FILE).message
    assert read(TYPE, b"".join([*[part(b"a")] * (MOST_PARTS - 1), FILE, b"--x--"]))
    assert "head" in refused(part(b"a", head=b"x: %b\r\n" % (b"y" * LONGEST_HEAD)), FILE).message
    assert refused(FILE, FILE).param == "file"
    assert refused(part(b"other", file=True), FILE).param == "other"
    assert refused(part(b"file")).param == "file"
    assert refused(part(b"file", b"", file=True)).param == "file"
    assert "name" in refused(part(b"a b"), FILE).message
    assert (
        "Transfer"
        in refused(part(b"a", head=b"Content-Transfer-Encoding: base64\r\n"), FILE).message
    )
    assert "Unexpected end" in refused(FILE, end=b"").message
    with pytest.raises(InvalidRequest, match="boundary"):
        run(read_form(b"multipart/form-data", FILE, "file"))


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        (b"multipart/form-data; boundary=a-b", "a-b"),
        (b'Multipart/Form-Data;charset=utf-8; Boundary="a b:c"', "a b:c"),
        (b"multipart/form-data", ""),
        (b'multipart/form-data; boundary="a\rb"', ""),
        (b"multipart/form-data; boundary=" + b"a" * 71, ""),
        (b"multipart/mixed; boundary=a", None),
        (b"application/json", None),
    ],
)
def test_boundaries(content_type, boundary):
    assert boundary_of(content_type) == boundary


def wav(seconds, rate=16_000, channels=1):
    held = io.BytesIO()
    with wave.open(held, "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(bytes(round(seconds * rate) * 2 * channels))
    return held.getvalue()


@given(
    st.integers(1, 400), st.sampled_from([8000, 16_000, 44_100, 48_000]), st.sampled_from([1, 2])
)  # fmt: skip
def test_the_length_of_a_wav_file_is_exact_in_begun_seconds(tenths, rate, channels):
    seconds, estimate = estimate_recording(as_file(wav(tenths / 10, rate, channels)))
    assert seconds == -(-tenths // 10)
    assert estimate.prompt == 25 * seconds and estimate.sequences == -(-seconds // 30)


@pytest.mark.parametrize("told", [0, 0xFFFFFFFF])
def test_a_wav_file_that_does_not_know_its_length_is_read_to_its_end(told):
    whole = wav(9.5)
    file = whole[:40] + told.to_bytes(4, "little") + whole[44:]
    assert estimate_recording(as_file(file))[0] == 10


@given(st.binary(min_size=1, max_size=200), st.integers(0, 60))
def test_any_file_has_a_length_that_is_bounded_and_not_zero(noise, at):
    whole = wav(1)
    for file in (noise, whole[:at] + noise + whole[at + len(noise) :]):
        seconds, _ = estimate_recording(as_file(file))
        assert 1 <= seconds <= 1 + len(file) // 4000


def test_a_boundary_is_never_the_same():
    form = read(*encoded({}, b"abc"))
    written = [engine_form(form, "m", frozenset(), {"response_format": "json"}) for _ in range(9)]
    assert len({one.content_type for one in written}) == 9
    assert all(re.search(rb"=frontline-[0-9a-f]{32}$", one.content_type) for one in written)
