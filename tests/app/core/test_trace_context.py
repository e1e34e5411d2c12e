import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app.core.trace_context import header_lines, parse_trace_context, traceparent

pytestmark = pytest.mark.unit

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE}-{SPAN}-01"

hexes = st.text("0123456789abcdefA", min_size=1, max_size=33)
built = st.builds(
    "{}-{}-{}-{}{}".format,
    st.sampled_from(["00", "01", "ff", "0"]) | hexes,
    st.sampled_from([TRACE, "0" * 32, TRACE.upper(), TRACE[:-1]]) | hexes,
    st.sampled_from([SPAN, "0" * 16, SPAN + "0"]) | hexes,
    st.sampled_from(["00", "01", "03", "ff", "1"]),
    st.sampled_from(["", "-", "-more", " ", "\r\nx: y", "\n"]),
)


@given(built | st.text(max_size=80))
@example(GOOD)
def test_a_parent_is_taken_if_opentelemetry_takes_it_and_it_is_no_danger_in_a_head(text):
    parsed = parse_trace_context({b"traceparent": text.encode("utf-8", "surrogatepass")})
    context = TraceContextTextMapPropagator().extract({"traceparent": text})
    expected = trace.get_current_span(context).get_span_context()
    if parsed is None:
        # OpenTelemetry also takes blanks around it.
        assert not expected.is_valid or text != text.strip()
        return
    assert expected.is_valid
    assert int(parsed.trace_id, 16) == expected.trace_id
    assert int(parsed.span_id, 16) == expected.span_id
    assert parsed.flags == expected.trace_flags
    assert header_lines(parsed.parent, b"").count(b"\n") == 1


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        (b"congo=t61rcWkgMzE", True),
        (b"rojo=00f067aa0ba902b7,congo=t61rcWkgMzE", True),
        (b"tenant@vendor=1, b=2", True),
        (b"a=1,a=2", False),
        (b"A=1", False),
        (b"a=1\r\nx: y", False),
        (b"a", False),
        (b"a=\xff", False),
        (b"a=" + b"x" * 600, False),
        (b",".join(b"k%d=1" % n for n in range(33)), False),
        (b"", False),
    ],
)
def test_a_state_that_is_not_valid_is_dropped_and_its_parent_kept(state, kept):
    parsed = parse_trace_context({b"traceparent": GOOD.encode(), b"tracestate": state})
    assert parsed is not None
    assert parsed.state == (state if kept else b"")


@given(st.binary(max_size=60))
def test_no_state_breaks_a_head(state):
    parsed = parse_trace_context({b"traceparent": GOOD.encode(), b"tracestate": state})
    assert parsed is not None
    lines = header_lines(parsed.parent, parsed.state)
    assert lines.count(b"\n") == 1 + bool(parsed.state)


def test_a_state_without_a_parent_is_ignored():
    assert parse_trace_context({b"tracestate": b"a=1"}) is None
    assert traceparent(TRACE, SPAN, 1).decode() == GOOD
