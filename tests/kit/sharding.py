"""A proxy that shards by the first key of a command and refuses nothing,
as twemproxy, Codis and Envoy do.
"""

import asyncio
from collections.abc import Sequence
from typing import Self

import hiredis
from redis.crc import key_slot

_KEYLESS = frozenset((b"PING", b"TIME", b"INFO", b"CLIENT", b"SELECT", b"HELLO", b"AUTH"))


class ShardingProxy:
    """Stands before several servers of this machine, in the running loop;
    a command goes where its first key belongs.

    Args:
        ports: Of the servers.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = ports
        self._listener: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.url = ""

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._listener is not None
        self._listener.close()
        for writer in tuple(self._writers):
            writer.close()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        shards = [await asyncio.open_connection("127.0.0.1", port) for port in self._ports]
        writers = {writer, *(shard for _, shard in shards)}
        self._writers |= writers
        asked = hiredis.Reader()
        try:
            while data := await reader.read(1 << 16):
                asked.feed(data)
                while (command := asked.gets()) is not False:
                    there, said = shards[self._shard(command)]
                    said.write(hiredis.pack_command(tuple(command)))
                    writer.write(await _one_reply(there))
        except OSError:
            pass
        finally:
            for each in writers:
                each.close()
            self._writers -= writers

    def _shard(self, command: Sequence[bytes]) -> int:
        name = command[0].upper()
        if name in _KEYLESS or len(command) == 1:
            return 0
        if name in (b"EVAL", b"EVALSHA"):
            return key_slot(command[3]) % len(self._ports) if command[2] != b"0" else 0
        return key_slot(command[1]) % len(self._ports)


async def _one_reply(reader: asyncio.StreamReader) -> bytes:
    """The bytes of the next reply of a server that is asked one thing at a time."""
    whole, parsed = b"", hiredis.Reader()
    while True:
        more = await reader.read(1 << 16)
        if not more:
            raise ConnectionResetError
        whole += more
        parsed.feed(more)
        if parsed.gets() is not False:
            return whole
