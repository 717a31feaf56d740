"""Health of a Redis that is well, who needs Redis, and the manners of the app."""

import asyncio
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import fakeredis
import pytest
import redis.asyncio as aioredis
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp

from redis_asgi import (
    ConfigurationError,
    RateLimitMiddleware,
    RedisManager,
    Settings,
    check_redis_health,
    health_app,
)
from redis_asgi.asgi.sub_app import SubApp
from redis_asgi.errors import Failure
from redis_asgi.sub_apps.health import human_bytes

from ..kit.documents import section
from ..kit.patience import PATIENCE
from ..kit.proxy import FaultProxy
from ..kit.servers import ExternalServer
from .probes import DEADLINE, NOWHERE, StartServer, app_manager, app_on, client_of, forget, probe

pytestmark = pytest.mark.anyio


FIELDS = [
    "status",
    "error",
    "breaker",
    "mode",
    "latency_ms",
    "connected_clients",
    "used_memory",
    "last_save_time",
]


async def test_overview_says_how_redis_is(redis_server: ExternalServer) -> None:
    """Every field, in the units promised, when all is well."""
    status, body, _ = await probe(app_on(redis_server.url), "/")
    said = redis_server.client().info()

    assert (200, FIELDS) == (status, list(body))
    assert ("healthy", None, "closed", "standalone") == tuple(body[name] for name in FIELDS[:4])
    assert 0 < body["latency_ms"] < 500
    assert body["connected_clients"] == said["connected_clients"]
    assert re.fullmatch(r"\d+(\.\d\d)?[BKMG]", body["used_memory"])
    assert body["last_save_time"].endswith("Z")
    saved = datetime.fromisoformat(body["last_save_time"])
    assert saved == datetime.fromtimestamp(said["rdb_last_save_time"], UTC)
    assert timedelta(0) <= datetime.now(UTC) - saved < timedelta(days=1)


async def test_used_memory_is_what_redis_calls_it(redis_server: ExternalServer) -> None:
    """The human form is Redis's own."""
    said = redis_server.client().info("memory")

    assert said["used_memory_human"] == human_bytes(said["used_memory"])
    assert ["0B", "1023B", "1.00K", "1.50M", "2048.00T"] == [human_bytes(n) for n in (0, 1023, 1024, 1572864, 2**51)]


async def test_ready_says_no_more_than_it_must(redis_url: str) -> None:
    """A status, and the code of what is wrong."""
    assert (200, {"status": "healthy", "error": None}) == (await probe(app_on(redis_url)))[:2]


async def test_memory_is_healthy() -> None:
    """``memory://`` has nothing that could be gone."""
    status, body, _ = await probe(app_on("memory://", require_redis=True), "/")

    assert (200, "healthy", "memory") == (status, body["status"], body["mode"])
    assert [None] * 5 == [body[name] for name in ("error", *FIELDS[4:])]


@pytest.mark.parametrize("options", [{}, {"decode_responses": True}, {"protocol": 3, "decode_responses": True}])
async def test_a_users_client_is_used_in_any_form(redis_url: str, options: dict[str, Any]) -> None:
    """Decoding, RESP3 and retries of a given client make no difference, and it is left open."""
    async with aioredis.Redis.from_url(redis_url, **options) as client:
        checked = await check_redis_health(client)
        status, body, _ = await probe(health_app(redis=client), "/")

        assert await client.ping()
    assert ("healthy", "healthy", 200) == (checked["status"], body["status"], status)
    assert None not in (checked["connected_clients"], checked["used_memory"], checked["last_save_time"])


async def test_fake_server_without_info_is_healthy() -> None:
    """Where INFO is not known, PING decides and the rest is null."""
    async with fakeredis.FakeAsyncRedis() as client:
        checked = await check_redis_health(client)

    assert ("healthy", None, None) == (checked["status"], checked["error"], checked["used_memory"])
    assert checked["latency_ms"] is not None


