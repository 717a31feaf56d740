"""The embedding cache: `EmbeddingCache` for ids, `EmbeddingCacheMiddleware` for whole endpoints."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import EmbeddingCache
    from .middleware import EmbeddingCacheMiddleware
    from .result import EmbeddingCacheResult

__all__ = ["EmbeddingCache", "EmbeddingCacheMiddleware", "EmbeddingCacheResult"]

_MODULES = {
    "EmbeddingCache": "cache",
    "EmbeddingCacheMiddleware": "middleware",
    "EmbeddingCacheResult": "result",
}


def __getattr__(name: str) -> Any:
    # At first use: numpy takes 150 ms to import, which an app without embeddings should not wait for.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    return found
