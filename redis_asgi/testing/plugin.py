"""The pytest plugin: its fixtures, and a new start of what the process keeps before each test.

It is installed as a module of its own, ``_redis_asgi_pytest``: pytest imports its plugins in every
project of an environment, before coverage is measured and before it knows which warnings are
errors. So here is only what costs nothing until a test asks for it, and the package is touched only
once the tests themselves have imported it.
"""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from redis_asgi.testing import RateLimitClock


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before the fixtures of a test, which may ask the app already."""
    if "redis_asgi.connection" in sys.modules:
        from redis_asgi.testing import start_anew

        start_anew()


@pytest.fixture
def rate_limit_clock() -> "Iterator[RateLimitClock]":
    """The clock of all rate limits, which stands still until ``rate_limit_clock.advance(61)``."""
    from redis_asgi.testing import held_clock

    with held_clock() as clock:
        yield clock


@pytest.fixture
def rate_limits_off() -> Iterator[None]:
    """No request is refused by a rate limit, nothing is counted, and Redis is not asked for it."""
    from redis_asgi.testing import limits_off

    with limits_off():
        yield


@pytest.fixture
def embedding_calls() -> "Iterator[list[list[Any]]]":
    """The inputs of each call that the app below the embedding cache has got: what was really
    computed.
    """
    from redis_asgi.testing import recorded_embedding_calls

    with recorded_embedding_calls() as calls:
        yield calls
