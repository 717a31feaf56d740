"""The apps that are measured: one Starlette endpoint, bare and behind each rate limiter.

``python -m tests.benchmarks.apps NAME PORT REDIS_URL`` serves one of them with one uvicorn worker.
All of them count by the client's address under a quota that is never reached, unless they say
otherwise.
"""

import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import uvicorn
from redis.asyncio import Redis
from redis.exceptions import NoScriptError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from redis_asgi import RateLimitMiddleware, Rule, Settings, by_header

QUOTA = 1_000_000_000
NEVER = f"{QUOTA}/minute"
THREE = f"{QUOTA}/second; {QUOTA}/minute; {QUOTA}/hour"
SERVICE_PATH = "/api/items"
SERVICE_RULES = (
    Rule(NEVER, name="all"),
    Rule(NEVER, name="api", paths="/api/*", partition_by=by_header("x-api-key")),
    Rule(NEVER, name="login", paths="/login", methods="POST"),
)
COUNT = """
local count = redis.call('INCR', KEYS[1])
if count == 1 then redis.call('EXPIRE', KEYS[1], 60) end
return count
"""


async def hello(_: Request) -> PlainTextResponse:
    """The endpoint of every Starlette app."""
    return PlainTextResponse("Hello, world!")


def bare(_: str) -> ASGIApp:
    """No limiter."""
    return Starlette(routes=[Route("/", hello)])


def service_app(_: str) -> ASGIApp:
    """Three pages, as the rules of a service want them."""
    login = Route("/login", hello, methods=["POST"])
    return Starlette(routes=[Route("/", hello), Route(SERVICE_PATH, hello), login])


class Admit:
    """The least that a pure-ASGI limiter is: a question before the app, 429 when the answer is no.

    Args:
        admits: Told the client's address, says whether its request is admitted.
    """

    def __init__(self, app: ASGIApp, admits: Callable[[str], Awaitable[bool]]) -> None:
        self.app = app
        self.admits = admits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or await self.admits(scope["client"][0]):
            await self.app(scope, receive, send)
        else:
            await PlainTextResponse("Too Many Requests", status_code=429)(scope, receive, send)


def noop(url: str) -> ASGIApp:
    """A pure-ASGI middleware that passes everything through."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)

    app = bare(url)
    return middleware


def _limited(
    url: str, prefix: str, limits: str | None = NEVER, build: Callable[[str], ASGIApp] = bare, **options: Any
) -> ASGIApp:
    settings = Settings(REDIS_URL=url, REDIS_KEY_PREFIX=f"{prefix}:")
    return RateLimitMiddleware(build(url), limits, settings=settings, **options)


def evalsha(url: str) -> ASGIApp:
    """One plain EVALSHA per request through redis-py: the least an unshared check can cost."""
    client = Redis.from_url(url)
    digest = ""

    async def admits(address: str) -> bool:
        nonlocal digest
        try:
            count = await client.evalsha(digest, 1, f"evalsha:{address}")
        except NoScriptError:
            digest = await client.script_load(COUNT)
            count = await client.evalsha(digest, 1, f"evalsha:{address}")
        return int(count) <= QUOTA

    return Admit(bare(url), admits)


def limits_aio(url: str) -> ASGIApp:
    """`limits.aio`, fixed window; its default client, coredis, does not start within an ASGI app."""
    from limits import parse
    from limits.aio.strategies import FixedWindowRateLimiter
    from limits.storage import storage_from_string

    storage: Any = storage_from_string(f"async+{url}", implementation="redispy")
    strategy = FixedWindowRateLimiter(storage)
    item = parse(NEVER)

    async def admits(address: str) -> bool:
        return await strategy.hit(item, address)

    return Admit(bare(url), admits)


def throttled_py(url: str) -> ASGIApp:
    """throttled-py, fixed window."""
    from throttled.asyncio import RedisStore, Throttled, per_min

    throttle = Throttled(using="fixed_window", quota=per_min(QUOTA), store=RedisStore(server=url))

    async def admits(address: str) -> bool:
        return not (await throttle.limit(address)).limited

    return Admit(bare(url), admits)


def slowapi(url: str) -> ASGIApp:
    """Slowapi's ``SlowAPIMiddleware``; it speaks to Redis synchronously."""
    from slowapi import Limiter, _rate_limit_exceeded_handler
    from slowapi.errors import RateLimitExceeded
    from slowapi.middleware import SlowAPIMiddleware
    from slowapi.util import get_remote_address

    app = Starlette(routes=[Route("/", hello)])
    app.state.limiter = Limiter(key_func=get_remote_address, default_limits=[NEVER], storage_uri=url)
    refuse: Any = _rate_limit_exceeded_handler  # Starlette's type asks for a handler of any exception
    app.add_exception_handler(RateLimitExceeded, refuse)
    app.add_middleware(SlowAPIMiddleware)
    return app


