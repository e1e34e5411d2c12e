from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.ledger.time_buckets import LATEST, Width, border_of, cursor_of, page_of, start_of

pytestmark = pytest.mark.unit

TIMES = st.integers(0, LATEST)
WIDTHS = st.sampled_from(Width)


@given(TIMES, st.integers(0, 10**7), WIDTHS, st.integers(1, 50))
def test_buckets_follow_each_other_and_have_their_borders_in_utc(start, length, width, most):
    end = start + length
    page = page_of(start, end, width, most)
    buckets = list(page.buckets())
    borders = [start, *(end for _, end in buckets)]
    assert [begin for begin, _ in buckets] == borders[:-1]
    assert (page.start, page.end) == (start, borders[-1])
    assert len(buckets) <= most and all(begin < end for begin, end in buckets)
    assert all(border % width.seconds == 0 for border in borders[1:-1])
    assert (page.next is None) == (page.end == end)
    if page.next is not None:
        assert len(buckets) == most and page.next == page.end and page.end % width.seconds == 0


@given(TIMES, st.integers(1, 10**6), WIDTHS, st.integers(1, 50))
def test_pages_together_are_the_whole_period(start, length, width, most):
    end, at, pages = start + length, start, []
    while at is not None and len(pages) < 100:
        pages.append(page_of(at, end, width, most))
        at = pages[-1].next
    buckets = [bucket for page in pages for bucket in page.buckets()]
    enough = 100 * most
    assert buckets == list(page_of(start, end, width, enough).buckets())


@given(TIMES, WIDTHS)
def test_a_group_is_the_bucket_that_begins_there(at, width):
    lengths = {Width.DAY: 10, Width.HOUR: 13, Width.MINUTE: 16}
    group = datetime.fromtimestamp(at, UTC).isoformat()[: lengths[width]]
    assert border_of(group) == at - at % width.seconds


@given(TIMES)
def test_a_cursor_leads_back(at):
    assert start_of(cursor_of(at)) == at


@given(st.text() | st.binary().map(lambda raw: f"page_{raw.hex()}"))
def test_what_is_no_cursor_is_known_as_such(text):
    at = start_of(text)
    assert at is None or cursor_of(at) == text
