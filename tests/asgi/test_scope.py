"""What is read from a scope: headers, preflights, and the client's address behind proxies."""

import ipaddress
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redis_asgi import Settings
from redis_asgi.asgi.scope import (
    Addressing,
    header_values,
    is_plain_address,
    is_preflight,
    parse_address,
)

from .scopes import http


def test_header_values_keep_their_order() -> None:
    """Every field line of a name, in the order received."""
    scope = http(headers=[("a", "1"), ("b", "2"), ("a", "3")])

    assert header_values(scope, b"a") == [b"1", b"3"]
    assert header_values(scope, b"c") == []


@pytest.mark.parametrize(
    ("method", "headers", "expected"),
    [
        ("OPTIONS", ["origin", "access-control-request-method"], True),
        ("OPTIONS", ["origin"], False),
        ("OPTIONS", ["access-control-request-method"], False),
        ("GET", ["origin", "access-control-request-method"], False),
    ],
)
def test_preflight(method: str, headers: list[str], expected: bool) -> None:
    """A preflight is OPTIONS with both headers a browser sends."""
    assert expected is is_preflight(http(method=method, headers=[(name, "x") for name in headers]))


def test_websocket_is_no_preflight() -> None:
    """A handshake has no method."""
    assert not is_preflight({"type": "websocket", "headers": []})


# Addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.2.3.4", "1.2.3.4"),
        (" 1.2.3.4 ", "1.2.3.4"),
        ("1.2.3.4:80", "1.2.3.4"),
        ("2001:db8::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("2001:db8::1:46532", "2001:db8::1"),
        ("2001:db8:1:2:3:4:5:6:443", "2001:db8:1:2:3:4:5:6"),
        ("2001:0DB8:0::0001", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
        ("::ffff:1.2.3.4", "1.2.3.4"),
        ("[::ffff:1.2.3.4]:80", "1.2.3.4"),
        ("", None),
        ("unknown", None),
        ("_hidden", None),
        ("localhost", None),
        ("1.2.3", None),
        ("1.2.3.4.5", None),
        ("1.2.3.256", None),
        ("01.2.3.4", None),
        ("1.2.3.4:", None),
        ("1.2.3.4:x", None),
        ("1.2.3.4/8", None),
        ("[2001:db8::1", None),
        ("[2001:db8::1]x", None),
        ("[2001:db8::1]:", None),
        ("2001:db8::1:46532:1", None),
        ("2001:db8::1::2", None),
        ("1.2.3.4 5.6.7.8", None),
        ("1" * 100, None),
        ("fe80::1%" + "a" * 100, None),
    ],
)
def test_address_as_it_stands_in_a_header(text: str, expected: str | None) -> None:
    """Addresses with port, brackets or zone are read; nothing else is."""
    found = parse_address(text)

    assert expected == (None if found is None else str(found))


@given(text=st.text(max_size=80))
def test_any_entry_is_an_address_or_nothing(text: str) -> None:
    """Nothing a client can write raises."""
    found = parse_address(text)

    assert found is None or ipaddress.ip_address(str(found)) == found


def addressing(trusted: str = "", header: str = "x-forwarded-for", prefix: int = 64) -> Addressing:
    """An `Addressing` of these settings."""
    values = {"RATE_LIMIT_TRUSTED_PROXIES": trusted, "RATE_LIMIT_FORWARDED_HEADER": header}
    return Addressing(Settings(**values, RATE_LIMIT_IPV6_PREFIX=prefix))


def xff(*lines: str) -> list[tuple[str, str]]:
    """Field lines of ``X-Forwarded-For``."""
    return [("x-forwarded-for", line) for line in lines]


PROXIES = "10.0.0.0/8,192.0.2.1,2001:db8:ffff::/48"


