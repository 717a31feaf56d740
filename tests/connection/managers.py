"""Managers that are closed after use, and their connections."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from redis_asgi import RedisManager, Settings
from redis_asgi.connection.client_factory import Client

SECRET = "s3cr3t-of-a-test"


async def ask(client: Client, *command: Any) -> Any:
    """Run one command."""
    execute: Callable[..., Awaitable[Any]] = client.execute_command
    return await execute(*command)


@asynccontextmanager
async def managed(**values: Any) -> AsyncIterator[RedisManager]:
    """A manager for these settings, closed at the end."""
    manager = RedisManager(Settings(**values))
    try:
        yield manager
    finally:
        await manager.close()


@asynccontextmanager
async def all_connections(manager: RedisManager, count: int) -> AsyncIterator[None]:
    """Hold *count* connections of the pool."""
    await manager.get_connection()
    pool: Any = manager.pool
    assert pool is not None
    held = [await pool.get_connection() for _ in range(count)]
    try:
        yield
    finally:
        for connection in held:
            await pool.release(connection)
