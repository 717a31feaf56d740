"""Metrics of several processes together."""

import os
import signal
from pathlib import Path

import httpx
import pytest

from ..kit.processes import run_python
from ..kit.servers import wait_until
from .scrapes import TLS, workers

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("counted")]


FILES = """
import asyncio, os, shutil, sys
from pathlib import Path
import httpx
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from redis_asgi import Settings, metrics_app
from redis_asgi.telemetry import telemetry

async def main():
    app = metrics_app(settings=Settings(REDIS_URL="memory://"))
    telemetry().cache_saved_tokens.inc(3)
    Counter("of_the_app", "Not ours to show.").inc()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        text = (await client.get("/")).text
        assert "redis_asgi_cache_saved_tokens_total 3.0" in text, text
        assert "redis_asgi_ratelimit_local_partitions 0.0" in text, text
        assert "of_the_app" not in text, text
        everything = CollectorRegistry()
        MultiProcessCollector(everything)
        theirs = generate_latest(everything).decode()
        assert "of_the_app_total 1.0" in theirs and "redis_asgi_cache_saved_tokens_total 3.0" in theirs, theirs
        new = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"], "counter_1.db")  # of a process that starts
        for size, status in ((0, 200), (65536, 200), (2, 503)):
            new.write_bytes(bytes(size))
            answer = await client.get("/")
            assert (status, status == 200) == (answer.status_code, "saved_tokens_total 3.0" in answer.text), size
        shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"])
        for path in ("/", "/json"):
            gone = await client.get(path)
            assert (503, {"error": "counters_unreadable"}) == (gone.status_code, gone.json())

asyncio.run(main())
"""


def test_files_are_read_and_missed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """We show ours, the app both; a file that a process has just made is none yet; without the
    files, or with one that is cut off, a scrape fails instead of starting again from zero.
    """
    folder = tmp_path_factory.mktemp("multiproc")
    # Without -X dev: prometheus-client leaves its files to the end of the process.
    done = run_python(FILES, flags=(), env={"PROMETHEUS_MULTIPROC_DIR": str(folder)})

    assert 0 == done.returncode, done.stderr
    assert "redis_asgi.metrics_unreadable" in done.stderr


def test_missing_folder_is_told_at_construction() -> None:
    """Not to the first scrape, and not to the first request."""
    script = """
from redis_asgi import ConfigurationError, Settings, metrics_app
try:
    metrics_app(settings=Settings(REDIS_URL="memory://"))
except ConfigurationError as error:
    print(error)
"""
    done = run_python(script, env={"PROMETHEUS_MULTIPROC_DIR": "/nonexistent/folder"})

    assert done.stdout.startswith("PROMETHEUS_MULTIPROC_DIR is not a directory"), done.stderr


WORKER = """
import os
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from redis_asgi import metrics_app
from redis_asgi.telemetry import telemetry

requests = telemetry().ratelimit_requests.labels("allowed", "redis")
checks = telemetry().ratelimit_check_duration.labels("redis")

async def count(request):
    requests.inc()
    checks.observe(0.002)
    return PlainTextResponse(str(os.getpid()))

app = Starlette(routes=[Route("/count", count), Mount("/metrics", metrics_app())])
"""


def lives(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def total(url: str, series: str) -> set[float]:
    """What some scrapes, each over a connection of its own and so by any worker, say of *series*."""
    found = set()
    for _ in range(6):
        text = httpx.get(f"{url}/metrics/", trust_env=False, verify=TLS).text
        found.add(float(next(line for line in text.splitlines() if line.startswith(series)).rpartition(" ")[2]))
    return found


def test_sums_over_workers_are_exact(tmp_path: Path, redis_url: str) -> None:
    """Whichever of three workers is scraped says what all have counted,
    also of one that has been replaced.
    """
    requests = 'redis_asgi_ratelimit_requests_total{outcome="allowed",source="redis"}'
    with workers(tmp_path, WORKER, 3, REDIS_URL=redis_url) as url:
        counted_by: list[int] = []

        def count_until(seen: int) -> None:
            # Which worker takes a connection is the kernel's choice.
            while len(set(counted_by)) < seen:
                assert len(counted_by) < 5_000
                counted_by.append(int(httpx.get(f"{url}/count", trust_env=False, verify=TLS).text))

        count_until(3)
        assert {float(len(counted_by))} == total(url, requests)
        assert {float(len(counted_by))} == total(url, "redis_asgi_ratelimit_check_duration_seconds_count")
        figures = httpx.get(f"{url}/metrics/json", trust_env=False, verify=TLS).json()
        assert len(counted_by) == figures["middleware"]["ratelimit"]["allowed"]

        os.kill(counted_by[0], signal.SIGTERM)
        # Until it is gone it may take a connection and drop it, counted or not.
        wait_until(lambda: not lives(counted_by[0]), "the worker ends", within=30)
        count_until(4)
        assert {float(len(counted_by))} == total(url, requests)
