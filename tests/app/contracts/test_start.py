import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.contracts.start import REASONS, StartFailure, StartProblem, find_failure

pytestmark = pytest.mark.unit

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
failures = st.builds(
    StartFailure, texts, st.sampled_from(StartProblem), texts, texts, texts, texts,
    st.lists(texts, max_size=3).map(tuple),
)  # fmt: skip


@given(failures, texts, texts)
def test_a_failure_is_found_in_whatever_serve_writes_around_it(failure, before, after):
    assert find_failure(f"{before}\n{failure.to_text()}\n{after}") == failure


@given(failures, failures)
def test_of_several_failures_the_last_one_counts(first, last):
    assert find_failure(first.to_text() + "\n" + last.to_text()) == last


@pytest.mark.parametrize(
    "text", ["", "boom", "frontline-start-failure: {}", "frontline-start-failure: {cut",
             'frontline-start-failure: {"problem":"new one","lines":[]}'],
)  # fmt: skip
def test_other_texts_hold_none(text):
    assert find_failure(text) is None


@given(failures)
def test_the_reason_for_clients_holds_nothing_of_the_machine(failure):
    assert failure.reason in REASONS.values()
    assert "/" not in failure.reason


def test_every_problem_has_words():
    assert REASONS.keys() == set(StartProblem)
