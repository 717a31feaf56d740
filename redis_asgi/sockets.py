"""redis-py's connections, which find the addresses of host names by `names` instead of the loop's executor."""

import asyncio
from collections.abc import Mapping
from typing import Any

from redis.asyncio.connection import Connection, SSLConnection
from redis.asyncio.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection

from .names import names


class NamedConnection(Connection):
    """A connection to the first address of its host that takes one; a certificate is checked for the host's name."""

    _address = ""

    async def _connect(self) -> None:
        async with asyncio.timeout(self.socket_connect_timeout):
            await names().reach(self.host, self._connect_to)

    async def _connect_to(self, address: str) -> None:
        self._address = address
        await super()._connect()  # type: ignore[no-untyped-call]  # theirs

    def _connection_arguments(self) -> Mapping[str, Any]:
        arguments = {**super()._connection_arguments(), "host": self._address}
        if "ssl" in arguments:
            arguments["server_hostname"] = self.host
        return arguments


class NamedSSLConnection(NamedConnection, SSLConnection):
    """The same with TLS."""


class NamedMasterConnection(NamedConnection, SentinelManagedConnection):
    """The same to whom the sentinels call the master."""


class NamedMasterSSLConnection(NamedConnection, SentinelManagedSSLConnection):
    """The same to whom the sentinels call the master, with TLS."""


def connection_class(*, encrypted: bool) -> type[NamedConnection]:
    """The class of connections to an address of TCP."""
    return NamedSSLConnection if encrypted else NamedConnection


def master_connection_class(*, encrypted: bool) -> type[NamedConnection]:
    """The class of connections to the master behind sentinels."""
    return NamedMasterSSLConnection if encrypted else NamedMasterConnection
