"""The time that tests leave Redis and this process, whose subject is no deadline.

The package's own deadlines are short, and a busy machine keeps none of them. A test about a
deadline names its own, in the settings or the argument that has one, or asks for those of the
package by the fixture ``shipped_deadlines``.
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest

from redis_asgi import RateLimiter, RedisManager
from redis_asgi.connection import health_cache
from redis_asgi.connection.health_check import Checkup

PATIENCE = 20.0  # seconds
# The settings that are deadlines of requests.
PATIENT: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("RATE_LIMIT_TIMEOUT", "EMBEDDING_CACHE_TIMEOUT"), f"{PATIENCE:g}")
)
_CALM = 20  # turns of the loop


def be_patient(patch: pytest.MonkeyPatch) -> None:
    """Let whatever is given no deadline have `PATIENCE`: limiters,
    middlewares, caches and health checks.
    """
    for name, value in PATIENT.items():
        patch.setenv(name, value)
    for takes, option in ((RateLimiter, "timeout"), (Checkup, "deadline")):
        patch.setitem(inspect.unwrap(takes.__init__).__kwdefaults__, option, PATIENCE)
    patch.setattr(health_cache, "DEADLINE", PATIENCE)


async def until(truth: Callable[[], object]) -> None:
    """Let the loop run until *truth* holds;
    seconds of `fair_time` say whether that was soon enough.

    Raises:
        TimeoutError: It does not come true.
    """
    async with asyncio.timeout(PATIENCE):
        while not truth():
            await asyncio.sleep(0.001)


async def until_calm(is_busy: Callable[[], object]) -> None:
    """Let the loop run until nothing is busy, nor becomes so by what goes on in this process.

    Raises:
        TimeoutError: Something still is.
    """
    calm = 0
    async with asyncio.timeout(PATIENCE):
        while calm < _CALM:
            await asyncio.sleep(0)
            calm = 0 if is_busy() else calm + 1


async def quiet(manager: RedisManager) -> None:
    """Let the loop run until Redis has answered all that was asked,
    and whoever waits does so for the test.
    """
    await until_calm(lambda: getattr(manager.pool, "_in_use_connections", None))


async def leave_unread(connection: Any, *command: str) -> None:
    """Send *command* and wait for its reply, which is left to whoever uses the connection next."""
    await connection.send_command(*command)
    async with asyncio.timeout(PATIENCE):
        while not await connection.can_read():
            await asyncio.sleep(0.001)
