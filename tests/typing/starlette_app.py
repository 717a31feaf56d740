"""A Starlette app with rules, callables, per-route limits and the decision about a request."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import redis.asyncio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from redis_asgi import (
    ConfigurationError,
    Decision,
    PolicyState,
    RateLimiter,
    RateLimitExceeded,
    RateLimitMiddleware,
    RedisManager,
    RequestDecision,
    Rule,
    Settings,
    by_header,
    by_json,
    by_mcp_tool,
    by_user,
    client_ip,
    health_app,
    metrics_app,
    rate_limit,
    redis_operation,
    status_app,
    tokens,
)

PLANS = {"free": "10/minute", "paid": "1000/minute"}


def plan(conn: HTTPConnection) -> str | None:
    return PLANS.get(conn.headers.get("x-plan", "free"))


async def tenant(conn: HTTPConnection) -> str | None:
    return conn.headers.get("x-tenant")


async def price(request: Request) -> int:
    body = await request.json()
    return len(str(body))


def refused(conn: HTTPConnection, decision: Decision) -> Response:
    waits: list[float | None] = [state.retry_after for state in decision.policies]
    return JSONResponse({"path": conn.url.path, "waits": waits, "until": decision.retry_after}, status_code=429)


def is_internal(conn: HTTPConnection) -> bool:
    return conn.headers.get("x-internal") == "yes"


@rate_limit("5/minute", partition_by=by_header("x-api-key"))
def report(request: Request) -> PlainTextResponse:
    return PlainTextResponse("expensive")


@rate_limit(plan, name="stream", cost=2, strategy="gcra")
async def stream(websocket: WebSocket) -> None:
    await websocket.accept()


async def generate(request: Request) -> JSONResponse:
    limit: RequestDecision = request.state.rate_limit
    limit.charge(120, "tokens")
    was_reset: bool = await limit.reset("login")
    left: dict[str, int] = {state.name: state.remaining for state in limit.policies}
    first: PolicyState | None = next(iter(limit.policies), None)
    return JSONResponse({"left": left, "reset": was_reset, "first": first.name if first else None})


async def direct(request: Request) -> Response:
    limiter = RateLimiter(strategy="moving-window", on_redis_error="closed", timeout=0.1)
    decision = await limiter.consume("tenant-7", "20/second; 1000/hour", cost=3, name="jobs")
    if not decision.allowed:
        raise RateLimitExceeded("tenant-7", 20, 1, decision=decision)
    allowed: bool = await limiter.check_rate_limit("tenant-7", limit=100, window=60)
    return PlainTextResponse(str(allowed), status_code=200 if decision.source == "redis" else 203)


@redis_operation
async def ping(client: redis.asyncio.Redis) -> str:
    return str(client)


manager = RedisManager(Settings(REDIS_URL="memory://", RATE_LIMITS="100/minute"))


@asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncGenerator[None]:
    yield
    await manager.close()


app = Starlette(
    routes=[
        Route("/report", report),
        Route("/generate", generate, methods=["POST"]),
        Route("/direct", direct),
        WebSocketRoute("/stream", stream),
        Mount("/health", health_app(require_redis=True)),
        Mount("/metrics", metrics_app(authorize=is_internal)),
        Mount("/status", status_app(redis=manager)),
    ],
    middleware=[
        Middleware(
            RateLimitMiddleware,
            rules=[
                Rule("100/minute", name="all", partition_by=client_ip),
                Rule(plan, name="plan", partition_by=tenant, paths="/api/*"),
                Rule("60/minute", name="model", partition_by=[tenant, by_json("model", {"gpt-5*": "large"})]),
                Rule("60/minute", name="tool", partition_by=(by_user, by_mcp_tool(["search"], other=None))),
                Rule("5/minute", name="login", paths=["/login"], methods="POST", count_if=lambda status: status == 401),
                Rule("1000/hour", name="tokens", partition_by=by_user, cost=price, shadow=True),
                Rule("1000/hour", name="budget", cost=tokens(weights={"output": 4})),
                Rule("1000/hour", name="guess", cost=tokens(lambda request: len(request.headers))),
            ],
            exempt=is_internal,
            on_exceeded=refused,
            headers="both",
            dialect={"/v1/messages": "anthropic", "/v1/*": "openai", "/mcp": "mcp"},
            redis=manager,
        )
    ],
    lifespan=lifespan,
)
wrapped = RateLimitMiddleware(app, "20/second; 1000/hour", redis="redis://localhost:6379", on_redis_error="open")
speaking = RateLimitMiddleware(app, "60/minute", dialect="openai")


def refuse_bad_settings() -> Settings | None:
    try:
        return Settings(RATE_LIMITS="often")
    except ConfigurationError:
        return None
