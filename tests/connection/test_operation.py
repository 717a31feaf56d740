"""`redis_operation`: errors of Redis are logged by kind and raised again."""

import inspect
import logging
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from redis.exceptions import (
    AuthenticationError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from redis_asgi import redis_operation

from ..kit.logs import event_of

pytestmark = pytest.mark.anyio


def _errors(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int, str, str]]:
    return [
        (event_of(r), r.levelno, vars(r)["operation"], vars(r)["error"])
        for r in caplog.records
        if r.name.startswith("redis_asgi")
    ]


@pytest.mark.parametrize(
    ("error", "event"),
    [
        pytest.param(RedisConnectionError("x"), "redis_asgi.connection_failed", id="connection"),
        pytest.param(AuthenticationError("x"), "redis_asgi.connection_failed", id="authentication"),
        pytest.param(ResponseError("x"), "redis_asgi.operation_failed", id="reply"),
        pytest.param(RedisTimeoutError("x"), "redis_asgi.operation_failed", id="timeout"),
    ],
)
async def test_operation_logs_redis_errors_by_kind_and_reraises(
    caplog: pytest.LogCaptureFixture, error: Exception, event: str
) -> None:
    """The error that was raised comes out as it was; one line says which kind and which operation."""

    @redis_operation
    async def fetch() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        await fetch()

    assert error is caught.value
    assert [(event, logging.ERROR, fetch.__qualname__, type(error).__name__)] == _errors(caplog)


async def test_operation_leaves_other_errors_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Errors that are not of Redis are none of its business."""

    @redis_operation
    async def fetch() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await fetch()

    assert [] == _errors(caplog)


async def test_operation_keeps_signature_and_metadata() -> None:
    """A decorated function looks and behaves like the function; parentheses make no difference."""

    async def fetch(key: str, *, default: int = 3) -> tuple[str, int]:
        """Fetch."""
        return key, default

    for decorated in (redis_operation(fetch), redis_operation()(fetch)):
        plain: Any = decorated
        assert ("x", 3) == await decorated("x")
        assert ("y", 4) == await decorated("y", default=4)
        assert inspect.signature(fetch) == inspect.signature(decorated)
        assert ("fetch", "Fetch.") == (plain.__name__, plain.__doc__)
        assert plain.__wrapped__ is fetch
        assert inspect.iscoroutinefunction(decorated)


def test_operation_refuses_what_is_not_async_def() -> None:
    """Only ``async def`` functions can be waited for; anything else fails when it is decorated."""

    def plain() -> None: ...

    async def generator() -> AsyncIterator[int]:
        yield 1

    class CallableObject:
        async def __call__(self) -> None: ...

    for unfit in (plain, generator, CallableObject(), CallableObject, lambda: None, 3):
        with pytest.raises(TypeError, match="async def"):
            redis_operation(cast("Any", unfit))
        with pytest.raises(TypeError, match="async def"):
            redis_operation()(cast("Any", unfit))
