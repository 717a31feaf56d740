"""Addresses and networks as they are compared: IPv4 within IPv6 is IPv4."""

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Among the trusted proxies: a peer without an address.
UNIX = "unix"
# IPv4 addresses within IPv6: mapped (RFC 4291), and of a translator (NAT64, RFC 6052).
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
_TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")


def unmapped(address: Address) -> Address:
    """*address*, or the IPv4 address that it carries: mapped into IPv6,
    or translated to it by a NAT64 gateway.
    """
    if isinstance(address, ipaddress.IPv6Address) and (address in _MAPPED or address in _TRANSLATED):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def read_network(text: str) -> str:
    """One entry of ``RATE_LIMIT_TRUSTED_PROXIES`` as addresses are compared with it:
    a mapped network is an IPv4 one.

    Raises:
        ValueError: If it is neither an address nor a network nor ``unix``, or can match nothing.
    """
    if text.lower() == UNIX:
        return UNIX
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not an address or CIDR ({error})") from None
    if isinstance(network, ipaddress.IPv4Network) or network.prefixlen < 96:
        return text
    within = ipaddress.IPv4Network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - 96))
    if network.subnet_of(_TRANSLATED):
        # The IPv4 network would take in whoever has such an address, through the translator or not.
        raise ValueError(f"{text!r} matches nothing: what a NAT64 gateway translates is read as IPv4. Name {within}")
    return str(within) if network.subnet_of(_MAPPED) else text
