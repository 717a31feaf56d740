"""Fixtures of the tests beside it."""

from collections.abc import Iterator
from typing import cast

import pytest

from redis_asgi.connection import health_cache as watch_module
from redis_asgi.connection.health_check import Checkup
from redis_asgi.telemetry import Telemetry, fresh_telemetry


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks with all the time that a busy machine may take for what is well."""
    monkeypatch.setattr(watch_module, "DEADLINE", 10)
    monkeypatch.setitem(cast("dict[str, object]", Checkup.__init__.__kwdefaults__), "deadline", 10)


@pytest.fixture
def counted() -> Iterator[Telemetry]:
    """Counters of this test alone."""
    with fresh_telemetry() as mine:
        yield mine
