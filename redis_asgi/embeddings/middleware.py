"""The middleware that makes an app's embedding endpoints cached, input by input."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Literal

from starlette.types import ASGIApp, Receive, Scope, Send

from ..asgi.offer import OFFER, Offer
from ..connection.lifespan import live
from ..connection.manager import RedisManager
from ..connection.redis_argument import RedisArgument
from ..errors import ConfigurationError
from ..event_loop import running_loop
from ..misuse import Uncalled, check_app, check_callable, check_flag, constructor_says_what_was_meant, only_called_as
from ..settings import Settings, check_settings
from .cache import EmbeddingCache
from .exchange import Exchange
from .overview import CacheInForce
from .records.options import Options, PartitionBy
from .requests.routes import read_routes
from .shared import Shared
from .storage.store import resolve_vectors
from .wire import WireFormat

_MAX_TTL = 366 * 24 * 3600
_MAX_LEASE = 86_400
_AROUND = "redis_asgi.embedding_caches"  # in a scope: the store and namespace of each that stands around the app
_SETTLES_WITHIN = 1.0  # seconds for computations and writes without a waiter when the app ends
_ADD = "A middleware is added as a class: write app.add_middleware(EmbeddingCacheMiddleware)."
_NO_DEPENDENCY = Uncalled(f"EmbeddingCacheMiddleware is no dependency. {_ADD}")


@constructor_says_what_was_meant("EmbeddingCacheMiddleware(app, namespace='bge-m3', routes={'/my/path': 'openai'})")
class EmbeddingCacheMiddleware:
    """Cache the embedding endpoints of the app it wraps; no change in the app or in its clients.

    Args:
        app: Any ASGI app.
        routes: Paths and the wire format each speaks, or its name: ``{"/my/path": "openai"}``;
            ``{model}`` stands for one segment. ``None`` = ``EMBEDDING_CACHE_ROUTES``.
        ttl: Seconds a vector is kept. ``None`` = ``EMBEDDING_CACHE_TTL``.
        namespace: In every key; set it to your model and its revision.
            ``None`` = ``EMBEDDING_CACHE_NAMESPACE``.
        share: Whether all credentials share their vectors. ``None`` = ``EMBEDDING_CACHE_SHARE``.
        lease: Seconds for which the app's own 2xx answer lets a credential have full hits; 0 =
            every request reaches the app; ``"off"`` = the cache stands inside the app's own
            authentication. ``None`` = ``EMBEDDING_CACHE_LEASE``.
        partition_by: Given one `HTTPConnection`, returns what separates tenants in the keys, in
            place of the credential; ``None`` from it lets the request pass through.
        redis: A `RedisManager`, a URL or a ``redis.asyncio`` client. ``None`` =
            ``EMBEDDING_CACHE_REDIS_URL``, else the client that all parts share.
        settings: ``None`` reads the environment now.

    Raises:
        ConfigurationError: When an argument or a setting cannot work.

    Under it, ``request.state.embedding_cache`` is an `EmbeddingCache`, and on an embedding endpoint
    ``request.state.embedding_cache_result`` says what was found. Of two around one app with one
    store and namespace, the outer one caches: a hit of the inner one would be stored as new, and
    its lease renewed, as if by the app.
    """

    def __init__(
        self,
        app: Annotated[ASGIApp, _NO_DEPENDENCY],
        *,
        routes: Mapping[str, WireFormat | str] | None = None,
        ttl: float | None = None,
        namespace: str | None = None,
        share: bool | None = None,
        lease: float | Literal["off"] | None = None,
        partition_by: PartitionBy | None = None,
        redis: RedisArgument = None,
        settings: Settings | None = None,
    ) -> None:
        check_app(app, "EmbeddingCacheMiddleware(app)")
        check_settings(settings)
        settings = settings if settings is not None else _settings_of(redis)
        if partition_by is not None:
            example = "partition_by=lambda conn: conn.headers.get('x-tenant')"
            check_callable("partition_by", partition_by, "conn", example)
        if share is not None:
            check_flag("share", share)
        manager, self._is_ours = resolve_vectors(redis, settings)
        options = Options(
            ttl=_seconds("ttl", ttl, settings.EMBEDDING_CACHE_TTL, 1, _MAX_TTL),
            namespace=_text("namespace", namespace, settings.EMBEDDING_CACHE_NAMESPACE),
            share=settings.EMBEDDING_CACHE_SHARE if share is None else share,
            lease=_lease(settings.EMBEDDING_CACHE_LEASE if lease is None else lease),
            partition_by=partition_by,
            settings=settings,
        )
        self.app = app
        self._has_loop = False
        self._routes = read_routes(routes, settings.EMBEDDING_CACHE_ROUTES)
        self._shared = Shared(app, manager, options)
        self._offer = Offer(manager)
        self._records = (manager, options.namespace)
        self._settings = settings
        self._cache = EmbeddingCache(manager, options.ttl, dtype=settings.EMBEDDING_CACHE_DTYPE, settings=settings)

    @only_called_as(_ADD)
    async def __call__(self, scope: Scope, receive: Annotated[Receive, _NO_DEPENDENCY], send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if not self._has_loop:
            running_loop()
            self._has_loop = True
        if scope["type"] in ("http", "websocket"):
            # In place: what stands outside of us reads the result from the same mapping.
            scope.setdefault("state", {})["embedding_cache"] = self._cache
            scope[OFFER] = self._offer.below(scope.get(OFFER))
        matched = self._routes.match(scope) if scope["type"] == "http" and scope["method"] == "POST" else None
        around = scope.get(_AROUND, ())
        if matched is None or self._records in around:
            await self.app(scope, receive, send)
            return
        scope[_AROUND] = (*around, self._records)
        await Exchange(self._shared, matched, scope, receive, send).run()

    def in_force(self) -> CacheInForce:
        """The place of its vectors."""
        return CacheInForce(*self._records, self._settings)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hold the shared client from the app's start to its end."""
        manager = self._shared.vectors.manager if self._is_ours else None
        await live(self.app, manager, scope, receive, send, at_end=self._settle)

    async def _settle(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLES_WITHIN):
                await self._shared.flights.settle()
        self._shared.counts.tell()


def _settings_of(redis: RedisArgument) -> Settings:
    return redis.settings if isinstance(redis, RedisManager) else Settings()


def _seconds(name: str, value: object, default: float, low: float, high: float) -> float:
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigurationError(f"{name}={value!r} is not a number of seconds from {low} to {high}. Try {default}.")
    return float(value)


def _lease(value: object) -> float | None:
    return None if value == "off" else _seconds("lease", value, 300, 0, _MAX_LEASE)


def _text(name: str, value: object, default: str) -> str:
    value = default if value is None else value
    if not isinstance(value, str):
        raise ConfigurationError(f"{name}={value!r} is not a text. Try 'bge-m3@5617a9f'.")
    return value