@pytest.mark.parametrize(
    ("peer", "lines", "expected"),
    [
        pytest.param("192.0.2.1", [], "192.0.2.1", id="proxy without a header"),
        pytest.param("192.0.2.1", ["198.51.100.7"], "198.51.100.7", id="one hop"),
        pytest.param("192.0.2.1", ["198.51.100.7, 10.0.0.1"], "198.51.100.7", id="two hops"),
        pytest.param("192.0.2.1", ["198.51.100.7", "10.0.0.1"], "198.51.100.7", id="two field lines"),
        pytest.param("192.0.2.1", ["6.6.6.6, 198.51.100.7"], "198.51.100.7", id="spoofed on the left"),
        pytest.param("192.0.2.1", ["6.6.6.6", "198.51.100.7, 10.0.0.1"], "198.51.100.7", id="spoofed line"),
        pytest.param("192.0.2.1", ["10.6.6.6, 198.51.100.7"], "198.51.100.7", id="spoofed as a proxy"),
        pytest.param("192.0.2.1", ["10.0.0.2, 10.0.0.1"], "10.0.0.2", id="trusted all the way"),
        pytest.param("192.0.2.1", ["198.51.100.7, junk"], "192.0.2.1", id="junk beside the proxy"),
        pytest.param("192.0.2.1", ["198.51.100.7, junk, 10.0.0.1"], "10.0.0.1", id="junk further left"),
        pytest.param("192.0.2.1", ["junk, 198.51.100.7"], "198.51.100.7", id="junk left of the client"),
        pytest.param("192.0.2.1", [""], "192.0.2.1", id="empty header"),
        pytest.param("192.0.2.1", ["198.51.100.7,"], "198.51.100.7", id="empty entry"),
        pytest.param("192.0.2.1", [",, 198.51.100.7\t,,10.0.0.1 , "], "198.51.100.7", id="empty entries"),
        pytest.param("192.0.2.1", ["198.51.100.7", "", " , "], "198.51.100.7", id="empty lines"),
        pytest.param("192.0.2.1", ["64:ff9b::198.51.100.7"], "198.51.100.7", id="translated client"),
        pytest.param("64:ff9b::c000:201", ["198.51.100.7"], "198.51.100.7", id="translated proxy"),
        pytest.param("192.0.2.1", ["unknown"], "192.0.2.1", id="unknown"),
        pytest.param("192.0.2.1", ["198.51.100.7:5555"], "198.51.100.7", id="with a port"),
        pytest.param("192.0.2.1", ["[2001:db8:1:2::3]:5555"], "2001:db8:1:2::/64", id="IPv6 with a port"),
        pytest.param("192.0.2.1", ["::ffff:198.51.100.7"], "198.51.100.7", id="IPv4-mapped client"),
        pytest.param("192.0.2.1", ["198.51.100.7, ::ffff:10.0.0.1"], "198.51.100.7", id="IPv4-mapped proxy"),
        pytest.param("::ffff:192.0.2.1", ["198.51.100.7"], "198.51.100.7", id="IPv4-mapped peer"),
        pytest.param("2001:db8:ffff::1", ["198.51.100.7"], "198.51.100.7", id="IPv6 proxy"),
        pytest.param("203.0.113.9", ["198.51.100.7"], "203.0.113.9", id="peer not trusted"),
        pytest.param("testclient", ["198.51.100.7"], "testclient", id="host name as peer"),
        pytest.param("h" * 300, ["198.51.100.7"], "h" * 300, id="long name as peer"),
        pytest.param("", ["198.51.100.7"], None, id="empty peer"),
        pytest.param(None, ["198.51.100.7"], None, id="unix socket"),
        pytest.param("64:ff9b::198.51.100.7", [], "198.51.100.7", id="translated peer"),
    ],
)
def test_client_behind_proxies(peer: str | None, lines: Sequence[str], expected: str | None) -> None:
    """From the right, over all field lines, the first address that is not trusted is the client."""
    assert expected == addressing(PROXIES).client(http(peer, xff(*lines)))


@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded", "x-real-ip", "cf-connecting-ip"])
def test_spoofed_header_without_trust_changes_nothing(header: str) -> None:
    """By default no header is believed, whoever sends it."""
    scope = http("203.0.113.9", [(header, "6.6.6.6"), (header, "for=6.6.6.6")])

    assert addressing().client(scope) == "203.0.113.9"
    assert not addressing().trusts_peer(scope)


