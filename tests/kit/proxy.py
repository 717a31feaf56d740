"""A TCP proxy that misbehaves on request."""

import asyncio
import socket
import struct
from contextlib import suppress
from typing import Literal, Self

import hiredis

Mode = Literal[
    "pass",
    "delay",
    "drop_replies",
    "cut_replies",
    "begun_replies",
    "torn_replies",
    "answer",
    "reset",
    "blackhole",
    "refuse",
    "chunk",
]


class FaultProxy:
    """Stands between a client and a server of this machine, in the running loop.

    Attributes:
        accepted: Connections taken so far.
        open: Connections open now.
    """

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self._mode: Mode = "pass"
        self._seconds = 0.0
        self._times: int | None = None
        self._reply = b""
        self._port = 0
        self._listener: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.accepted = 0
        self.open = 0

    @property
    def port(self) -> int:
        """The port to connect to; it stays the same through every mode."""
        return self._port

    @property
    def url(self) -> str:
        """A ``redis://`` URL through the proxy."""
        return f"redis://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        await self._listen()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._deafen()
        for task in self._tasks:
            task.cancel()
        self._hang_up()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def lead_to(self, host: str, port: int) -> None:
        """Connect to another server from now on,
        as a name does after a failover; open connections stay.
        """
        self._upstream = (host, port)

    async def set(self, mode: Mode, *, seconds: float = 0.0, times: int | None = None, reply: bytes = b"") -> None:
        """Behave like *mode* from now on, on open connections too.

        Args:
            mode: One of those in the docstring of ``tests.kit``.
            seconds: How much later ``delay`` lets every reply arrive, whatever else is on the way.
            times: After so many replies dropped or cut all is well again;
                ``None`` = until the next `set`.
            reply: What ``answer`` says to every command, of which the server hears nothing.
        """
        self._mode, self._seconds, self._times, self._reply = mode, seconds, times, reply
        if mode == "refuse":
            await self._deafen()
        elif self._listener is None:
            await self._listen()
        if mode in ("refuse", "reset"):
            self._hang_up()

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = self._listener.sockets[0].getsockname()[1]

    async def _deafen(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _hang_up(self) -> None:
        for writer in tuple(self._writers):
            _reset(writer)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: asyncio complains about a cancelled one of its.
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self.open += 1
        mine = [writer]
        self._writers.add(writer)
        try:
            if self._mode == "reset":
                return
            there, back = await asyncio.open_connection(*self._upstream)
            mine.append(back)
            self._writers.add(back)
            on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
            pumps = [
                asyncio.create_task(self._requests(reader, back, writer)),
                asyncio.create_task(self._replies(there, on_the_way, writer)),
                asyncio.create_task(self._deliver(on_the_way, writer)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for each in mine:
                self._writers.discard(each)
                if self._mode == "reset":
                    _reset(each)
                each.close()
                with suppress(OSError):
                    await each.wait_closed()
            self.open -= 1

    async def _requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: asyncio.StreamWriter
    ) -> None:
        commands = hiredis.Reader()
        with suppress(OSError):
            while data := await reader.read(65536):
                if self._mode == "answer":
                    # As many as were asked for: one too few would be silence.
                    commands.feed(data)
                    while commands.gets() is not False:
                        await self._write(client, self._reply)
                elif self._mode != "blackhole":
                    await self._write(writer, data)

    async def _replies(
        self,
        reader: asyncio.StreamReader,
        on_the_way: "asyncio.Queue[tuple[float, bytes]]",
        writer: asyncio.StreamWriter,
    ) -> None:
        now = asyncio.get_running_loop().time
        with suppress(OSError):
            while data := await reader.read(65536):
                mode = self._mode
                if mode in ("cut_replies", "drop_replies") and self._times is not None:
                    self._times -= 1
                    if self._times <= 0:
                        self._mode = "pass"
                if mode == "cut_replies":
                    return
                if mode in ("begun_replies", "torn_replies"):
                    data = data[:1]
                if mode == "torn_replies":
                    await self._write(writer, data)
                    _reset(writer)
                    return
                if mode not in ("blackhole", "drop_replies"):
                    on_the_way.put_nowait((now() + (self._seconds if mode == "delay" else 0.0), data))
        on_the_way.put_nowait((now(), b""))
        await asyncio.Event().wait()

    async def _deliver(self, on_the_way: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
        now = asyncio.get_running_loop().time
        with suppress(OSError):
            while True:
                due, data = await on_the_way.get()
                if due > now():
                    await asyncio.sleep(due - now())
                if not data:
                    return
                await self._write(writer, data)

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        pieces = [data[i : i + 1] for i in range(len(data))] if self._mode == "chunk" else [data]
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            if self._mode == "chunk":
                await asyncio.sleep(0)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST: no lingering, unsent data thrown away."""
    with suppress(OSError):
        plain: socket.socket | None = writer.get_extra_info("socket")
        if plain is not None:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
