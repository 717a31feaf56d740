"""redis-py's connections: addresses of host names by `resolver`,
not by the loop's executor, and bounded replies.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import hiredis
from redis.asyncio.connection import Connection, DefaultParser, SSLConnection
from redis.asyncio.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection

from . import side_connection
from .resolver import names


class _Replies:
    """A reader of hiredis that takes no reply which announces too much."""

    def __init__(self, reader: hiredis.Reader) -> None:
        self.gets = reader.gets
        self.has_data = reader.has_data
        self._feed = reader.feed

    def feed(self, data: bytes) -> None:
        if not self.has_data():
            side_connection.refuse_too_much(data)
        self._feed(data)


class BoundedParser(DefaultParser):  # type: ignore[misc, valid-type]  # redis-py chooses it when it is imported
    """redis-py's, over `_Replies`."""

    def on_connect(self, connection: Any) -> None:
        super().on_connect(connection)
        self._reader: Any = _Replies(self._reader)


class NamedConnection(Connection):
    """A connection to the first address of its host that takes one;
    a certificate is checked for the host's name.
    """

    _address = ""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"parser_class": BoundedParser, **options})

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