@pytest.mark.parametrize("peer", [None, "", ["", 0]])
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["198.51.100.7"], "198.51.100.7"),
        (["6.6.6.6, 198.51.100.7, 10.0.0.1"], "198.51.100.7"),
        (["10.0.0.1"], "10.0.0.1"),
        (["2001:db8:1:2::3"], "2001:db8:1:2::/64"),
        ([], None),
        (["unknown"], None),
    ],
)
def test_proxy_on_a_unix_socket(peer: Any, lines: Sequence[str], expected: str | None) -> None:
    """With ``unix`` among the trusted, a peer without an address is a proxy;
    what it does not say, nobody knows.
    """
    scope = {**http(None, xff(*lines)), "client": (peer, 0) if peer == "" else peer}

    assert expected == addressing("unix,10.0.0.0/8").client(scope)
    assert addressing("unix").trusts_peer(scope)
    assert addressing("10.0.0.0/8").client(scope) is None
    assert not addressing("10.0.0.0/8").trusts_peer(scope)


@pytest.mark.parametrize("peer", ["unix", "unix:", "testclient", "203.0.113.9"])
def test_a_peer_with_a_name_is_on_no_unix_socket(peer: str) -> None:
    """A server may have taken the name from a header."""
    assert peer == addressing("unix").client(http(peer, xff("6.6.6.6")))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param(["198.51.100.7"], "198.51.100.7", id="one"),
        pytest.param([" 198.51.100.7\t"], "198.51.100.7", id="blanks"),
        pytest.param(["2001:db8:1:2::3"], "2001:db8:1:2::/64", id="IPv6"),
        pytest.param(["::ffff:198.51.100.7"], "198.51.100.7", id="IPv4-mapped"),
        pytest.param(["10.0.0.9"], "10.0.0.9", id="a proxy's own"),
        pytest.param([], "192.0.2.1", id="none"),
        pytest.param([""], "192.0.2.1", id="empty"),
        pytest.param(["unknown"], "192.0.2.1", id="no address"),
        pytest.param(["6.6.6.6, 198.51.100.7"], "192.0.2.1", id="a list"),
        pytest.param(["198.51.100.7,"], "192.0.2.1", id="a list of one"),
        pytest.param(["6.6.6.6", "198.51.100.7"], "192.0.2.1", id="two lines"),
        pytest.param(["198.51.100.7", "198.51.100.7"], "192.0.2.1", id="two equal lines"),
        pytest.param(["198.51.100.7", ""], "192.0.2.1", id="an empty line beside it"),
    ],
)
@pytest.mark.parametrize("header", ["x-real-ip", "CF-Connecting-IP", "True-Client-IP", "fly-client-ip"])
def test_header_with_one_address(header: str, lines: Sequence[str], expected: str) -> None:
    """Exactly one line with one address, from a trusted peer;
    anything more was put there by somebody else.
    """
    scope = http("192.0.2.1", [(header.lower(), line) for line in lines])

    assert expected == addressing(PROXIES, header).client(scope)
    assert addressing(PROXIES, header).client({**scope, "client": ("203.0.113.9", 1)}) == "203.0.113.9"


