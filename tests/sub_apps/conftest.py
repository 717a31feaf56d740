"""Fixtures of the tests beside it."""

from collections.abc import Iterator

import pytest

from redis_asgi.telemetry import Telemetry, fresh_telemetry


@pytest.fixture
def counted() -> Iterator[Telemetry]:
    """Counters of this test alone."""
    with fresh_telemetry() as mine:
        yield mine