def asgi_ratelimit(url: str) -> ASGIApp:
    """asgi-ratelimit's middleware on its Redis backend."""
    from ratelimit import RateLimitMiddleware as AsgiRateLimit
    from ratelimit import Rule
    from ratelimit.backends.redis import RedisBackend

    async def authenticate(scope: Scope) -> tuple[str, str]:
        return scope["client"][0], "default"

    limited: ASGIApp = AsgiRateLimit(
        bare(url), authenticate, RedisBackend(Redis.from_url(url)), {r"^/": [Rule(minute=QUOTA)]}
    )
    return limited


def _fastapi(dependencies: list[Any]) -> ASGIApp:
    from fastapi import FastAPI, Response

    app = FastAPI()

    @app.get("/", dependencies=dependencies)
    async def _hello() -> Response:
        return PlainTextResponse("Hello, world!")

    return app


def fastapi_limiter(url: str) -> ASGIApp:
    """fastapi-limiter's dependency; one bucket per client,
    since clients of one bucket share its quota.
    """
    from fastapi import Depends
    from fastapi_limiter.depends import RateLimiter
    from fastapi_limiter.identifier import default_identifier
    from pyrate_limiter import BucketFactory, Duration, Limiter, Rate, RateItem, RedisBucket

    client = Redis.from_url(url)
    rates = [Rate(QUOTA, Duration.MINUTE)]

    class BucketPerClient(BucketFactory):
        def __init__(self) -> None:
            self.buckets: dict[str, RedisBucket] = {}

        def wrap_item(self, name: str, weight: int = 1) -> RateItem:
            return RateItem(name, time.time_ns() // 1_000_000, weight)

        async def get(self, item: RateItem) -> RedisBucket:
            bucket = self.buckets.get(item.name)
            if bucket is None:
                bucket = await RedisBucket.init(rates, client, f"fastapi-limiter:{item.name}")
                self.buckets[item.name] = bucket
                self.schedule_leak(bucket)
            return bucket

    return _fastapi([Depends(RateLimiter(Limiter(BucketPerClient()), identifier=default_identifier))])


@dataclass(frozen=True, slots=True)
class App:
    """One row of the table: how its app is built, and what there is to know about it."""

    title: str
    build: Callable[[str], ASGIApp]
    needs: str | None = None  # a module that may not be installed
    refuses: bool = False
    redis_is_dead: bool = False  # it is given a closed port
    path: str = "/"


APPS = {
    "bare": App("bare Starlette", bare),
    "noop": App("no-op pure ASGI", noop),
    "redis_asgi": App("redis_asgi", lambda url: _limited(url, "one")),
    "three": App("redis_asgi, three limits", lambda url: _limited(url, "three", THREE)),
    "service": App(
        "redis_asgi, a service's three rules",
        lambda url: _limited(url, "service", None, service_app, rules=SERVICE_RULES),
        path=SERVICE_PATH,
    ),
    "header": App("redis_asgi, by API key", lambda url: _limited(url, "header", partition_by=by_header("x-api-key"))),
    "refused": App("redis_asgi, refusing", lambda url: _limited(url, "refused", "1/hour"), refuses=True),
    "memory": App("redis_asgi, memory://", lambda _: _limited("memory://", "memory")),
    "dead": App("redis_asgi, Redis dead", lambda url: _limited(url, "dead"), redis_is_dead=True),
    "evalsha": App("one EVALSHA each", evalsha),
    "limits.aio": App("limits.aio", limits_aio, "limits.aio"),
    "throttled-py": App("throttled-py", throttled_py, "throttled"),
    "asgi-ratelimit": App("asgi-ratelimit", asgi_ratelimit, "ratelimit"),
    "slowapi": App("slowapi", slowapi, "slowapi"),
    "fastapi": App("bare FastAPI", lambda _: _fastapi([]), "fastapi"),
    "fastapi-limiter": App("fastapi-limiter on FastAPI", fastapi_limiter, "fastapi_limiter"),
}


def is_installed(app: App) -> bool:
    """Whether what *app* measures can be imported."""
    return app.needs is None or find_spec(app.needs) is not None


if __name__ == "__main__":
    name, port, redis_url = sys.argv[1:]
    uvicorn.run(APPS[name].build(redis_url), host="127.0.0.1", port=int(port), access_log=False, log_level="warning")
