"""Fixtures of the embedding cache's tests, over those that all tests share."""

import uuid

import pytest

from redis_asgi import Settings

from ..conftest import StartServer
from ..kit.servers import Server


@pytest.fixture
def own_server(private_server: StartServer) -> Server:
    """A server that a test may stop, fill or kill."""
    return private_server()


@pytest.fixture(params=["redis", "memory"])
def any_settings(request: pytest.FixtureRequest) -> Settings:
    """Settings on a real server and on ``memory://``."""
    if request.param == "memory":
        # Equal settings share a manager and so its vectors; a test wants its own.
        return Settings(REDIS_URL="memory://", REDIS_KEY_PREFIX=f"{uuid.uuid4().hex}:")
    return Settings(REDIS_URL=request.getfixturevalue("redis_url"))
