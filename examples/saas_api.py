"""A SaaS API: keys with plans, a login to protect, webhooks, behind a proxy, called by a web page.

Here 127.0.0.1 is the trusted proxy, so curl can play it (``-H 'X-Forwarded-For: 203.0.113.7'``)::

    python examples/saas_api.py
    curl -i -H 'X-API-Key: key-of-bob' http://127.0.0.1:8000/api/projects     # plan "free": 5 a minute
    curl -i --json '{"user": "ada", "password": "?"}' http://127.0.0.1:8000/login    # 3 wrong ones a minute
    curl -i --json '{}' http://127.0.0.1:8000/webhooks/payments               # never limited; not signed, so 401
"""

import hmac
import os
import secrets
from typing import Annotated

import uvicorn
from fastapi import Body, FastAPI, Header, HTTPException, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection

from redis_asgi import RateLimiter, RateLimitExceeded, RateLimitMiddleware, Rule, Settings, by_header, client_ip

WHERE = {} if Settings().names_redis else {"REDIS_URL": "memory://"}
SETTINGS = Settings(RATE_LIMIT_TRUSTED_PROXIES="127.0.0.1", **WHERE)  # yours, see behind_a_proxy.py
PLANS = {"free": "5/minute", "pro": "50/minute; 10000/day"}
KEYS = {"key-of-ada": ("ada", "pro"), "key-of-bob": ("bob", "free")}  # tables of yours
PASSWORDS = {"ada": b"lovelace", "bob": b"builder"}  # hashed, in yours
SECRET = os.environ.get("WEBHOOK_SECRET", secrets.token_hex()).encode()


def plan_of(conn: HTTPConnection) -> str | None:
    """Look up the limits of a key; ``None``, for an unknown one, is "not limited by this rule"."""
    known = KEYS.get(conn.headers.get("x-api-key", ""))
    return PLANS[known[1]] if known else None


RULES = [
    Rule(plan_of, name="plan", paths="/api/*", partition_by=by_header("x-api-key")),
    # Only wrong passwords count: of many who share an address each may log in.
    Rule("3/minute; 20/hour", name="login", paths="/login", methods="POST", count_if=lambda status: status == 401),
    Rule("60/minute", name="address", partition_by=client_ip),  # whoever guesses keys, or has none
]
app = FastAPI()
# A provider's calls come in bursts, and are signed: they are checked rather than counted.
app.add_middleware(RateLimitMiddleware, rules=RULES, exempt=["/webhooks/*"], settings=SETTINGS)
# Added last, so it is outermost: a 429 gets its CORS headers too, and a preflight costs nothing.
PAGES, FIELDS = ["https://app.example.com"], ["RateLimit", "RateLimit-Policy", "Retry-After"]
app.add_middleware(CORSMiddleware, allow_origins=PAGES, allow_headers=["X-API-Key"], expose_headers=FIELDS)
limiter = RateLimiter(settings=SETTINGS)


@app.get("/api/projects")
async def projects(x_api_key: Annotated[str, Header()] = "") -> list[str]:
    if x_api_key not in KEYS:
        raise HTTPException(401, "No such key.")
    return [f"a project of {KEYS[x_api_key][0]}"]


@app.post("/login")
async def login(user: Annotated[str, Body()], password: Annotated[str, Body()]) -> str:
    decision = await limiter.consume(user, "10/hour", name="account")  # guesses may come from many addresses
    if not decision.allowed:
        raise RateLimitExceeded("account", 10, 3600, decision=decision)
    if not hmac.compare_digest(PASSWORDS.get(user, secrets.token_bytes()), password.encode()):
        raise HTTPException(401, "Wrong user or password.")
    await limiter.reset(user, name="account")
    return f"Hello {user}"


@app.post("/webhooks/payments")
async def webhook(request: Request, x_signature: Annotated[str, Header()] = "") -> None:
    signature = hmac.new(SECRET, await request.body(), "sha256").hexdigest()
    if not hmac.compare_digest(signature.encode(), x_signature.encode()):
        raise HTTPException(401, "Not signed.")


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
