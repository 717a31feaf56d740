"""A service that streams what no model has written, for tests that need real processes.

``uvicorn --factory tests.ratelimit.chatting:served`` serves it. A request says how long its answer
is: ``tokens`` events (or fewer, of ``at_once`` each), one each ``pause`` seconds, and then the
usage; the environment says the budget.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from redis_asgi import RateLimitMiddleware, Rule, by_header, tokens

WINDOW = 3600


async def _events(asked: Any) -> AsyncIterator[bytes]:
    for n in range(0, asked["tokens"], asked.get("at_once", 1)):
        yield b"data: " + json.dumps({"choices": [{"delta": {"content": f"w{n}"}}]}).encode() + b"\n\n"
        await asyncio.sleep(asked["pause"])
    said = {"prompt_tokens": 0, "completion_tokens": asked["tokens"]}
    yield b"data: " + json.dumps({"choices": [], "usage": said}).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


async def _chat(request: Request) -> StreamingResponse:
    return StreamingResponse(_events(await request.json()), media_type="text/event-stream")


def rules() -> list[Rule]:
    """The budget of each key."""
    strategy: Any = os.environ.get("CHATTING_STRATEGY", "fixed-window")
    limits = f"{os.environ['CHATTING_QUOTA']}/{WINDOW} seconds"
    return [Rule(limits, name="tokens", partition_by=by_header("x-key"), cost=tokens(), strategy=strategy)]


def served() -> ASGIApp:
    """The service, configured by the environment."""
    return RateLimitMiddleware(Starlette(routes=[Route("/", _chat, methods=["POST"])]), rules=rules())