def test_only_the_chosen_header_is_read() -> None:
    """A client may send the other header through a proxy that does not know it."""
    scope = http("192.0.2.1", [("forwarded", "for=6.6.6.6"), ("x-real-ip", "6.6.6.6"), *xff("198.51.100.7")])
    assert addressing(PROXIES).client(scope) == "198.51.100.7"

    scope = http("192.0.2.1", [*xff("6.6.6.6"), ("forwarded", "for=198.51.100.7")])
    assert addressing(PROXIES, "forwarded").client(scope) == "198.51.100.7"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param(["for=198.51.100.7"], "198.51.100.7", id="plain"),
        pytest.param(["For=198.51.100.7;Proto=https;by=10.0.0.1"], "198.51.100.7", id="with other parameters"),
        pytest.param(["proto=https; for = 198.51.100.7 ;by=x"], "198.51.100.7", id="blanks, not first"),
        pytest.param(['for="198.51.100.7:5555"'], "198.51.100.7", id="quoted with a port"),
        pytest.param(['for="[2001:db8:1:2::3]:5555"'], "2001:db8:1:2::/64", id="quoted IPv6 with a port"),
        pytest.param(['for="[2001:db8:1:2::3]"'], "2001:db8:1:2::/64", id="quoted IPv6"),
        pytest.param(["for=198.51.100.7, for=10.0.0.1"], "198.51.100.7", id="two elements"),
        pytest.param(["for=198.51.100.7", "for=10.0.0.1"], "198.51.100.7", id="two field lines"),
        pytest.param(["for=6.6.6.6, for=198.51.100.7"], "198.51.100.7", id="spoofed on the left"),
        pytest.param(['by="a,b";for=198.51.100.7'], "198.51.100.7", id="comma within quotes"),
        pytest.param(["for=_hidden"], "192.0.2.1", id="obfuscated"),
        pytest.param(['for="_hidden:80"'], "192.0.2.1", id="obfuscated with a port"),
        pytest.param(["for=unknown"], "192.0.2.1", id="unknown"),
        pytest.param(["for=6.6.6.6, proto=https"], "192.0.2.1", id="element without for"),
        pytest.param(["for="], "192.0.2.1", id="empty for"),
        pytest.param(["xfor=6.6.6.6"], "192.0.2.1", id="another parameter"),
        pytest.param(["for=198.51.100.7, "], "198.51.100.7", id="empty element"),
        pytest.param([", ,for=198.51.100.7,,", "", " "], "198.51.100.7", id="empty elements and lines"),
        pytest.param([";;for=198.51.100.7;;"], "198.51.100.7", id="empty parameters"),
        pytest.param([""], "192.0.2.1", id="empty header"),
        pytest.param(['x="a;for=6.6.6.6;y=, for=198.51.100.7'], "198.51.100.7", id="open quote before the proxy's"),
        pytest.param(
            ['x="a;for=6.6.6.6;y=, for="[2001:db8::1]"'], "2001:db8::/64", id="open quote before a quoted one"
        ),
        pytest.param(['x="\\";for=6.6.6.6;y=", for=198.51.100.7'], "198.51.100.7", id="escaped quote"),
        pytest.param(['x="\\", for=198.51.100.7'], "198.51.100.7", id="escaped quote that evens out"),
        pytest.param(['for=198.51.100.7;host="a;for=6.6.6.6;b"'], "198.51.100.7", id="semicolon within quotes"),
        pytest.param(['for=198.51.100.7;host="a\\", for=6.6.6.6"'], "198.51.100.7", id="escaped quote within quotes"),
        pytest.param(
            ['for=6.6.6.6, for=198.51.100.7;host="a\\", for=6.6.6.6"'], "198.51.100.7", id="escaped quote, spoofed"
        ),
        pytest.param(['for=198.51.100.7;host="a\\\\"'], "198.51.100.7", id="escaped backslash before the end"),
        pytest.param(['for=198.51.100.7;host="a", for=6.6.6.6"'], "192.0.2.1", id="open quote of the proxy's"),
        pytest.param(['for="198.51\\.100.7"'], "198.51.100.7", id="quoted pair"),
        pytest.param(["for=6.6.6.6;for=198.51.100.7"], "192.0.2.1", id="for twice"),
        pytest.param(['for="";for=198.51.100.7'], "192.0.2.1", id="for twice, empty"),
        pytest.param(["for=198.51.100.7 6.6.6.6"], "192.0.2.1", id="blank within"),
        pytest.param(["for=198.51.100.7;x"], "192.0.2.1", id="parameter without a value"),
        pytest.param(["for"], "192.0.2.1", id="name alone"),
        pytest.param(['"for=198.51.100.7"'], "192.0.2.1", id="all in quotes"),
    ],
)
def test_forwarded_header(lines: Sequence[str], expected: str) -> None:
    """RFC 7239, with everything a client may have put before the proxy's own element."""
    scope = http("192.0.2.1", [("forwarded", line) for line in lines])

    assert expected == addressing(PROXIES, "forwarded").client(scope)


