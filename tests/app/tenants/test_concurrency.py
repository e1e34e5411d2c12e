from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.ingress import FlightBounds
from app.tenants.concurrency import Holder, InFlight, OverBound

pytestmark = pytest.mark.unit

TENANT_OF = {"a1": "a", "a2": "a", "b1": "b"}
events = st.lists(
    st.tuples(st.just("enter"), st.sampled_from(sorted(TENANT_OF)))
    | st.tuples(st.sampled_from(["leave", "fail"]), st.integers(0, 20)),
    max_size=60,
)


@given(events, st.integers(1, 6), st.integers(1, 9), st.integers(1, 4))
def test_never_more_than_the_part_whatever_comes_and_goes(events, key, tenant, ingresses):
    book, bounds, flying = InFlight(), FlightBounds(key, tenant), []
    parts = {Holder.KEY: max(1, key // ingresses), Holder.TENANT: max(1, tenant // ingresses)}
    for what, which in events:
        if what == "enter":
            own = sum(name == which for name, _ in flying)
            all_keys = sum(TENANT_OF[name] == TENANT_OF[which] for name, _ in flying)
            try:
                flight = book.enter(which, TENANT_OF[which], bounds, ingresses)
            except OverBound as over:
                found = own if over.holder is Holder.KEY else all_keys
                assert found == over.part == parts[over.holder], "refused only at the bound"
            else:
                assert own < parts[Holder.KEY] and all_keys < parts[Holder.TENANT]
                flying.append((which, flight))
        elif flying:
            _, flight = flying.pop(which % len(flying))
            with pytest.raises(ValueError) if what == "fail" else ExitStack(), flight:
                if what == "fail":
                    raise ValueError
        for name, whose in TENANT_OF.items():
            assert book.of(Holder.KEY, name) == sum(key_id == name for key_id, _ in flying)
            of_tenant = sum(TENANT_OF[key_id] == whose for key_id, _ in flying)
            assert book.of(Holder.TENANT, whose) == of_tenant
    for _, flight in flying:
        with flight:
            pass
    assert len(book) == 0, "nobody is remembered who has none"


def test_a_flight_that_is_left_twice_counts_once():
    book = InFlight()
    flight = book.enter("a1", "a", FlightBounds(5, 5), 1)
    with book.enter("a1", "a", FlightBounds(5, 5), 1):
        for _ in range(2):
            with flight:
                pass
        assert book.of(Holder.KEY, "a1") == 1
