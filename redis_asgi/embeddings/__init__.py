"""The embedding cache: `EmbeddingCache` for ids, `EmbeddingCacheMiddleware` for whole endpoints.

The doors lie here; imports point from each line to those below it.

``middleware``   an app's endpoints, cached; ``cache``: vectors by ids; ``overview``: what is in force
``exchange``     one request, from its head to its last byte; ``shared``: what all requests of a middleware share
``calls``        the calls of the app that a request makes or joins (``app_flight``); ``assembly``: its own answer
``answers/``     what is said: the ``outcome``, to header, state, metrics and span at once, and bodies
``origin/``      who computes: the app, asked once for concurrent requests, its answer read
``requests/``    what is asked: a head and a body become inputs, each under its key (``keyspace``)
``storage/``     who keeps: this process (``l1``), one Redis, a cluster; ``lookup``: what of it a request finds
``wire/``        the JSON of each API
``records/``     what is kept, as values: vectors, leases, their keys and epochs
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .answers.result import EmbeddingCacheResult
    from .cache import EmbeddingCache
    from .middleware import EmbeddingCacheMiddleware

__all__ = ["EmbeddingCache", "EmbeddingCacheMiddleware", "EmbeddingCacheResult"]

_MODULES = {
    "EmbeddingCache": "cache",
    "EmbeddingCacheMiddleware": "middleware",
    "EmbeddingCacheResult": "answers.result",
}


def __getattr__(name: str) -> Any:
    # At first use: numpy takes 150 ms to import,
    # which an app without embeddings should not wait for.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    return found
