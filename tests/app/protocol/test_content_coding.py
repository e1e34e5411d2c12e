import gzip
import zlib

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from app.protocol.content_coding import SLICE, Decoder, InvalidCoded, UnknownCoding, decoder_for

pytestmark = pytest.mark.unit


def raw_deflate(data):
    made = zlib.compressobj(wbits=-15)
    return made.compress(data) + made.flush()


ENCODERS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "deflate, raw": raw_deflate,
    "zstd": zstd.compress,
}
BOMBS = [b"\0" * 20_000_000, bytes(range(256)) * 40_000]


def coded(name, data):
    return ENCODERS[name](data), decoder_for(name.partition(",")[0].encode())


def pieces(data, size):
    return [data[at : at + size] for at in range(0, len(data), size)]


def decoded(decoder, parts):
    out = []
    for part in parts:
        for piece in decoder.slices(part):
            assert len(piece) <= SLICE
            out.append(piece)
    decoder.finish()
    return b"".join(out)


@given(st.sampled_from(list(ENCODERS)), st.binary(max_size=3000), st.integers(1, 100))
def test_it_is_the_same_in_any_pieces(name, data, size):
    sent, decoder = coded(name, data)
    assert decoded(decoder, pieces(sent, size)) == data


@pytest.mark.parametrize("name", list(ENCODERS))
@pytest.mark.parametrize("data", BOMBS, ids=["zeros", "counting"])
def test_a_step_never_returns_more_than_a_slice(name, data):
    sent, decoder = coded(name, data)
    assert len(sent) < len(data) / 100
    assert decoded(decoder, pieces(sent, 65536)) == data


@pytest.mark.parametrize("name", list(ENCODERS))
def test_bodies_about_as_long_as_slices(name):
    for length in (*range(SLICE - 3, SLICE + 300, 7), 2 * SLICE, 2 * SLICE + 1):
        for data in (b"a" * length, b"ab" * (length // 2)):
            sent, decoder = coded(name, data)
            assert decoded(decoder, [sent]) == data


@given(st.sampled_from(["gzip", "zstd"]), st.lists(st.binary(max_size=50), min_size=1, max_size=5))
def test_several_members_are_one_body(name, parts):
    sent = b"".join(ENCODERS[name](part) for part in parts)
    assert decoded(Decoder(name), pieces(sent, 7)) == b"".join(parts)


@given(st.sampled_from(list(ENCODERS)), st.binary(min_size=1, max_size=500), st.data())
def test_what_is_cut_off_is_invalid(name, data, draw):
    sent, decoder = coded(name, data)
    cut = draw.draw(st.integers(0, len(sent) - 1))
    with pytest.raises(InvalidCoded):
        decoded(decoder, [sent[:cut]])


@given(st.sampled_from(["gzip", "deflate", "zstd"]), st.binary(max_size=200), st.integers(1, 30))
def test_other_bytes_are_decoded_or_invalid(name, data, size):
    try:
        decoded(Decoder(name), pieces(data, size))
    except InvalidCoded:
        return
    assert data


def test_nothing_follows_deflate():
    with pytest.raises(InvalidCoded):
        decoded(Decoder("deflate"), [zlib.compress(b"{}") + b"more"])


def test_a_window_that_takes_much_memory_is_refused():
    streamed = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    with pytest.raises(InvalidCoded):
        decoded(Decoder("zstd"), [streamed.compress(b"x" * 100) + streamed.flush()])


@pytest.mark.parametrize("header", [None, b"", b"identity", b" IDENTITY "])
def test_no_coding(header):
    assert decoder_for(header) is None


@pytest.mark.parametrize("header", [b"br", b"gzip, gzip", b"compress", b"\xff", b"gzip;q=1"])
def test_other_codings(header):
    with pytest.raises(UnknownCoding):
        decoder_for(header)
