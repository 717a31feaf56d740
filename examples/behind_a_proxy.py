"""Clients behind a reverse proxy, told apart by the address that the proxy forwards.

Here 127.0.0.1 is the trusted proxy, so curl can play its part::

    python examples/behind_a_proxy.py
    curl -i -H 'X-Forwarded-For: 203.0.113.7' http://127.0.0.1:8000/             # counts 203.0.113.7
    curl -i -H 'X-Forwarded-For: 203.0.113.8' http://127.0.0.1:8000/             # another client
    curl -i -H 'X-Forwarded-For: 1.2.3.4, 203.0.113.7' http://127.0.0.1:8000/    # spoofed: the first again

A proxy appends the address it sees to what the client sent. So the header is read from the right:
the first address that is no proxy of ours is the client, and whatever it wrote to the left of that
says nothing. From a peer that is not trusted the header is not read at all.
"""

import os

import uvicorn
from fastapi import FastAPI, Request

from redis_asgi import RateLimitMiddleware, Settings

WHERE = {} if Settings().names_redis else {"REDIS_URL": "memory://"}
# In production: the variable RATE_LIMIT_TRUSTED_PROXIES,
# with your proxies' addresses and networks only.
SETTINGS = Settings(RATE_LIMIT_TRUSTED_PROXIES="127.0.0.1,10.0.0.0/8", **WHERE)


app = FastAPI()
app.add_middleware(RateLimitMiddleware, limits="2/minute", settings=SETTINGS)


@app.get("/")
async def who(request: Request) -> dict[str, int]:
    """Say how many requests the client, not the proxy, has left."""
    (policy,) = request.state.rate_limit.policies
    return {"remaining": policy.remaining}


if __name__ == "__main__":
    # Either uvicorn reads the header,
    # which it does for 127.0.0.1 unless told otherwise, or the middleware.
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
