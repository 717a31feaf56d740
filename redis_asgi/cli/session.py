"""A command's frame: settings, a manager that closes, and trouble told in a line with an exit code."""

import asyncio
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, cast

import typer

from ..connection.manager import RedisManager
from ..errors import ConfigurationError
from ..inspection.servers import leave, servers_of
from ..inspection.trouble import TROUBLE, explain
from ..maintenance import MaintenanceError
from ..settings import NO_SERVER, Settings
from . import output

T = TypeVar("T")

FAILED, MISUSED, WARNED, INTERRUPTED = 1, 2, 3, 130
# The file that was named before the command.
ENV_FILE: ContextVar[Path | None] = ContextVar("env_file", default=None)


def settings_for(url: str | None, **more: Any) -> Settings:
    """The environment's settings, or those of another server:
    then nothing that says where the configured one is.
    """
    if url is not None:
        more |= {**NO_SERVER, "REDIS_URL": url, "EMBEDDING_CACHE_REDIS_URL": None}
    return Settings(_env_file=ENV_FILE.get(), **more)


def refuse_memory(settings: Settings, *, vectors: bool = False) -> None:
    """Nothing of ``memory://`` can be seen from here.

    Args:
        vectors: Whether it is about where vectors are kept.

    Raises:
        ConfigurationError: Says so.
    """
    own = settings.EMBEDDING_CACHE_REDIS_URL if vectors else None
    in_memory = own.get_secret_value().startswith("memory:") if own is not None else settings.is_memory
    if in_memory:
        name = "REDIS_URL" if own is None else "EMBEDDING_CACHE_REDIS_URL"
        raise ConfigurationError(
            f"{name}='memory://' keeps everything in the app's process: there is nothing outside to look at. "
            "Set it to the app's Redis, or pass --url."
        )


def some_server(settings: Settings) -> None:
    """Refuse settings that name no server at all, neither for counters nor for vectors.

    Raises:
        ConfigurationError: Says so.
    """
    if not servers_of(settings):
        refuse_memory(settings)


def alone(context: typer.Context) -> None:
    """Refuse more arguments than one, without repeating what may be parts of a credential.

    Raises:
        ConfigurationError: Says so.
    """
    if context.args:
        raise ConfigurationError("One CLIENT only. Quote a value with blanks, or pass - and give it on standard input.")


def read(value: str, what: str) -> str:
    """*value*, or for ``-`` the first line of standard input, without its end."""
    if value != "-":
        return value
    if sys.stdin.isatty():
        return cast("str", typer.prompt(what, hide_input=True, err=True))
    return sys.stdin.readline().rstrip("\r\n")


@contextmanager
def complaints() -> Iterator[None]:
    """An argument or a setting that cannot work ends the command with one line and exit code 2."""
    try:
        yield
    except ValueError as error:
        output.error(str(error))
        raise typer.Exit(MISUSED) from None


class _Failed(Exception):
    """Redis, or the way to it, is at fault; the text says what to do."""


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[RedisManager]:
    """A manager of *settings*, closed at the end; trouble inside becomes words."""
    manager = RedisManager(settings)
    async with talking_to(manager):
        yield manager


@asynccontextmanager
async def talking_to(manager: RedisManager) -> AsyncIterator[None]:
    """The same for a manager of an app's."""
    try:
        yield
    except TROUBLE as error:
        trouble = await explain(error, manager.settings)
        raise _Failed(f"{trouble.text}. {trouble.fix}") from None
    finally:
        await leave(manager)


async def greet(manager: RedisManager) -> None:
    """Let trouble with the server be told as that: what follows would only say that it failed."""
    await (await manager.get_connection()).ping()


async def _interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Await *work*; an interrupt ends it,
    although Python 3.11 loses one that meets `asyncio.wait_for`'s end.
    """
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=0.5)
        raise


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run *work* and return its result; trouble with Redis exits with 1, an interrupt with 130."""
    try:
        return asyncio.run(_interruptible(work))
    except (ConfigurationError, UnicodeError) as error:
        output.error(str(error))
        raise typer.Exit(MISUSED) from None
    except (_Failed, MaintenanceError) as error:
        output.error(str(error))
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
