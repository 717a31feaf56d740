"""`redis_operation`: a user's own functions, whose Redis errors are logged by kind."""

import functools
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, TypeVar, overload

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from ..errors import classify
from ..events import say, words_for

logger = logging.getLogger("redis_asgi.connection")
P = ParamSpec("P")
R = TypeVar("R")


@overload
def redis_operation(function: Callable[P, Awaitable[R]], /) -> Callable[P, Awaitable[R]]: ...
@overload
def redis_operation() -> Callable[[Callable[P, Awaitable[R]]], Callable[P, Awaitable[R]]]: ...
def redis_operation(function: Callable[..., Any] | None = None, /) -> Callable[..., Any]:
    """Log a Redis error of an ``async def`` function by kind and re-raise it; with or without
    parentheses.

    ``redis_asgi.connection_failed`` when Redis was not reached, ``redis_asgi.operation_failed`` for
    any other ``RedisError``; the operation's name is in the record's ``operation``.

    Raises:
        TypeError: At decoration, if *function* is not an ``async def`` function.
    """
    if function is None:
        return redis_operation
    if not inspect.iscoroutinefunction(function):
        raise TypeError(f"redis_operation needs an 'async def' function, not {function!r}.")
    name = function.__qualname__

    @functools.wraps(function)
    async def logged(*args: Any, **kwargs: Any) -> Any:
        try:
            return await function(*args, **kwargs)
        except RedisConnectionError as error:
            say(logger, "connection_failed", operation=name, error=type(error).__name__, **words_for(classify(error)))
            raise
        except RedisError as error:
            say(logger, "operation_failed", operation=name, error=type(error).__name__, **words_for(classify(error)))
            raise

    return logged
