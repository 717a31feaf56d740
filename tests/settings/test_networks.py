"""Addresses and networks, as tables."""

from ipaddress import ip_address

import pytest

from redis_asgi.settings.networks import read_network, unmapped


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("64:ff9b::192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("64:ff9b:1::192.0.2.1", "64:ff9b:1::c000:201"),
    ],
)
def test_an_address_in_another_is_that_address(address: str, expected: str) -> None:
    """IPv4 within IPv6 is IPv4, mapped or translated."""
    assert expected == str(unmapped(ip_address(address)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("UNIX", "unix"),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8::/32", "2001:db8::/32"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:192.0.2.1", "192.0.2.1/32"),
        ("::/0", "::/0"),
    ],
)
def test_a_mapped_network_is_an_ipv4_one(text: str, expected: str) -> None:
    """Entries are read as the addresses that are compared with them."""
    assert expected == read_network(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("10.0.0.1/8", "is not an address or CIDR"),
        ("proxy", "is not an address"),
        ("64:ff9b::a00:0/104", "Name 10.0.0.0/8"),
    ],
)
def test_what_can_match_nothing_is_refused(text: str, says: str) -> None:
    """The error names the entry, and one that works where there is one."""
    with pytest.raises(ValueError, match=says):
        read_network(text)
