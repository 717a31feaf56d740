"""Contexts by id, their embeddings kept in Redis: `EmbeddingCache` under ids of the service's own.

Rate limited; probes at ``/health/``, metrics at ``/metrics/``, a page for operators: ``/status/``.

::

    python examples/context_service.py
    curl -X PUT http://127.0.0.1:8000/contexts/greeting -H 'content-type: application/json' -d '{"text": "hello world"}'
    curl -i 'http://127.0.0.1:8000/contexts/greeting/similar?text=hello'

Vectors and counters are in the Redis that ``REDIS_*`` variables name, else in this process.
"""

import hashlib
import os
from typing import Annotated

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Query
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from redis_asgi import EmbeddingCache, RateLimitMiddleware, Settings, health_app, metrics_app, status_app

SETTINGS = Settings() if Settings().names_redis else Settings(REDIS_URL="memory://")
DIMS = 256
TEXTS: dict[str, str] = {}  # a table of yours

app = FastAPI(title="Contexts")
app.add_middleware(RateLimitMiddleware, limits="20/second; 1000/hour", settings=SETTINGS)
app.mount("/health", health_app(settings=SETTINGS))  # none of these is limited; give them authorize= where needed
app.mount("/metrics", metrics_app(settings=SETTINGS))
app.mount("/status", status_app(settings=SETTINGS))
cache = EmbeddingCache(ttl=24 * 3600, settings=SETTINGS)


def embed(texts: list[str]) -> NDArray[np.float32]:
    """Stands for a model: words hashed into unit vectors, ``(n, 256)``; sync: in a worker thread."""
    vectors = np.zeros((len(texts), DIMS), dtype=np.float32)
    for row, words in enumerate(text.lower().split() for text in texts):
        for word in words:
            vectors[row, int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") % DIMS] += 1
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1)
    return vectors


class Context(BaseModel):
    """A text to keep."""

    text: str = Field(min_length=1, max_length=10_000)


@app.put("/contexts/{context_id}", status_code=204)
async def put(context_id: str, context: Context) -> None:
    """Keep a text; its old embedding is forgotten, and the new one computed when it is needed."""
    TEXTS[context_id] = context.text
    await cache.delete_embedding(context_id)


@app.delete("/contexts/{context_id}", status_code=204)
async def delete(context_id: str) -> None:
    """Forget a text and its embedding."""
    TEXTS.pop(context_id, None)
    await cache.delete_embedding(context_id)


@app.get("/contexts/{context_id}/similar")
async def similar(context_id: str, text: Annotated[str, Query(min_length=1)]) -> float:
    """How alike a text and a context are, from 0 to 1."""
    if context_id not in TEXTS:
        raise HTTPException(404, "No such context.")
    [vector] = await cache.get_or_compute([context_id], lambda ids: embed([TEXTS[name] for name in ids]))
    return float(vector @ embed([text])[0])


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