async def test_forbidden_info_is_null(private_server: StartServer) -> None:
    """A user who may only PING: healthy, without details."""
    server = private_server()
    server.add_user("someuser", ">somesecret", "+ping")
    status, body, _ = await probe(app_on(server.url.replace("//", "//someuser:somesecret@")), "/")

    assert (200, "healthy", None) == (status, body["status"], body["error"])
    assert [None] * 3 == [body[name] for name in FIELDS[5:]]
    assert body["latency_ms"] is not None


@pytest.mark.usefixtures("shipped_deadlines")
async def test_slow_info_is_null(private_server: StartServer) -> None:
    """PING has been answered and INFO has not by the deadline: healthy, in time, without details."""
    server = private_server()
    async with FaultProxy(server.host, server.port) as proxy:
        # The first reply comes, and all that follow it on this connection are kept back.
        app = app_on(proxy.url)
        checkup_replies = 0
        write = proxy._write

        async def first_line_only(writer: asyncio.StreamWriter, data: bytes) -> None:
            nonlocal checkup_replies
            if data.startswith(b"+PONG"):
                checkup_replies += 1
                data = data[:7]
            await write(writer, data)

        proxy._write = first_line_only  # type: ignore[method-assign]  # a fault that nothing else needs
        status, body, seconds = await probe(app, "/")

    assert (1, 200, "healthy", None) == (checkup_replies, status, body["status"], body["used_memory"])
    assert seconds < DEADLINE + 0.4


# the breaker, and who needs Redis


