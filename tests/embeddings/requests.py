"""Requests for embeddings, sent to an app."""

from typing import Any

import httpx
from starlette.types import ASGIApp

from ..kit.embedding_apps import client


def body(*items: Any, **fields: Any) -> dict[str, Any]:
    """An OpenAI request."""
    return {"model": "m", "input": list(items), **fields}


async def ask(app: ASGIApp, *items: Any, path: str = "/v1/embeddings", **headers: str) -> httpx.Response:
    """One request."""
    async with client(app, **headers) as c:
        return await c.post(path, json=body(*items))


async def post_bytes(app: ASGIApp, body: bytes, **headers: str) -> httpx.Response:
    """One request of these bytes."""
    async with client(app) as c:
        return await c.post("/v1/embeddings", content=body, headers={"content-type": "application/json", **headers})
