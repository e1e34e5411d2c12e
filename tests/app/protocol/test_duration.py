import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.protocol.duration import (
    LONGEST_S,
    LONGEST_TEXT,
    SHORTEST_S,
    parse_duration,
    parse_duration_text,
)

pytestmark = pytest.mark.unit

PARSERS = [parse_duration, parse_duration_text]
short = st.integers(0, 23) | st.none()


@pytest.mark.parametrize("parse", PARSERS)
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30), ("1m30s", 90), ("500ms", 0.5), ("1.5s", 1.5), ("2h", 7200), ("24h", 86400),
        ("1h1ms", 3600.001), ("00h-00m-30s", 30), ("01h-02m-03s", 3723), ("0h-90m-0s", 5400),
    ],
)  # fmt: skip
def test_texts(parse, text, seconds):
    assert parse(text) == pytest.approx(seconds)


@pytest.mark.parametrize("value", [
    "", " ", "30", "s", "-1s", "+1s", "1 s", "30S", "1s1s", "1s1m", "1e3s", ".5s", "1.s", "0s",
    "0h-0m-0s", "30s-00m-00h", "00h-00m", "00h-00m-30s ", "25h", "24h1ms", "inf", "nan", "\u0663s",
    "default", "priority", "1s\n", "0" * LONGEST_TEXT + "1s",
    0, 0.0, -1, LONGEST_S + 1, 10**400, math.inf, math.nan, True, False, None, [], [30], {}, b"30s",
])  # fmt: skip
def test_anything_else_is_refused(value):
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(value)


@pytest.mark.parametrize(("text", "seconds"), [("30", 30), (" 2.5 ", 2.5), ("86400", 86400)])
def test_a_header_may_be_a_number(text, seconds):
    assert parse_duration_text(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "0", "1e3", "inf", "nan", "1_0", "86401", "9" * 400])
def test_a_header_that_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration_text(text)


@given(short, short, short, short)
def test_units_add_up_and_may_each_be_left_out(hours, minutes, seconds, milliseconds):
    parts = [(hours, "h", 3600), (minutes, "m", 60), (seconds, "s", 1), (milliseconds, "ms", 0.001)]
    text = "".join(f"{n}{unit}" for n, unit, _ in parts if n is not None)
    total = math.fsum(n * size for n, _, size in parts if n is not None)
    if total:
        assert parse_duration(text) == parse_duration_text(text) == pytest.approx(total)
    else:
        with pytest.raises(ValueError, match="not a duration"):
            parse_duration(text)


@given(st.integers(0, 23), st.integers(0, 59), st.integers(1, 59))
def test_both_forms_mean_the_same(hours, minutes, seconds):
    clock = f"{hours:02}h-{minutes:02}m-{seconds:02}s"
    assert parse_duration(clock) == parse_duration(f"{hours}h{minutes}m{seconds}s")


@given(st.integers(1, int(LONGEST_S)) | st.floats(0, LONGEST_S, exclude_min=True))
def test_a_number_is_seconds(number):
    assert parse_duration(number) == max(number, SHORTEST_S)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=3,
)


@given(json_values | st.from_regex(r"\A[0-9.hms-]{1,12}\Z"))
def test_whatever_comes_is_in_bounds_or_refused(value):
    for parse in PARSERS if isinstance(value, str) else PARSERS[:1]:
        try:
            seconds = parse(value)
        except ValueError:
            continue
        assert isinstance(seconds, float) and SHORTEST_S <= seconds <= LONGEST_S