async def test_open_breaker_is_degraded(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis answers, the limits do not ask it yet: degraded, and unhealthy where it is required."""
    monkeypatch.setattr(RedisManager, "breaker_state", "open")
    for required, expected in ((False, (200, "degraded")), (True, (503, "unhealthy"))):
        status, body, _ = await probe(app_on(redis_url, require_redis=required), "/")

        assert (*expected, "breaker_open", "open") == (status, body["status"], body["error"], body["breaker"])
    monkeypatch.setattr(RedisManager, "breaker_state", "half_open")
    assert "healthy" == (await probe(app_on(redis_url)))[1]["status"]


async def test_failing_closed_requires_redis() -> None:
    """Without an argument, Redis is required as soon as a part on the manager fails closed,
    whichever is made first.
    """
    app = app_on(NOWHERE)
    assert (200, "degraded") == ((found := await probe(app))[0], found[1]["status"])
    RateLimitMiddleware(app, on_redis_error="closed", redis=app_manager(app))
    assert (503, "unhealthy") == ((found := await probe(app))[0], found[1]["status"])
    optional = health_app(redis=app_manager(app), require_redis=False)
    assert (200, "degraded") == ((found := await probe(optional))[0], found[1]["status"])


@pytest.mark.usefixtures("shipped_deadlines")
async def test_app_with_a_hung_redis(private_server: StartServer) -> None:
    """An app whose breaker has opened under load tells so, is alive,
    and is well again soon after Redis is.
    """
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url))
    app = Starlette()
    app.mount("/health", health_app(redis=manager))
    app.add_middleware(RateLimitMiddleware, limits="1000/minute", redis=manager)
    server.pause()
    try:
        async with client_of(app) as client:
            while manager.breaker_state != "open":
                await asyncio.gather(*(client.get("/") for _ in range(5)))
        live, _, fast = await probe(app, "/health/live")
        status, body, seconds = await probe(app, "/health/")
    finally:
        server.resume()

    assert (200, 200, "degraded", "redis_timeout", "open") == (live, status, *(body[name] for name in FIELDS[:3]))
    assert fast < 0.1
    assert seconds < DEADLINE + 0.4
    async with asyncio.timeout(PATIENCE), client_of(app) as client:
        while (await probe(app, "/health/"))[1]["error"] is not None:
            await client.get("/")
            await asyncio.sleep(0.05)
    await manager.close()


def _in_starlette(app: SubApp) -> ASGIApp:
    outer = Starlette()
    outer.mount("/health", app)
    return outer


def _in_fastapi(app: SubApp) -> ASGIApp:
    outer = FastAPI()
    outer.mount("/health", app)
    return outer


@pytest.mark.parametrize("wrap", [_in_starlette, _in_fastapi])
async def test_documented_urls(wrap: Callable[[SubApp], ASGIApp]) -> None:
    """``/health/live``, ``/health/ready``, ``/health/``;
    anything else below is 404, any other method 405.
    """
    outer = wrap(app_on("memory://"))
    async with client_of(outer) as client:
        answers = [await client.get(f"/health{path}") for path in ("/live", "/ready", "/", "/nothing")]
        posted = await client.post("/health/ready")
        head = await client.head("/health/")

    assert [200, 200, 200, 404] == [answer.status_code for answer in answers]
    assert {"no-store"} == {answer.headers["cache-control"] for answer in [*answers, posted, head]}
    assert (405, "GET, HEAD", 200, b"") == (posted.status_code, posted.headers["allow"], head.status_code, head.content)


async def test_authorize_guards_what_can_be_read() -> None:
    """``/`` and ``/ready`` ask; ``/live`` answers anybody, since a restart would help nobody."""

    def operator(connection: HTTPConnection) -> bool:
        return connection.headers.get("x-token") == "good"

    app = health_app(settings=Settings(REDIS_URL="memory://"), authorize=operator)
    async with client_of(app) as client:
        strangers = [(await client.get(path)).status_code for path in ("/", "/ready", "/live")]
        operators = [(await client.get(path, headers={"x-token": "good"})).status_code for path in ("/", "/ready")]

    assert [403, 403, 200] == strangers
    assert [200, 200] == operators


async def test_what_authorize_raises_is_the_apps() -> None:
    """An exception reaches the app's error handling."""

    def ask(_connection: HTTPConnection) -> bool:
        raise HTTPException(401, headers={"WWW-Authenticate": "Bearer"})

    async with client_of(_in_starlette(health_app(settings=Settings(REDIS_URL="memory://"), authorize=ask))) as client:
        assert 401 == (await client.get("/health/")).status_code


async def test_a_manager_is_asked_as_its_client_is(redis_url: str) -> None:
    """Wherever a client is taken, a manager is."""
    manager = RedisManager(Settings(REDIS_URL=redis_url))
    assert "healthy" == (await check_redis_health(manager))["status"]
    await manager.close()


def test_sync_client_is_refused(redis_server: ExternalServer) -> None:
    """What would block the loop is told at construction."""
    with pytest.raises(ConfigurationError, match="synchronous"):
        health_app(redis=redis_server.client())  # type: ignore[arg-type]  # what is tested


# the guide

GUIDE = section("## Health checks")


async def test_guide_shows_what_is_answered(private_server: StartServer) -> None:
    """The two answers side by side are those with Redis and without, but for the numbers."""
    (block,) = re.findall(r"^\$ curl -s localhost:8000/health/ .*?^```$", GUIDE, re.MULTILINE | re.DOTALL)
    middle = block.splitlines()[0].rindex("$ curl")
    lines = block.splitlines()[1:-1]
    shown = [json.loads("".join(line[part] for line in lines)) for part in (slice(middle), slice(middle, None))]
    server = private_server()
    app = app_on(server.url)
    well = (await probe(app, "/"))[1]
    server.kill()
    forget(app)
    gone = (await probe(app, "/"))[1]

    for told, really in zip(shown, (well, gone), strict=True):
        assert list(really) == list(told)
        for name, value in told.items():
            assert type(really[name]) is type(value), name
            assert value == really[name] or name in FIELDS[4:], name


async def test_guide_names_urls_and_codes_that_exist() -> None:
    """Probes in the manifest lead to pages, and every code named is one of a failure."""
    paths = re.findall(r"httpGet: \{path: ([^,]+), port: 8000\}", section("## Kubernetes"))
    async with client_of(_in_starlette(app_on("memory://"))) as client:
        assert [200, 200] == [(await client.get(path)).status_code for path in paths]
    codes = set(re.findall(r"`redis_(\w+)`", re.findall(r"^`error` is a code: .*$", GUIDE, re.MULTILINE)[0]))

    assert codes < set(Failure)
    assert {"timeout", "connection", "auth", "permission", "readonly", "loading", "busy", "cluster"} <= codes
