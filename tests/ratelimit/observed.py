"""A service whose streams are counted from outside: each tells a Redis when it begins and ends.

``uvicorn --factory tests.ratelimit.observed:served`` serves it, limited to as many streams of a key
at once as the environment says. What is told is a hash of its own for each key: how many run in
each process, and the most that ever did in all.
"""

import asyncio
import os
from collections.abc import AsyncIterator

import redis.asyncio as aioredis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from redis_asgi import RateLimitMiddleware, Rule, by_header

TELL = """
redis.call('HINCRBY', KEYS[1], ARGV[1], ARGV[2])
local sum, most = 0, tonumber(redis.call('HGET', KEYS[1], 'most') or '0')
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do if all[i] ~= 'most' and all[i] ~= 'begun' then sum = sum + all[i + 1] end end
if tonumber(ARGV[2]) > 0 then redis.call('HINCRBY', KEYS[1], 'begun', 1) end
redis.call('HSET', KEYS[1], 'most', math.max(sum, most))
"""


def served() -> ASGIApp:
    """The service, configured by the environment."""
    observer = aioredis.Redis.from_url(os.environ["OBSERVER_URL"])
    me = str(os.getpid())

    async def tell(key: str, change: int) -> None:
        await observer.eval(TELL, 1, f"seen:{key}", me, change)

    async def pieces(key: str, seconds: float) -> AsyncIterator[bytes]:
        await tell(key, 1)
        try:
            yield b"begun\n"
            await asyncio.sleep(seconds)
        finally:
            await asyncio.shield(tell(key, -1))
        yield b"over\n"

    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(pieces(request.headers["x-key"], float(request.query_params["seconds"])))

    rule = Rule(concurrency=int(os.environ["OBSERVED_PLACES"]), name="streams", partition_by=by_header("x-key"))
    return RateLimitMiddleware(Starlette(routes=[Route("/", stream)]), rules=[rule])