@given(spoofed=st.lists(st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=40), max_size=3))
def test_nobody_can_choose_an_address_behind_a_proxy(spoofed: list[str]) -> None:
    """Whatever a client writes, it is counted by its real address,
    which the proxy has written behind it.
    """
    # The proxy appends to the last line, as most do.
    own = [*spoofed[:-1], ", ".join([*spoofed[-1:], "198.51.100.7"])]
    assert addressing(PROXIES).client(http("192.0.2.1", xff(*own))) == "198.51.100.7"

    own = [*spoofed[:-1], ", ".join([*spoofed[-1:], "for=198.51.100.7"])]
    scope = http("192.0.2.1", [("forwarded", line) for line in own])
    assert addressing(PROXIES, "forwarded").client(scope) == "198.51.100.7"


FORGED = st.sampled_from(['"', "\\", ";", ",", "=", " ", "for=6.6.6.6", "for=", "6.6.6.6", "by=x", "a"])


@given(pieces=st.lists(FORGED, max_size=12), own=st.sampled_from(["for=198.51.100.7", 'for="198.51.100.7:80"']))
def test_nobody_can_forge_a_forwarded_element(pieces: list[str], own: str) -> None:
    """The same, aimed at the grammar: quotes, escapes and separators before what the proxy writes."""
    scope = http("192.0.2.1", [("forwarded", "".join(pieces) + ", " + own)])

    assert addressing(PROXIES, "forwarded").client(scope) == "198.51.100.7"


@pytest.mark.parametrize(
    ("peer", "prefix", "expected"),
    [
        pytest.param("2001:db8:1:2:3:4:5:6", 64, "2001:db8:1:2::/64", id="default /64"),
        pytest.param("2001:db8:1:2:ffff::", 64, "2001:db8:1:2::/64", id="same network"),
        pytest.param("2001:db8:1:3::1", 64, "2001:db8:1:3::/64", id="next network"),
        pytest.param("2001:db8:1:2::1", 56, "2001:db8:1::/56", id="/56"),
        pytest.param("2001:db8:1:2::1", 128, "2001:db8:1:2::1/128", id="each address"),
        pytest.param("fe80::1%eth0", 64, "fe80::/64", id="zone id"),
        pytest.param("::ffff:192.0.2.9", 64, "192.0.2.9", id="IPv4-mapped is not one network"),
        pytest.param("::FFFF:c000:0209", 64, "192.0.2.9", id="IPv4-mapped in hexadecimal"),
        pytest.param("192.0.2.9", 64, "192.0.2.9", id="IPv4 is itself"),
    ],
)
def test_ipv6_clients_share_their_network(peer: str, prefix: int, expected: str) -> None:
    """Whoever holds a /64 has one counter, not 2^64."""
    assert expected == addressing(prefix=prefix).client(http(peer))


def test_peer_may_be_a_list() -> None:
    """ASGI says "an iterable": some servers give a list."""
    assert (
        addressing(PROXIES).client({**http(headers=xff("198.51.100.7")), "client": ["10.0.0.1", 1]}) == "198.51.100.7"
    )


def test_trusted_peer_is_known() -> None:
    """Whether the header of a request is believed depends on the peer alone."""
    assert addressing(PROXIES).trusts_peer(http("10.1.2.3"))
    assert not addressing(PROXIES).trusts_peer(http("11.1.2.3"))
    assert not addressing(PROXIES).trusts_peer(http(None))
    assert not addressing(PROXIES).trusts_peer(http("h" * 300))


@pytest.mark.parametrize(
    ("client", "expected"),
    [("1.2.3.4", True), ("2001:db8::/64", True), ("testclient", False), ("", False), ("1" * 100, False)],
)
def test_plain_address(client: str, expected: bool) -> None:
    """Addresses and networks may stand in a key as they are, names may not."""
    assert expected is is_plain_address(client)
