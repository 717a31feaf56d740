"""Budgets in tokens over real processes: workers that are killed,
and many streams at once against one budget.
"""

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from redis_asgi import RedisManager, Settings
from redis_asgi.inspection.quotas import look, partition_of

from ..conftest import StartServer
from ..kit.processes import ENDS_WITHIN, clean_environment
from ..kit.servers import free_port, wait_until

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).resolve().parents[2]
KEY = {"x-key": "k"}
STREAMS = 128


@dataclass
class Worker:
    """A process that serves the app."""

    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End it as an operating system does that has no memory left."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def serving(redis_url: str, quota: int, strategy: str = "fixed-window") -> Iterator[Worker]:
    """One worker on a port of its own."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", "tests.ratelimit.chatting:served", "--port", str(port)]
    environment = clean_environment(
        REDIS_URL=redis_url, RATE_LIMIT_TIMEOUT="5", CHATTING_QUOTA=str(quota), CHATTING_STRATEGY=strategy
    )
    process = subprocess.Popen(
        [*command, "--log-level", "warning", "--no-access-log"], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: _answers(port), "the app answers")
        yield Worker(f"http://127.0.0.1:{port}/", process)
    finally:
        process.terminate()
        process.wait(timeout=ENDS_WITHIN)


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/nowhere", timeout=2).status_code == 404
    except httpx.HTTPError:
        return False


async def used(redis_url: str) -> int:
    """What Redis has counted of the key."""
    settings = Settings(REDIS_URL=redis_url)
    manager = RedisManager(settings)
    standings = await look(manager, await partition_of("k", "header:x-key", settings), (), name="tokens")
    await manager.close()
    return sum(standing.used for standing in standings)


async def test_killed_worker_has_charged_what_it_sent(private_server: StartServer) -> None:
    """SIGKILL in the middle of a stream leaves the estimate,
    which is more than what was sent of the answer.
    """
    url = private_server().url
    with serving(url, 100_000) as worker:
        async with httpx.AsyncClient(timeout=20) as client:
            asked = {"tokens": 1000, "pause": 0.002, "max_tokens": 1000}
            async with client.stream("POST", worker.url, json=asked, headers=KEY) as response:
                events = 0
                async for line in response.aiter_lines():
                    events += line.startswith("data:")
                    if events == 100:
                        break
                worker.kill()
    assert await used(url) >= max(1000, events)


async def test_client_that_leaves_is_charged_what_was_sent(private_server: StartServer) -> None:
    """Under a real server, which neither raises nor says so:
    the estimate goes, and what was sent stays.
    """
    url = private_server().url
    with serving(url, 100_000) as worker:
        async with httpx.AsyncClient(timeout=20) as client:
            asked = {"tokens": 1000, "pause": 0.01, "max_tokens": 20_000}
            async with client.stream("POST", worker.url, json=asked, headers=KEY) as response:
                events = 0
                async for line in response.aiter_lines():
                    events += line.startswith("data:")
                    if events == 50:
                        break
            async with asyncio.timeout(10):
                while await used(url) > 5000:
                    await asyncio.sleep(0.1)

    assert events <= await used(url) < 1000


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fixed-window", "sliding-window-counter"])
async def test_many_streams_over_processes_use_one_budget(
    private_server: StartServer, strategy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """128 streams over three processes:
    what is used beyond the budget is no more than the estimates were too low.

    With ``max_tokens`` of eight times the median answer at least 80 % of the budget can be used.
    """
    quota, rng = 150_000, random.Random(7)
    url = private_server().url
    with ExitStack() as stack:
        workers = [stack.enter_context(serving(url, quota, strategy)) for _ in range(3)]
        if strategy == "sliding-window-counter":  # one bucket for all of it
            left = 3600 - time.time() % 3600
            if left < 60:
                await asyncio.sleep(left + 1)
        spent = await _spend([worker.url for worker in workers], rng)
        counted = await used(url)
    # An estimate is what nine of ten answers of its process had,
    # so less than eight of ten had only by chance.
    likely = sorted(spent)[len(spent) * 8 // 10]
    too_low = sum(sorted((max(0, tokens - likely) for tokens in spent), reverse=True)[:STREAMS])
    with capsys.disabled():
        print(
            f"\n{strategy}: {counted / quota:.1%} of the budget used; estimates in flight {too_low / quota:.1%} too low"
        )

    assert abs(counted - sum(spent)) < 0.01 * quota
    assert 0.8 * quota <= counted <= quota + too_low


async def _spend(urls: Sequence[str], rng: random.Random) -> list[int]:
    """Ask until nearly all is refused; how many tokens each answer had."""
    spent: list[int] = []
    refused = 0

    async def client_of(n: int) -> None:
        nonlocal refused
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            while refused < 6 * STREAMS:
                tokens = min(2000, max(1, int(rng.lognormvariate(5.5, 0.6))))
                asked = {"tokens": tokens, "at_once": 25, "pause": 0.05, "max_tokens": 2000}
                async with client.stream("POST", urls[n % len(urls)], json=asked, headers=KEY) as response:
                    if response.status_code == 429:
                        refused += 1
                        await response.aread()
                        await asyncio.sleep(0.2)
                        continue
                    assert [line async for line in response.aiter_lines()][-2] == "data: [DONE]"
                    spent.append(tokens)

    await asyncio.gather(*(client_of(n) for n in range(STREAMS)))
    return spent
