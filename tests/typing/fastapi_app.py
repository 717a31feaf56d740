"""A FastAPI app: dependencies, the current limit as an argument,
documented limits, the embedding cache.
"""

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request
from numpy.typing import NDArray
from starlette.requests import HTTPConnection

from redis_asgi import (
    CurrentLimit,
    EmbeddingCache,
    EmbeddingCacheMiddleware,
    RateLimit,
    RateLimiter,
    RateLimitMiddleware,
    RequestDecision,
    Rule,
    by_header,
    check_redis_health,
    document_limits,
    health_app,
    rate_limit_responses,
)

app = FastAPI(dependencies=[Depends(RateLimit("1000/hour", name="all"))])
app.add_middleware(EmbeddingCacheMiddleware, namespace="bge-m3@5617a9f", ttl=600, share=False, lease="off")
app.add_middleware(
    RateLimitMiddleware,
    "20/second; 1000/hour",
    rules=[Rule("5/minute", name="login", paths="/login", methods=["POST"], on_redis_error="closed")],
    partition_by=by_header("x-api-key"),
    exempt=["/health/*"],
)
app.mount("/health", health_app())
archive = APIRouter(prefix="/archive", responses=rate_limit_responses(fails_closed=True, needs_identity=True))
login_limit = RateLimit("5/minute", partition_by=lambda conn: conn.headers.get("x-user"), cost=lambda conn: 1)


@app.post("/login")
async def login(_limited: Annotated[None, Depends(login_limit)], limit: CurrentLimit) -> dict[str, bool]:
    return {"reset": await limit.reset("login")}


@archive.get("/", responses=rate_limit_responses(headers="legacy"))
async def read(limit: CurrentLimit, request: Request) -> dict[str, int]:
    limit.charge(3)
    same: RequestDecision = request.state.rate_limit
    return {state.name: state.remaining for state in same.policies}


async def streams(conn: HTTPConnection) -> int | None:
    return 4 if conn.headers.get("x-plan") == "pro" else None


app.add_middleware(
    RateLimitMiddleware,
    rules=[Rule(concurrency=streams, name="streams"), Rule(concurrency=2, name="all", shadow=True)],
)


@app.get("/export")
async def export() -> int:
    async with RateLimiter("memory://").slot("client", 4, name="exports") as decision:
        held: bool = decision.allowed
        return sum(state.quota for state in decision.policies) if held else 0


@app.get("/vectors")
async def vectors() -> dict[str, list[float]]:
    cache = EmbeddingCache("memory://", 600, dtype="float16")
    found: dict[str, NDArray[np.float32]] = await cache.get_many(["a", "b"])
    one: NDArray[np.float32] | None = await cache.get_embedding("a")
    stored: bool = await cache.set_embedding("a", np.zeros(3, dtype=np.float32))
    computed = await cache.get_or_compute(["a"], lambda missing: [[float(len(each))] for each in missing])
    return {"shape": [float(each) for each in computed.shape], "found": [float(len(found)), float(stored)]} | (
        {} if one is None else {"one": one.tolist()}
    )


async def check(client: object) -> str:
    import redis.asyncio

    assert isinstance(client, redis.asyncio.Redis)
    return str((await check_redis_health(client))["status"])


app.include_router(archive)
document_limits(app)
