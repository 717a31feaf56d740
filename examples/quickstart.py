"""Five requests a minute for each client address: the smallest app with a rate limit.

::

    python examples/quickstart.py
    curl -i http://127.0.0.1:8000/

It counts in the Redis that the ``REDIS_*`` variables name,
and in this process when none of them is set.
"""

import os

import uvicorn
from fastapi import FastAPI

from redis_asgi import RateLimitMiddleware, Settings


def choose_settings() -> Settings:
    """Read the environment, or choose ``memory://`` when it names no Redis."""
    settings = Settings()
    if settings.names_redis:
        return settings
    print("No REDIS_* variable names a server: counting in memory://, state that belongs to this process.", flush=True)
    return Settings(REDIS_URL="memory://")


app = FastAPI()
app.add_middleware(RateLimitMiddleware, limits="5/minute", settings=choose_settings())


@app.get("/")
async def hello() -> dict[str, str]:
    """Answer anybody, at most five times a minute."""
    return {"hello": "world"}


if __name__ == "__main__":
    # uvicorn believes X-Forwarded-For from 127.0.0.1 unless told otherwise;
    # behind_a_proxy.py has the rest.
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
