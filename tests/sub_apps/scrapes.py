"""Scrapes of the metrics, and workers to be scraped."""

import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import Counter, Histogram

from redis_asgi import (
    Settings,
)
from redis_asgi.errors import Failure
from redis_asgi.telemetry import Telemetry

from ..kit.processes import ENDS_WITHIN, clean_environment
from ..kit.servers import Server, free_port, wait_until

StartServer = Callable[..., Server]


MEMORY = Settings(REDIS_URL="memory://")


TLS = ssl.create_default_context()  # httpx would load the authorities for every request of its own


KEYS = ["hits", "misses", "hit_rate", "memory_used", "peak_memory", "clients", "operations"]


FAILURES = tuple(failure.value for failure in Failure)


BYPASSES: tuple[str, ...] = ("late-chunking", "multi-vector", "encoding", "not-json", "body-header", "no-store")


BYPASSES += ("response-no-store", "vary", "integers", "too-large", "busy", "redis-down", "not-understood", "replayed")


BYPASSES += (
    "item-lists",
    "unique-header",
    "partition",
    "other",
)  # a partition_by said None; a word of a wire format that is not ours


# Every value that a label may have; the names of policies come from the code of the app.
CLOSED_SETS: dict[tuple[str, str], tuple[str, ...]] = {
    ("ratelimit_requests", "outcome"): ("allowed", "refused", "exempt", "unavailable"),
    ("ratelimit_requests", "source"): ("redis", "memory", "local", "refusal_memory", "none"),
    ("ratelimit_policy", "outcome"): ("allowed", "refused", "shadow_refused"),
    ("ratelimit_estimate_error_units", "was"): ("too_high", "too_low"),
    ("ratelimit_fallback", "mode"): ("local", "open", "closed"),
    ("ratelimit_fallback", "reason"): FAILURES,
    ("ratelimit_check_duration_seconds", "source"): ("redis", "local", "none"),
    ("cache_requests", "result"): ("hit", "miss", "partial", "bypass", "stale", "error"),
    ("cache_bypass", "reason"): BYPASSES,
    ("cache_items", "result"): ("hit", "miss", "collapsed"),
    ("cache_rejected", "reason"): (
        "response-no-store",
        "vary",
        "integers",
        "unique-header",
        "not-understood",
        "status",
    ),
    ("redis_commands", "op"): ("check", "settle", "lookup", "store", "ping"),
    ("redis_commands", "outcome"): ("ok", *FAILURES),
    ("redis_command_duration_seconds", "op"): ("check", "settle", "lookup", "store", "ping"),
    ("breaker_transitions", "to"): ("closed", "half_open", "open"),
    ("redis_pool_connections", "state"): ("in_use", "idle", "max"),
}


def use_every_metric(counted: Telemetry) -> None:
    """Count something everywhere, with each value that a label may have."""
    for metric in vars(counted).values():
        if isinstance(metric, Counter | Histogram):
            name = next(iter(metric.describe())).name.removeprefix("redis_asgi_")
            children: list[Any] = [metric]
            if metric._labelnames:
                sets = [CLOSED_SETS.get((name, label), ("default",)) for label in metric._labelnames]
                width = max(map(len, sets))
                children = [metric.labels(*(values[i % len(values)] for values in sets)) for i in range(width)]
            for child in children:
                child.inc() if isinstance(metric, Counter) else child.observe(0.003)


def client_of(app: Any) -> httpx.AsyncClient:
    """An HTTP client in front of *app*."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def scraped(app: Any, path: str = "/", **headers: str) -> httpx.Response:
    """One answer of *app*."""
    async with client_of(app) as client:
        return await client.get(path, headers=headers)


async def samples(app: Any) -> dict[str, float]:
    """The series of a scrape, as ``name{label="value"}``, less the prefix."""
    text = (await scraped(app)).text
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name.removeprefix("redis_asgi_"): float(value) for name, _, value in lines}


@contextmanager
def workers(folder: Path, source: str, number: int, **environment: str) -> Iterator[str]:
    """The app in *source* with so many uvicorn workers that count together; its URL."""
    (folder / "counting.py").write_text(source)
    (folder / "counters").mkdir()
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "counting:app", "--app-dir", str(folder), "--port", str(port)]
    command += ["--workers", str(number), "--no-access-log"]
    environment = clean_environment(PROMETHEUS_MULTIPROC_DIR=str(folder / "counters"), **environment)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(f"{url}/metrics/"), "workers answer", within=30)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=ENDS_WITHIN)


def answers(url: str) -> bool:
    """Whether somebody answers with 200."""
    try:
        return httpx.get(url, trust_env=False, verify=TLS).status_code == 200
    except httpx.HTTPError:
        return False
