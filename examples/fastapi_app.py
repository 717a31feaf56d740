"""A FastAPI app with paying customers: plans for API keys, limits on routes and routers, costs.

::

    python examples/fastapi_app.py
    curl -i -H 'X-API-Key: bob' http://127.0.0.1:8000/                # plan "free": 5 a minute
    curl -i -H 'X-API-Key: ada' http://127.0.0.1:8000/                # plan "pro": 50 a minute, 10,000 a day
    curl -i -H 'X-API-Key: ada' -d '{"input": ["a", "b"]}' http://127.0.0.1:8000/embed    # 2 texts of 10
    curl -i -H 'X-API-Key: ada' http://127.0.0.1:8000/story           # 2 a minute; charged by its words
"""

import os

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.requests import HTTPConnection

from redis_asgi import RateLimit, RateLimitMiddleware, Rule, Settings, by_header, client_ip

SETTINGS = Settings() if Settings().names_redis else Settings(REDIS_URL="memory://")

PLANS = {"free": "5/minute", "pro": "50/minute; 10000/day"}
CUSTOMERS = {"ada": "pro", "bob": "free"}  # a table of yours; the callable below may be async
by_key = by_header("x-api-key")


def plan_of(conn: HTTPConnection) -> str | None:
    """Look up the limits of a customer; ``None``, for a stranger, is "not limited by this rule"."""
    plan = CUSTOMERS.get(conn.headers.get("x-api-key", ""))
    return PLANS[plan] if plan else None


async def texts(request: Request) -> int:
    """Count the texts in a body, which the app still receives; no JSON costs the whole quota."""
    body = await request.json()
    given = body.get("input") if isinstance(body, dict) else None
    return len(given) if isinstance(given, list) else 1


RULES = [
    Rule(plan_of, name="plan", partition_by=by_key),
    Rule("10/minute", name="texts", paths="/embed", methods="POST", partition_by=by_key, cost=texts),
    Rule("100/minute", name="words", paths="/story", partition_by=by_key),
    # A key is only what a client says: without this rule, one that invents keys is never limited.
    Rule("60/minute", name="address", partition_by=client_ip),
]
app = FastAPI()
app.add_middleware(RateLimitMiddleware, rules=RULES, settings=SETTINGS)
# The whole router shares the counter "archive"; without a name each route would have its own.
archive = APIRouter(prefix="/archive", dependencies=[Depends(RateLimit("3/minute", name="archive"))])


@app.get("/")
async def home() -> dict[str, str]:
    return {"hello": "customer"}


@app.post("/embed")
async def embed(request: Request) -> dict[str, int]:
    return {"bytes": len(await request.body())}


@app.get("/story", dependencies=[Depends(RateLimit("2/minute", partition_by=by_key))])
async def story(request: Request) -> str:
    request.state.rate_limit.charge(7, policy="words")  # eight words, of which one was charged on arrival
    return "Once upon a time there was a quota."


@archive.get("/{volume}")
async def read_archive(volume: int) -> dict[str, int]:
    return {"volume": volume}


app.include_router(archive)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
