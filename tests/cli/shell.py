"""The command line, run as a process and within one."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import anyio
from typer.testing import Result

import redis_asgi
from redis_asgi import RateLimiter, Settings

from ..kit.processes import ENDS_WITHIN, clean_environment, without_haste
from ..kit.servers import ExternalServer

PASSWORD = "s3cr3t-of-a-test"


CREDENTIAL = "sk-live-0123456789"


Run = subprocess.CompletedProcess[str]


def run(*arguments: str, env: Mapping[str, str] | None = None, text: str | None = None) -> Run:
    """``python -m redis_asgi`` in a process of its own, under ``-W error -X dev``."""
    command = [sys.executable, "-W", "error", "-X", "dev", "-m", "redis_asgi", *arguments]
    environment = clean_environment(**(env or {}))
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=ENDS_WITHIN, env=environment, check=False, input=text or ""
    )
    done.stderr = without_haste(done.stderr)
    return done


Invoke = Callable[..., Result]


def counted(server: ExternalServer, client: str, limits: str = "100/minute", **how: Any) -> None:
    """Count one request of *client*, by a limiter in a process of its own loop."""

    async def consume() -> None:
        manager = redis_asgi.RedisManager(Settings(REDIS_URL=server.url))
        decision = await RateLimiter(manager).consume(client, limits, **how)
        await manager.close()
        assert decision.source == "redis"

    anyio.run(consume)
