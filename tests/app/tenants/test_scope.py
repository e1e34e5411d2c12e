from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.dialect import Route
from app.tenants.scope import EVERYTHING, KeyScope

pytestmark = pytest.mark.unit

ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,30}", fullmatch=True)


@given(ids, ids)
def test_an_id_allows_itself_only(one, other):
    scope = KeyScope(models=frozenset({one}))
    assert scope.allows_model(one)
    assert scope.allows_model(other) is (one == other)


@given(ids, ids)
def test_a_star_stands_for_any_text(begin, end):
    scope = KeyScope(models=frozenset({f"{begin}*"}))
    assert scope.allows_model(begin) and scope.allows_model(begin + end)
    assert not scope.allows_model(f"x{begin}") or f"x{begin}".startswith(begin)
    assert KeyScope(models=frozenset({"*"})).allows_model(end)


@given(ids, st.sampled_from(Route))
def test_what_is_not_named_is_allowed(model, route):
    assert EVERYTHING.allows_model(model) and EVERYTHING.allows_route(route)
    assert KeyScope(models=frozenset({"m"})).allows_route(route)
    assert KeyScope(routes=frozenset({route})).allows_model(model)


@given(st.frozensets(st.sampled_from(Route), min_size=1))
def test_routes_are_allowed_by_name(routes):
    scope = KeyScope(routes=routes)
    assert {route for route in Route if scope.allows_route(route)} == routes


@given(st.ip_addresses())
def test_a_client_is_allowed_by_its_address(address):
    network = ip_network("10.0.0.0/8")
    scope = KeyScope(addresses=frozenset({network}))
    assert scope.allows_address(address) is (address in network)
    assert EVERYTHING.allows_address(address)
    assert EVERYTHING.allows_address(None) and not scope.allows_address(None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": frozenset()}, "models: from 1"),
        ({"models": frozenset(map(str, range(101)))}, "models: from 1"),
        ({"models": frozenset({""})}, "no id"),
        ({"models": frozenset({"[a-z]"})}, "no id"),
        ({"models": frozenset({"m" * 201})}, "no id"),
        ({"routes": frozenset()}, "routes: at least one"),
        ({"addresses": frozenset()}, "addresses: from 1"),
        ({"addresses": frozenset(ip_network(n) for n in range(101))}, "addresses: from 1"),
    ],
)
def test_what_allows_nothing_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        KeyScope(**values)
