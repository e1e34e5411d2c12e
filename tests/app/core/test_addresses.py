from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from app.core.addresses import is_within, origin_of, parse_address, parse_network

pytestmark = pytest.mark.unit

TRUSTED = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
addresses = st.ip_addresses()
proxies = st.one_of(st.ip_addresses(network="10.0.0.0/8"), st.ip_addresses(network="fd00::/8"))
strangers = addresses.map(lambda one: parse_address(str(one))).filter(
    lambda one: not is_within(one, TRUSTED)
)
junk = st.one_of(st.text(max_size=20), addresses.map(str), st.sampled_from(["", "unknown", "_x"]))


@st.composite
def written(draw, address):
    """An address as a proxy may write it."""
    forms = [str(address), f" {address}\t"]
    if address.version == 4:
        forms += [f"{address}:8080", f"::ffff:{address}", f"[::ffff:{address}]:1"]
    else:
        forms += [f"[{address}]", f"[{address}]:443", address.exploded]
    return draw(st.sampled_from(forms))


@given(st.data(), strangers, st.lists(proxies, max_size=4), st.lists(junk, max_size=4))
def test_the_client_is_the_last_address_that_is_no_trusted_proxys(data, client, hops, forged):
    """Whatever a client has written before it, over however many lines."""
    entries = forged + [data.draw(written(one)) for one in (client, *hops)]
    last = entries.pop()
    cut = data.draw(st.integers(0, len(entries)))
    lines = [",".join(part) for part in (entries[:cut], entries[cut:]) if part]
    assert origin_of(parse_address(last), lines, TRUSTED) == client


@given(strangers, st.lists(junk, max_size=5))
def test_nothing_is_believed_of_who_is_not_trusted(client, lines):
    assert origin_of(client, lines, TRUSTED) == client
    assert origin_of(client, lines, ()) == client


@given(st.lists(proxies, min_size=1, max_size=5))
def test_trusted_proxies_that_name_no_client_leave_it_unknown(hops):
    *entries, last = map(str, hops)
    assert origin_of(ip_address(last), [",".join(entries)] if entries else [], TRUSTED) is None


@given(strangers, st.lists(proxies, max_size=3), st.sampled_from(["", "unknown", "1.2.3", "a:1"]))
def test_an_entry_that_is_no_address_leaves_the_client_unknown(client, hops, bad):
    entries = [str(client), bad, *map(str, hops)]
    assert origin_of(ip_address("10.0.0.1"), [", ".join(entries)], TRUSTED) is None


@given(st.text(max_size=200))
def test_any_text_is_an_address_or_none(text):
    address = parse_address(text)
    assert address is None or isinstance(address, IPv4Address | IPv6Address)


@given(st.data(), addresses)
def test_an_address_is_the_same_however_it_is_written(data, address):
    # Mapped addresses are IPv4.
    assume(address.version == 4 or address.ipv4_mapped is None)
    assert parse_address(data.draw(written(address))) == address


@given(addresses, st.integers(0, 128), addresses)
def test_a_network_has_the_addresses_of_its_prefix(base, length, other):
    prefix = min(length, base.max_prefixlen)
    network = ip_network((base, prefix), strict=False)
    parsed, plain = parse_network(str(network)), parse_address(str(other))
    assert is_within(parse_address(str(base)), [parsed]) or parsed.version == 6
    mapped = parsed.version != network.version
    if plain is not None and plain.version == other.version and not mapped:
        assert is_within(plain, [parsed]) is (other in network)


@given(st.ip_addresses(v=4), st.integers(0, 32))
def test_a_mapped_network_is_that_of_ipv4(base, length):
    network = ip_network((base, length), strict=False)
    mapped = f"::ffff:{network.network_address}/{96 + length}"
    assert parse_network(mapped) == network


@pytest.mark.parametrize(
    "text", ["", "10.0.0.1/8", "10.0.0.0/33", "10.0.0/8", "host", "fe80::%1/64", "1.2.3.4,::1"]
)
def test_what_is_no_network_is_refused(text):
    with pytest.raises(ValueError, match="no address and no network"):
        parse_network(text)


def test_a_zone_is_left_out():
    assert parse_address("fe80::1%eth0") == ip_address("fe80::1")
