"""Concurrency limits over real processes, watched by an observer that is no part of the package."""

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import redis

from ..conftest import StartServer
from ..kit.processes import clean_environment
from ..kit.servers import free_port, wait_until

pytestmark = [pytest.mark.anyio, pytest.mark.server, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
PLACES = 4
SECONDS = 5.0  # of load
LEASE = 30.0  # seconds


@dataclass
class Worker:
    """A process that serves the app."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def serving(redis_url: str, observer_url: str) -> Iterator[Worker]:
    """One worker on a port of its own."""
    port = free_port()
    environment = clean_environment(
        REDIS_URL=redis_url, RATE_LIMIT_TIMEOUT="10", OBSERVER_URL=observer_url, OBSERVED_PLACES=str(PLACES)
    )
    command = [sys.executable, "-m", "uvicorn", "--factory", "tests.ratelimit.observed:served", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--log-level", "warning", "--no-access-log"], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: _answers(port), "the app answers")
        yield Worker(f"http://127.0.0.1:{port}/", process)
    finally:
        process.terminate()
        process.wait(timeout=20)


def _answers(port: int) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/nowhere", headers={"x-key": "first"}, timeout=2).status_code == 404
    return False


async def _client(urls: list[str], rng: random.Random, until: float, statuses: Counter[int]) -> None:
    """Ask for short streams, one after the other; some are left, and what is refused asks again."""
    async with httpx.AsyncClient(timeout=30, headers={"x-key": "k"}) as client:
        while time.monotonic() < until:
            url = f"{rng.choice(urls)}?seconds={rng.uniform(0.0, 0.05)}"
            async with client.stream("GET", url) as response:
                statuses[response.status_code] += 1
                async for _ in response.aiter_bytes():
                    if response.status_code == 200 and rng.random() < 0.25:
                        break
            if response.status_code == 429:
                await asyncio.sleep(0.03)


async def _admitted(client: httpx.AsyncClient, url: str) -> httpx.Response:
    """The answer's start, once a refusal that the worker remembers (0.1 s at most) is forgotten:
    sooner than a heartbeat would give back a place that was lost.
    """
    async with asyncio.timeout(5):
        while True:
            response = await client.send(client.build_request("GET", url), stream=True)
            if response.status_code == 200:
                return response
            await response.aclose()
            await asyncio.sleep(0.05)


async def test_an_outside_observer_never_sees_more(
    private_server: StartServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four processes and one key: never more than its places, whatever is left or refused.

    One of them is killed while it holds all of them: they are free when their leases have ended.
    """
    limiting, observing = private_server(), private_server()
    outside = observing.client()
    rng = random.Random(11)
    with ExitStack() as stack:
        workers = [stack.enter_context(serving(limiting.url, observing.url)) for _ in range(4)]
        urls = [worker.url for worker in workers]
        statuses: Counter[int] = Counter()
        until = time.monotonic() + SECONDS
        clients = [asyncio.create_task(_client(urls, rng, until, statuses)) for _ in range(30)]
        while time.monotonic() < until:
            await asyncio.sleep(0.1)
            limiting.client().script_flush()
        await asyncio.gather(*clients)
        seen = _seen(outside)
        # Nothing is left of all that, those included who went.
        async with asyncio.timeout(15):
            while _held(limiting.client()):
                await asyncio.sleep(0.1)

        doomed = workers[0]
        async with httpx.AsyncClient(timeout=60, headers={"x-key": "k"}) as client:
            bodies: list[AsyncIterator[bytes]] = []
            for _ in range(PLACES):
                response = await _admitted(client, f"{doomed.url}?seconds=600")
                bodies.append(response.aiter_bytes())  # kept: one that is gone closes its connection
                await anext(bodies[-1])
            before = (await client.get(f"{urls[1]}?seconds=0")).status_code
            doomed.process.send_signal(signal.SIGKILL)
            doomed.process.wait()
            killed = time.monotonic()
            while (status := (await client.get(f"{urls[1]}?seconds=0")).status_code) != 200:
                assert status == 429
                assert time.monotonic() < killed + LEASE + 10
                await asyncio.sleep(0.25)
            back = time.monotonic() - killed
    with capsys.disabled():
        begun, refused = seen["begun"], statuses[429]
        print(f"\n{begun} streams begun, {refused} refused, at most {seen['most']} at once; back after {back:.1f} s")

    assert {200, 429} == set(statuses)
    assert seen["begun"] >= 20
    assert 1 < seen["most"] <= PLACES
    assert 0 == sum(number for process, number in seen.items() if process not in ("most", "begun"))
    assert 429 == before


def _seen(outside: "redis.Redis") -> dict[str, int]:
    return {name.decode(): int(number) for name, number in outside.hgetall("seen:k").items()}  # type: ignore[union-attr]


def _held(limiting: "redis.Redis") -> int:
    return sum(int(limiting.zcard(key)) for key in limiting.scan_iter("rate_limit:*:c0:1"))
