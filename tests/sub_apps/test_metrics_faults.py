"""Scrapes while Redis is not well, and how they end."""

import asyncio
import time
from typing import Any

import pytest
import redis.asyncio as aioredis

from redis_asgi import (
    RedisManager,
    RedisMetrics,
    Settings,
    health_app,
    metrics_app,
    status_app,
)
from redis_asgi.telemetry import Telemetry

from ..kit.fair_time import fair_time
from ..kit.servers import ExternalServer, wait_until
from .probes import DEADLINE
from .scrapes import StartServer, samples, scraped

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("counted")]


async def test_many_scrapes_are_one_question(private_server: StartServer) -> None:
    """However many ask at once or within a second,
    health checks and the status page too, Redis is asked once.
    """
    redis_server = private_server()
    manager = RedisManager(Settings(REDIS_URL=redis_server.url))
    apps = [metrics_app(redis=manager), health_app(redis=manager), status_app(redis=manager)]
    pages = [(apps[0], "/"), (apps[0], "/json"), (apps[1], "/"), (apps[1], "/ready"), (apps[2], "/")]
    redis_server.client().config_resetstat()
    answers = await asyncio.gather(*(scraped(app, path) for app, path in pages * 20))

    assert {200} == {answer.status_code for answer in answers}
    assert 1 == redis_server.calls("ping")
    assert 2 == redis_server.calls("info")  # ours, and the one that asks
    assert 1 == len(redis_server.connections())
    await manager.close()
    wait_until(lambda: redis_server.connections() == [], "no connection is left")


async def test_scrape_needs_no_free_connection(redis_server: ExternalServer) -> None:
    """A pool in which nothing is free is what one wants to see then."""
    manager = RedisManager(Settings(REDIS_URL=redis_server.url, REDIS_POOL_SIZE=1))
    client = await manager.get_connection()
    assert isinstance(client, aioredis.Redis)
    held = await client.connection_pool.get_connection()
    try:
        began = fair_time()
        now = await samples(metrics_app(redis=manager))
        assert fair_time() - began < 5  # REDIS_TIMEOUT is 10
    finally:
        await client.connection_pool.release(held)

    assert 1 == now["redis_up"]
    assert now['redis_pool_connections{state="in_use"}'] == now['redis_pool_connections{state="max"}'] == 1


@pytest.mark.usefixtures("shipped_deadlines")
async def test_scrape_of_a_hung_redis_is_answered_in_time(private_server: StartServer, counted: Telemetry) -> None:
    """Once a second it waits for the deadline, else it is told at once;
    what we counted is there, and the reason.
    """
    server = private_server()
    app = metrics_app(redis=server.url)
    counted.cache_saved_tokens.inc(7)
    server.pause()
    try:
        waits = []
        for _ in range(2):
            began, fairly = time.monotonic(), fair_time()
            now = await samples(app)
            waits.append((time.monotonic() - began, fair_time() - fairly))
    finally:
        server.resume()

    assert 0 == now["redis_up"]
    assert 7 == now["cache_saved_tokens_total"]
    (wall, fair), (_, again) = waits
    assert wall >= DEADLINE
    assert fair < DEADLINE + 0.4
    assert again < 0.2
    assert 1 == now['redis_commands_total{op="ping",outcome="timeout"}']


@pytest.mark.usefixtures("shipped_deadlines")
async def test_scraper_that_goes_away_takes_nothing_along(private_server: StartServer) -> None:
    """Who waits beside it still gets an answer."""
    server = private_server()
    app = metrics_app(redis=server.url)
    server.pause()
    try:
        one, other = (asyncio.create_task(scraped(app)) for _ in range(2))
        await asyncio.sleep(0.1)
        one.cancel()
        answer = await other
    finally:
        server.resume()

    assert one.cancelled()
    assert 200 == answer.status_code


async def test_closing_ends_a_question(private_server: StartServer) -> None:
    """A manager that is closed while Redis is asked neither waits for the answer nor leaves
    anything running.
    """
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url))
    server.pause()
    try:
        scrape = asyncio.create_task(samples(metrics_app(redis=manager)))
        await asyncio.sleep(0.1)
        began = fair_time()
        await manager.close()
        assert 0 == (await scrape)["redis_up"]
        assert fair_time() - began < DEADLINE / 2
    finally:
        server.resume()


async def test_client_that_cannot_be_built_is_shown_as_down() -> None:
    """As a host without an address, where the limits go on without Redis, too."""

    class Unbuildable(RedisManager):
        def _connect(self) -> Any:
            raise OSError("no address for secret-host")

    manager = Unbuildable(Settings())
    text = (await scraped(metrics_app(redis=manager))).text

    assert "redis_asgi_redis_up 0.0" in text
    assert "secret-host" not in text
    assert {} == await RedisMetrics(manager).collect_metrics()


async def test_dead_redis_is_shown_as_down() -> None:
    """With nothing of where it should be."""
    app = metrics_app(redis="redis://someone:secret@127.0.0.1:1")
    answer = await scraped(app)

    assert "redis_asgi_redis_up 0.0" in answer.text
    assert 'server="unknown"' in answer.text
    for word in ("someone", "secret", "127.0.0.1", "Error", "refused."):
        assert word not in answer.text


async def test_served_by_itself_it_closes_what_it_opened(redis_server: ExternalServer) -> None:
    """The manager's client, if it is the package's own; one of the user's stays open."""
    for redis_argument, is_open in ((redis_server.url, False), (RedisManager(Settings()), True)):
        app = metrics_app(redis=redis_argument)
        await app._target.own.get_connection()
        await app.aclose()
        assert is_open == (app._target.own.pool is not None)
