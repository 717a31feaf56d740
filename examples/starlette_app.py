"""A Starlette app: rules for paths and methods, limits on single endpoints, WebSockets, CORS.

::

    python examples/starlette_app.py
    curl -i http://127.0.0.1:8000/                       # counted by "all"
    curl -i -X POST http://127.0.0.1:8000/login          # counted by "all" and "login"; the fourth is refused
    curl -i http://127.0.0.1:8000/report                 # counted by "all" and its own limit: two a minute
    curl -i http://127.0.0.1:8000/search                 # costs five units of ten: the third is refused
"""

import os

import uvicorn
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from redis_asgi import RateLimitMiddleware, Rule, Settings, rate_limit

SETTINGS = Settings() if Settings().names_redis else Settings(REDIS_URL="memory://")


async def home(request: Request) -> Response:
    """Show how the client stands: the decision is in ``request.state``."""
    (policy,) = request.state.rate_limit.policies
    return JSONResponse({"policy": policy.name, "remaining": policy.remaining})


async def login(request: Request) -> Response:
    """Refuse every password; the rule ``login`` counts the attempts."""
    return JSONResponse({"error": "wrong password"}, status_code=401)


@rate_limit("2/minute")
def report(request: Request) -> Response:
    """Work in a thread, as Starlette runs every sync endpoint, and at most twice a minute."""
    return PlainTextResponse("quarterly figures\n")


@rate_limit("10/minute", cost=5)
async def search(request: Request) -> Response:
    """Cost five units of ten: the third search in a minute is refused."""
    return JSONResponse({"found": []})


@rate_limit("2/minute")
async def echo(websocket: WebSocket) -> None:
    """Limit handshakes, before accept; what is said afterwards is not counted."""
    await websocket.accept()
    await websocket.send_text(await websocket.receive_text())
    await websocket.close()


app = Starlette(
    routes=[
        Route("/", home),
        Route("/login", login, methods=["POST"]),
        Route("/report", report),
        Route("/search", search),
        WebSocketRoute("/echo", echo),
    ]
)
RULES = [Rule("1000/hour", name="all"), Rule("3/minute", name="login", paths="/login", methods="POST")]
app.add_middleware(RateLimitMiddleware, rules=RULES, settings=SETTINGS)
# Added last, so it is outermost: a 429 gets its CORS headers too, or a browser would hide it from
# the script. And a script may read only those fields of an answer that are exposed.
EXPOSED = ["RateLimit", "RateLimit-Policy", "Retry-After"]
app.add_middleware(CORSMiddleware, allow_origins=["https://example.com"], expose_headers=EXPOSED)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
