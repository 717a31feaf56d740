"""Clients that leave at every stage, by close and by reset, pipeline,
dawdle and talk nonsense; and what they got.

Everything is plain sockets, so that nothing is as tidy as a client library would make it.
"""

import asyncio
import base64
import os
import random
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

import orjson

from .asking import embedding_body
from .service import numbers

_PATIENCE = 30.0  # seconds for one answer
_AT_ONCE = 40


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent, and what its answer is checked against.

    Attributes:
        client: Whose quota a limited one costs; empty for an embedding.
        credential, texts: Of an embedding.
    """

    raw: bytes
    client: str = ""
    credential: str = ""
    texts: tuple[str, ...] = ()


@dataclass
class Storm:
    """A storm against one server, and its oracle.

    Args:
        chance: Chooses everything.

    Attributes:
        sent: Requests of each client that may have been counted.
        answers: Of each client, by status.
        wrong: What must not be.
    """

    port: int
    quota: int
    chance: random.Random
    clients: int = 8
    sent: Counter[str] = field(default_factory=Counter)
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    embeddings: int = 0
    echoes: int = 0
    connections: int = 0
    stages: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def run(self, connections: int) -> None:
        """Open so many, some at a time."""
        turns = asyncio.Semaphore(_AT_ONCE)
        stages: list[Callable[[_Connection], Awaitable[None]]] = [
            self._in_turn,
            self._in_turn,
            self._pipelined,
            self._slow,
            self._half_closed,
            self._leaving_in_the_head,
            self._leaving_in_the_body,
            self._leaving_before_the_answer,
            self._leaving_in_the_answer,
            self._talking,
            self._talking,
            self._nonsense,
        ]

        async def one() -> None:
            async with turns:
                stage = self.chance.choice(stages)
                self.stages[stage.__name__.strip("_")] += 1
                try:
                    async with asyncio.timeout(_PATIENCE), _Connection(self.port, self.chance) as connection:
                        await stage(connection)
                except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                    self.wrong.append(f"{stage.__name__}: no answer ({type(error).__name__} {error})")

        self.connections += connections
        await asyncio.gather(*(one() for _ in range(connections)))

    # requests

    def _request(self) -> Request:
        return self.chance.choice((self._limited, self._limited, self._upload, self._embedding))()

    def _client(self) -> str:
        client = f"10.4.0.{self.chance.randrange(self.clients)}"
        self.sent[client] += 1
        return client

    def _head(self, start: str, client: str, *more: str) -> bytes:
        # For an app that counts connections where it should count clients.
        sabotage = f"x-connection: {self.chance.random()}"
        lines = (f"{start} HTTP/1.1", "host: app", f"x-forwarded-for: {client}", *([sabotage] if client else []), *more)
        return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n"

    def _limited(self) -> Request:
        client = self._client()
        return Request(self._head("GET /local", client), client)

    def _upload(self) -> Request:
        client = self._client()
        body = b"x" * self.chance.choice((0, 1, 1000, 100_000))
        return Request(self._head("POST /local/upload", client, f"content-length: {len(body)}") + body, client)

    def _embedding(self) -> Request:
        credential = f"Bearer {self.chance.randrange(4)}"
        texts = tuple(f"text {self.chance.randrange(30)}" for _ in range(self.chance.randrange(1, 5)))
        body = embedding_body(texts)
        lines = ["POST /v1/embeddings HTTP/1.1", "host: app", f"authorization: {credential}"]
        lines += ["content-type: application/json", f"content-length: {len(body)}"]
        head = "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n"
        return Request(head + body, credential=credential, texts=texts)

    async def _check(self, connection: "_Connection", request: Request) -> None:
        status, body = await connection.answer()
        self._note(request, status)
        if request.texts and status == 200:
            data = orjson.loads(body)["data"]
            right = [numbers(text, request.credential) for text in request.texts]
            if right != [entry["embedding"] for entry in data]:
                self.wrong.append(f"vectors of {request.texts} for {request.credential}")

    def _note(self, request: Request, status: int) -> None:
        if request.client:
            self.answers[request.client, status] += 1
        else:
            self.embeddings += 1
        if status not in (200, 429) or (request.texts and status != 200):
            self.wrong.append(f"{status} for {request.raw[:60]!r}")

    # stages

    async def _in_turn(self, connection: "_Connection") -> None:
        for _ in range(self.chance.randrange(1, 4)):
            request = self._request()
            connection.write(request.raw)
            await self._check(connection, request)

    async def _pipelined(self, connection: "_Connection") -> None:
        requests = [self._request() for _ in range(self.chance.randrange(2, 7))]
        connection.write(b"".join(request.raw for request in requests))
        for request in requests:
            await self._check(connection, request)

    async def _slow(self, connection: "_Connection") -> None:
        request = self._request()
        step = max(1, len(request.raw) // 10)
        for start in range(0, len(request.raw), step):
            connection.write(request.raw[start : start + step])
            await asyncio.sleep(self.chance.uniform(0, 0.005))
        await self._check(connection, request)

    async def _half_closed(self, connection: "_Connection") -> None:
        # Servers may take it for a client that has left.
        connection.write(self._request().raw)
        connection.end_of_requests()
        with suppress(OSError, asyncio.IncompleteReadError):
            await connection.answer()

    async def _leaving_in_the_head(self, connection: "_Connection") -> None:
        request = self._request()
        connection.write(request.raw[: self.chance.randrange(1, request.raw.index(b"\r\n\r\n"))])

    async def _leaving_in_the_body(self, connection: "_Connection") -> None:
        request = self.chance.choice((self._upload, self._embedding))()
        body = request.raw.index(b"\r\n\r\n") + 4
        connection.write(request.raw[: body + self.chance.randrange(len(request.raw) - body + 1) // 2])
        await asyncio.sleep(self.chance.uniform(0, 0.01))

    async def _leaving_before_the_answer(self, connection: "_Connection") -> None:
        for _ in range(self.chance.randrange(1, 4)):
            connection.write(self._request().raw)
        await asyncio.sleep(self.chance.uniform(0, 0.005))

    async def _leaving_in_the_answer(self, connection: "_Connection") -> None:
        connection.write(self._request().raw)
        with suppress(OSError, asyncio.IncompleteReadError):
            await connection.some(self.chance.randrange(1, 200))

    async def _nonsense(self, connection: "_Connection") -> None:
        client = self._client()
        head = self.chance.choice(
            (
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
                b"GET\r\n\r\n",
                self._head("GET /local", client, "content-length: nothing"),
                self._head("POST /local/upload", client, "transfer-encoding: chunked") + b"zz\r\n",
                self._head("GET /local", client, "x: " + "y" * 200_000),
            )
        )
        connection.write(head)
        with suppress(OSError, asyncio.IncompleteReadError):
            status, _ = await connection.answer()
            if status >= 500:
                self.wrong.append(f"{status} for {head[:60]!r}")

    async def _talking(self, connection: "_Connection") -> None:
        client = self._client()
        key = base64.b64encode(os.urandom(16)).decode()
        upgrade = ("connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13")
        request = Request(self._head("GET /local/socket", client, *upgrade, f"sec-websocket-key: {key}"), client)
        connection.write(request.raw)
        if self.chance.random() < 0.2:
            return  # in the handshake
        status, _ = await connection.answer()
        self._note(request, 200 if status == 101 else status)
        if status != 101:
            return
        for _ in range(self.chance.randrange(3)):
            text = b"%d" % self.chance.randrange(10**9)
            connection.write(_frame(text))
            if self.chance.random() < 0.2:
                return  # before the echo
            echo = await connection.exactly(2 + len(text))
            self.echoes += 1
            if echo != bytes([0x81, len(text)]) + text:
                self.wrong.append(f"{echo!r} for {text!r}")

    # the oracle

    def verdict(self, reached: Counter[tuple[str, str]], charged: dict[str, int]) -> list[str]:
        """What is wrong, of answers, of what came through to the app,
        and of what Redis has counted.

        Args:
            reached: By client and who decided, as the app counted itself.
            charged: By client, read from Redis.
        """
        found = list(self.wrong)
        for client, sent in self.sent.items():
            through = reached[client, "redis"]
            degraded = sum(count for (of, source), count in reached.items() if of == client and source != "redis")
            units = charged.get(client, 0)
            if through != units:
                found.append(f"{client}: {through} came through and {units} are counted")
            if through > self.quota:
                found.append(f"{client}: {through} came through of {self.quota}")
            if degraded:
                found.append(f"{client}: {degraded} came through without Redis")
            if not self.answers[client, 200] <= through <= sent:
                found.append(f"{client}: {self.answers[client, 200]} were answered, {through} came through of {sent}")
            if self.answers[client, 429] and units < self.quota:
                found.append(f"{client}: refused at {units} of {self.quota}")
        return found

    def figures(self) -> str:
        """One line."""
        statuses: Counter[int] = Counter()
        for (_, status), count in self.answers.items():
            statuses[status] += count
        return (
            f"{self.connections} connections, {sum(self.sent.values())} limited requests, "
            f"{statuses[200]} answered 200 and {statuses[429]} 429, {self.embeddings} embeddings, "
            f"{self.echoes} echoes, {len(self.wrong)} wrong; "
            + ", ".join(f"{count} {stage.replace('_', ' ')}" for stage, count in sorted(self.stages.items()))
        )


def _frame(text: bytes) -> bytes:
    """A masked text frame of less than 126 bytes."""
    mask = os.urandom(4)
    return bytes([0x81, 0x80 | len(text)]) + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(text))


class _Connection:
    """A socket that is closed or reset in the end, as chance has it."""

    def __init__(self, port: int, chance: random.Random) -> None:
        self._port = port
        self._resets = chance.random() < 0.5

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._resets:
            plain: socket.socket = self._writer.get_extra_info("socket")
            with suppress(OSError):
                plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._writer.transport.abort()
        else:
            self._writer.close()

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def end_of_requests(self) -> None:
        self._writer.write_eof()

    async def some(self, most: int) -> bytes:
        return await self._reader.read(most)

    async def exactly(self, count: int) -> bytes:
        return await self._reader.readexactly(count)

    async def answer(self) -> tuple[int, bytes]:
        """A status and its body; all answers of the app say how long they are."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split(maxsplit=2)[1])
        _, known, rest = head.partition("content-length:")
        length = int(rest.split("\r\n", 1)[0]) if known else 0
        return status, await self._reader.readexactly(length)
