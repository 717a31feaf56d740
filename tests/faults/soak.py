"""Traffic for as long as one likes, while Redis is killed and started again every few seconds."""

import asyncio
import random
import statistics
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import count

import httpx

from ..kit.servers import Server
from .asking import assert_right, embedding_body

QUOTA = 5
_CLIENTS = 10
_LIMITERS, _EMBEDDERS = 6, 2


@dataclass
class Soak:
    """One soak against a server of its own.

    Args:
        chance: Chooses everything.

    Attributes:
        statuses: Of all answers.
        admitted: Of each client, by who decided.
        recoveries: From the moment a new Redis answered to the first check that it decided, in
            seconds, on the clock that all processes share: what an answer takes to come back from a
            busy server is no recovery.
        late: Of those, how many came after half a second and one more request had passed.
        held: What the process held, every half second: bytes, tasks, files.
        wrong: What must not be.
    """

    port: int
    server: Server
    chance: random.Random
    statuses: Counter[int] = field(default_factory=Counter)
    admitted: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    recoveries: list[float] = field(default_factory=list)
    late: int = 0
    held: list[dict[str, int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    _era: int = 0
    _decided: asyncio.Future[float] | None = None

    async def run(self, seconds: float, *, restart_every: float) -> None:
        """Soak."""
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", limits=limits, timeout=30) as client:
            self._client = client
            ending = asyncio.Event()
            traffic = [
                *(asyncio.create_task(self._limit(ending)) for _ in range(_LIMITERS)),
                *(asyncio.create_task(self._embed(ending)) for _ in range(_EMBEDDERS)),
                asyncio.create_task(self._look(ending)),
            ]
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                await asyncio.sleep(restart_every * self.chance.uniform(0.5, 1.5))
                await self._restart()
            ending.set()
            await asyncio.gather(*traffic)

    async def _get(self, path: str, client: str) -> httpx.Response:
        decided = self._decided
        response = await self._client.get(path, headers={"x-forwarded-for": client})
        self._note(response)
        # One that was sent to the new Redis.
        if decided is not None and not decided.done() and response.headers.get("x-source") == "redis":
            decided.set_result(float(response.headers["x-at"]))
        return response

    def _note(self, response: httpx.Response) -> None:
        self.statuses[response.status_code] += 1
        if response.status_code not in (200, 429):
            self.wrong.append(f"{response.status_code} for {response.request.url.path}")

    async def _limit(self, ending: asyncio.Event) -> None:
        while not ending.is_set():
            # Redis forgets its counters when it is killed:
            # a client is of one life, or of the time without one.
            era = self._era
            client = f"10.{5 + era // 256}.{era % 256}.{self.chance.randrange(_CLIENTS)}"
            response = await self._get("/local", client)
            # One that was under way at the turn may have been decided by either life.
            if response.status_code == 200 and era == self._era:
                self.admitted[client][response.headers["x-source"]] += 1

    async def _embed(self, ending: asyncio.Event) -> None:
        while not ending.is_set():
            credential = f"Bearer {self.chance.randrange(3)}"
            texts = tuple(f"text {self.chance.randrange(200)}" for _ in range(3))
            headers = {"authorization": credential, "content-type": "application/json"}
            response = await self._client.post("/v1/embeddings", content=embedding_body(texts), headers=headers)
            self._note(response)
            if response.status_code == 200:
                assert_right(response.content, credential, texts)

    async def _look(self, ending: asyncio.Event) -> None:
        while not ending.is_set():
            for path in ("/health/live", "/optional/ready", "/metrics/", "/status/"):
                await self._get(path, "10.4.0.1")
            self.held.append((await self._get("/process", "10.4.0.1")).json())
            await asyncio.sleep(0.5)

    async def _restart(self) -> None:
        """Redis dies, is away for a moment or none, and is started again, empty."""
        await asyncio.to_thread(self.server.kill)
        self._era += 1
        await asyncio.sleep(self.chance.choice((0.0, 0.1, 0.5)))
        await asyncio.to_thread(self.server.launch)
        self._era += 1
        began = time.monotonic()
        self._decided = asyncio.get_running_loop().create_future()
        control = asyncio.create_task(self._half_a_second_later())
        for client in count():
            await self._get("/open", f"10.3.{client // 250}.{client % 250}")
            if self._decided.done():
                break
            await asyncio.sleep(0.01)
        decided_at = self._decided.result()
        self.recoveries.append(decided_at - began)
        if control.done() or self.recoveries[-1] > 0.5:
            self.late += decided_at > await control
        control.cancel()

    async def _half_a_second_later(self) -> float:
        """When a request is answered that is sent then."""
        await asyncio.sleep(0.5)
        return float((await self._get("/process", "10.4.0.1")).headers["x-at"])

    def over(self) -> dict[str, Counter[str]]:
        """Clients whom Redis, or the process beside it, has admitted more than the quota."""
        return {client: by for client, by in self.admitted.items() if max(by.values()) > QUOTA}

    def growth(self) -> float:
        """The memory of the last quarter against that of the second, 1.0 for no change."""
        quarter = len(self.held) // 4
        first, last = self.held[quarter : 2 * quarter], self.held[-quarter:]
        return _median(last, "resident") / _median(first, "resident")

    def figures(self) -> str:
        """One line."""
        first, last = self.held[0], self.held[-1]
        return (
            f"{sum(self.statuses.values())} requests, by status {dict(sorted(self.statuses.items()))}, "
            f"{len(self.recoveries)} restarts, recovered within {statistics.median(self.recoveries):.3f} s at the "
            f"median and {max(self.recoveries):.3f} s at most, {self.late} late; "
            f"{first['resident'] >> 20} to {last['resident'] >> 20} MiB, {first['tasks']} to {last['tasks']} tasks, "
            f"{first['files']} to {last['files']} files"
        )


def _median(held: list[dict[str, int]], name: str) -> float:
    return statistics.median(each[name] for each in held)
