"""Addresses of servers in settings: URLs and ``host:port``, read,
checked, and shown without secrets.
"""

import ipaddress
import os
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pydantic import SecretStr
from redis.asyncio.connection import parse_url

# What a URL may begin with, and what is understood by that.
_URL_SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "unix": "unix",
    "memory": "memory",
    "valkey": "redis",
    "valkeys": "rediss",
}
# Other programs with the same URL may want these;
# here they would undo what `connection/` relies on.
URL_OPTIONS_NOT_TAKEN = frozenset(
    [
        "client_name",
        "decode_responses",
        "encoding",
        "encoding_errors",
        "lib_name",
        "lib_version",
        "protocol",
        "retry_on_error",
        "retry_on_timeout",
        "timeout",
    ]
)
_URL_FILES = frozenset(["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
_URL_OPTIONS = URL_OPTIONS_NOT_TAKEN | frozenset(
    [
        "db",
        "username",
        "password",
        "max_connections",
        "health_check_interval",
        "socket_timeout",
        "socket_connect_timeout",
        "socket_keepalive",
        *_URL_FILES,
        "ssl_ca_path",
        "ssl_cert_reqs",
        "ssl_check_hostname",
    ]
)
# Up to the last @, scheme or not: a password may hold anything,
# and a host may have been given a whole URL.
_BEFORE_HOST = re.compile(r"^([a-z][a-z0-9+.-]*://)?.*@", re.IGNORECASE | re.DOTALL)
_PASSWORD_IN_QUERY = re.compile(r"((?:password|username)=)[^&]*", re.IGNORECASE)


def redact(value: object) -> str:
    """The repr of *value* for an error message: no user, no password, at most 80 characters."""
    text = _PASSWORD_IN_QUERY.sub(r"\1***", _BEFORE_HOST.sub(r"\1***@", str(value)))
    text = text if len(text) <= 80 else text[:77] + "..."
    return repr(text) if isinstance(value, str) else text


def redact_url(url: str) -> str:
    """The repr of a URL that could not be read, without what may be a password.

    That is what stands before an ``@``; where there is none,
    after a colon that no port follows; and an option's value.
    """
    scheme, slashes, rest = url.partition("//")
    rest = rest if slashes else scheme
    host = rest.rpartition("@")[2]
    rest = f"***@{host}" if "@" in rest else re.sub(r":(?!\d{1,5}(?:[/?]|$))[^/?]*", ":***", rest)
    rest = re.sub(r"=[^&]*", "=***", rest)
    return redact(scheme + slashes + rest if slashes else rest)


def check_host(value: str) -> str:
    """*value*, if it may be the name or the address of a host."""
    if not value or re.search(r"[\s/@]", value):
        raise ValueError("not a host name or address; a URL belongs into REDIS_URL")
    if value[0] == "[" or value.count(":") == 1:
        raise ValueError("not a host name or address alone; a port belongs into REDIS_PORT, and brackets into URLs")
    return value


def check_readable(value: str) -> str:
    """*value*, if it is the path of a file that may be read."""
    if not (os.path.isfile(value) and os.access(value, os.R_OK)):  # noqa: PTH113 - of a text, which stays one
        raise ValueError("no readable file")
    return value


def check_url(value: SecretStr) -> SecretStr:
    """A URL of a server with its scheme in the one spelling that all others read."""
    url = value.get_secret_value()
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("the port is not a number between 1 and 65535") from None
    if parts.scheme not in _URL_SCHEMES:
        raise ValueError("not a redis://, rediss://, valkey://, valkeys://, unix:// or memory:// URL")
    if port == 0:
        raise ValueError("the port is not a number between 1 and 65535")
    if parts.scheme == "unix" and not parts.path:
        raise ValueError("a unix:// URL needs the path of a socket")
    scheme = _URL_SCHEMES[parts.scheme]
    if scheme in ("redis", "rediss") and not re.fullmatch(r"/?\d*", parts.path):
        raise ValueError("the path of the URL is not a database number")
    unknown = sorted(set(parse_qs(parts.query, keep_blank_values=True)) - _URL_OPTIONS)
    if "@" in parts.fragment or (unknown and "@" in parts.query):
        raise ValueError("in a user name or password /, ? and # are written %2F, %3F and %23")
    if unknown:
        raise ValueError(f"{unknown[0][:40]!r} is no option of a Redis URL")
    url = scheme + url.strip()[len(parts.scheme) :]
    if scheme != "memory":
        options: dict[str, Any] = {**parse_url(url)}  # a ValueError names the option whose value has a wrong type
        if options.get("ssl_cert_reqs", "required") not in ("none", "optional", "required"):
            raise ValueError("ssl_cert_reqs is not none, optional or required")
        for name in sorted(_URL_FILES & options.keys()):
            try:
                check_readable(options[name])
            except ValueError as error:
                raise ValueError(f"{name} names {error}") from None
    return SecretStr(url)


def weakened_by(url: str) -> str | None:
    """The option of a ``rediss://`` URL that gives up verifying who answers; ``None`` when it is
    verified.
    """
    options = parse_url(url) if url.startswith("rediss:") else {}
    if options.get("ssl_cert_reqs") == "none":
        return "ssl_cert_reqs=none"
    return None if options.get("ssl_check_hostname", True) else "ssl_check_hostname=false"


def read_address(text: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or, for an IPv6 address, ``[host]:port``.

    Raises:
        ValueError: If it is neither.
    """
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
        ipaddress.IPv6Address(host)
    if (
        not host
        or re.search(r"[\s/@\[\]]", host)
        or not re.fullmatch(r"[0-9]{1,5}", port)
        or not 1 <= int(port) <= 65535
    ):
        raise ValueError("not host:port")
    if ":" in host and not bracketed:
        raise ValueError("an IPv6 address without brackets")
    return host, int(port)


def check_addresses(value: tuple[str, ...]) -> tuple[str, ...]:
    """*value*, if each of it is an address that `read_address` reads."""
    for address in value:
        try:
            read_address(address)
        except ValueError:
            raise ValueError("not a list of host:port, or [host]:port for an IPv6 address") from None
    return value
