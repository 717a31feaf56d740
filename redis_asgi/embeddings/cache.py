"""`EmbeddingCache`: vectors by ids of the service's own choice."""

import asyncio
import inspect
import math
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import ArrayLike

from ..connection.redis_argument import RedisArgument
from ..errors import ConfigurationError, Failure
from ..keys import embedding_key, id_mark
from ..misuse import constructor_says_what_was_meant, shown
from ..settings import Settings
from ..time_slice import TimeSlice
from .origin.computation import Changes, Computation, raisable
from .records.codec import MAX_DIMS, Float32Array, Value, decode_vector, encode
from .records.metrics import Items
from .storage.store import Write, resolve_vectors, vectors_of

Compute = Callable[[list[str]], "Awaitable[ArrayLike] | ArrayLike"]

_MAX_ID_BYTES = 1024
_IDS_PER_LOOKUP = 512
_VALUES_PER_TIMEOUT = 64


@constructor_says_what_was_meant("EmbeddingCache(redis, 3600)")
class EmbeddingCache:
    """Keep vectors by id: ``{prefix}embedding:{context_id}`` in Redis.

    Trouble with Redis gives ``None``, ``False``, ``{}`` or 0, never an exception, and one log line
    per outage. Each different id of a `get_many` or `get_or_compute` counts once in
    ``redis_asgi_cache_items_total``: as a hit, a miss (for whatever reason it was not found), or
    collapsed when another call was already at it. Trips to Redis count in
    ``redis_asgi_redis_commands_total``.

    Args:
        redis: A `RedisManager`, a URL or a ``redis.asyncio`` client; ``None`` =
            ``EMBEDDING_CACHE_REDIS_URL``, else the client that all parts share.
        ttl: Seconds a vector is kept, exactly.
        dtype: ``"float16"`` halves the memory; what does not fit is kept as float32.
        settings: ``None`` reads the environment now.

    Raises:
        ConfigurationError: For a *ttl* that is not a positive number, or another *dtype*.

    ::

        cache = EmbeddingCache()
        await cache.set_embedding("doc-1", [0.1, 0.2])
        vectors = await cache.get_or_compute(["doc-1", "doc-2"], embed)  # shape (2, d)
    """

    def __init__(
        self,
        redis: RedisArgument = None,
        ttl: float = 3600,
        *,
        dtype: Literal["float32", "float16"] = "float32",
        settings: Settings | None = None,
    ) -> None:
        if not _is_ttl(ttl):
            raise ConfigurationError(f"ttl={ttl!r} is not a positive number of seconds. Try 3600.")
        if dtype not in ("float32", "float16"):
            raise ConfigurationError(f"dtype={dtype!r} is not kept. Try 'float32' or 'float16'.")
        self._manager, _ = resolve_vectors(redis, settings)
        self._ttl = ttl
        self._half = dtype == "float16"
        self._prefix = self._manager.settings.REDIS_KEY_PREFIX
        self._timeout = self._manager.settings.EMBEDDING_CACHE_TIMEOUT
        self._computing: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Computation]] = (
            weakref.WeakKeyDictionary()
        )
        self._changes = self._manager.per_process(Changes)
        self._items = Items()

    async def get_embedding(self, context_id: str) -> Float32Array | None:
        """The vector of *context_id*, a writable copy of shape ``(d,)``; ``None`` when there is
        none.
        """
        return (await self.get_many([context_id])).get(context_id)

    async def set_embedding(self, context_id: str, embedding: ArrayLike, *, ttl: float | None = None) -> bool:
        """Keep one vector, shape ``(d,)``, for *ttl* seconds; whether it was kept.

        Raises:
            TypeError: For an id that is no ``str``,
                or an embedding of bools, complex numbers or objects.
            ValueError: For an id that is empty, over 1,024 bytes or not UTF-8; an embedding that is
                not 1-D, is empty, over 65,535 numbers or not finite as float32; a *ttl* that is not
                positive.
        """
        return await self.set_many({_checked_ids([context_id])[0]: embedding}, ttl=ttl) == 1

    async def delete_embedding(self, context_id: str) -> bool:
        """Forget one vector; whether there was one."""
        return await self.delete_many([context_id]) == 1

    async def get_many(self, context_ids: Iterable[str]) -> dict[str, Float32Array]:
        """The vectors found, by id, each a writable copy of shape ``(d,)``."""
        ids = list(dict.fromkeys(_checked_ids(context_ids)))
        self._items.tick()
        found: dict[str, Float32Array] = {}
        time_slice = TimeSlice()
        for start in range(0, len(ids), _IDS_PER_LOOKUP):
            chunk = ids[start : start + _IDS_PER_LOOKUP]
            keys = [self._key(name) for name in chunk]
            raws = await vectors_of(self._manager).lookup(keys, self._timeout)
            if isinstance(raws, Failure):
                break
            for name, key, raw in zip(chunk, keys, raws, strict=True):
                vector = decode_vector(raw, id_mark(key))
                if vector is not None:
                    found[name] = vector
                if time_slice.expired:
                    await time_slice.checkpoint()
        self._items.add(len(found), len(ids) - len(found))
        return found

    async def set_many(self, embeddings: Mapping[str, ArrayLike], *, ttl: float | None = None) -> int:
        """Keep many vectors, checked before any is written;
        how many were kept. Raises as `set_embedding`.
        """
        if ttl is not None and not _is_ttl(ttl):
            raise ValueError(f"ttl={ttl!r} is not a positive number of seconds. Try 3600.")
        ids = _checked_ids(embeddings)
        values = [self._value(name, embeddings[name]) for name in ids]
        return await self._change(ids, lambda: self._write(ids, values, self._ttl if ttl is None else ttl))

    async def delete_many(self, context_ids: Iterable[str]) -> int:
        """Forget many vectors; how many there were."""
        ids = list(dict.fromkeys(_checked_ids(context_ids)))
        if not ids:
            return 0

        async def delete() -> int:
            keys = [self._key(name) for name in ids]
            return (await vectors_of(self._manager).delete(keys, self._timeout)).count

        return await self._change(ids, delete)

    async def get_or_compute(self, context_ids: Sequence[str], compute: Compute) -> Float32Array:
        """The vectors of *context_ids*, shape ``(n, d)``, in that order;
        what is not kept is computed, once.

        Args:
            context_ids: Duplicates are fine; none at all gives shape ``(0, 0)``.
            compute: Given the ids that are not stored, different ones in first-seen order; returns
                as many vectors, shape ``(m, d)``. Async, or sync and then run in a worker thread.
                Concurrent calls for one id share one computation, and its exception.

        Raises:
            TypeError: For a bare ``str``.
            ValueError: When *compute* returns another number of vectors or they differ in length.
        """
        if isinstance(context_ids, str):
            raise TypeError("context_ids is one str. Pass a list of ids.")
        if not callable(compute):
            raise TypeError(f"compute={shown(compute)} is not callable. Pass a function of the missing ids.")
        ids = _checked_ids(context_ids)
        if not ids:
            return np.zeros((0, 0), dtype=np.float32)
        computing = self._computing.setdefault(asyncio.get_running_loop(), {})
        # Claimed before anything is looked up,
        # so that no answer of Redis can be older than a finished computation.
        mine = Computation([name for name in dict.fromkeys(ids) if name not in computing], computing)
        self._changes.begin(mine)
        waits = {name: computing[name] for name in ids}
        needed = tuple(dict.fromkeys(waits.values()))
        # For all of them from here on, not only for the one that is awaited first.
        for computation in needed:
            computation.join()
        try:
            if mine.ids:
                # After all else, as an eager task may have ended when it is there.
                mine.task = asyncio.get_running_loop().create_task(self._find_or_compute(mine, compute))
                mine.task.add_done_callback(lambda _: self._end(mine))
            self._items.add(collapsed=len(waits) - len(mine.ids))
            # Without a shield: a cancelled future would look like our own cancellation.
            done, _ = await asyncio.wait([it.vectors for it in needed], return_when=asyncio.FIRST_EXCEPTION)
            for vectors in done:
                vectors.result()  # raises what one of them did
            found = {name: computation.vectors.result()[name] for name, computation in waits.items()}
            if mine.task is not None:
                await asyncio.wait({mine.task})
        finally:
            for computation in needed:
                computation.leave()
        lengths = {len(vector) for vector in found.values()}
        if len(lengths) > 1:
            raise ValueError(
                f"context_ids have vectors of {sorted(lengths)} numbers. Delete those of the former model."
            )
        return np.stack([found[name] for name in ids])

    async def _find_or_compute(self, mine: Computation, compute: Compute) -> None:
        try:
            found = await self.get_many(mine.ids)
            if mine.given_up:
                return  # a connection that is made in the moment of a cancellation swallows it
            missing = [name for name in mine.ids if name not in found]
            values = self._computed(missing, await _call(compute, list(missing))) if missing else {}
            if mine.given_up:
                return  # a compute that goes on when it is cancelled: another call may have begun anew
            mine.vectors.set_result(found | {name: value.float32 for name, value in values.items()})
            # What was set or deleted meanwhile is newer.
            mine.writing = True
            kept = [name for name in missing if name not in mine.superseded]
            await self._write(kept, [values[name] for name in kept], self._ttl)
        except asyncio.CancelledError as error:
            mine.fail(error)
            raise
        except BaseException as error:
            mine.fail(error)  # one that ends the loop does so where it is raised again
        finally:
            self._end(mine)

    def _end(self, mine: Computation) -> None:
        # Twice, as a task that is cancelled before its first step runs nothing of its own.
        mine.fail(asyncio.CancelledError())
        mine.step_down()
        self._changes.end(mine)

    def _computed(self, ids: Sequence[str], computed: Any) -> dict[str, Value]:
        vectors = list(computed)
        if len(vectors) != len(ids):
            raise ValueError(f"compute returned {len(vectors)} vectors for {len(ids)} ids. Return one for each.")
        values = {name: self._value(name, vector) for name, vector in zip(ids, vectors, strict=True)}
        lengths = {value.dims for value in values.values()}
        if len(lengths) > 1:
            raise ValueError(f"compute returned vectors of {sorted(lengths)} numbers. Return vectors of one length.")
        return values

    def _key(self, context_id: str) -> bytes:
        return embedding_key(self._prefix, context_id)

    def _value(self, context_id: str, embedding: ArrayLike) -> Value:
        try:
            array = np.asarray(embedding)
        except ValueError as error:
            raise ValueError(f"The embedding of {context_id!r} is ragged. Pass one number per dimension.") from error
        if array.dtype.kind not in "fiu":
            raise TypeError(f"The embedding of {context_id!r} holds {array.dtype}. Pass numbers.")
        if array.ndim != 1 or not 0 < array.shape[0] <= MAX_DIMS:
            shape = array.shape
            raise ValueError(f"The embedding of {context_id!r} has shape {shape}. Pass 1 to {MAX_DIMS} numbers in 1-D.")
        with np.errstate(over="ignore"):
            single = array.astype("<f4")
            half = single.astype("<f2") if self._half else None
        if not np.isfinite(single).all():
            raise ValueError(f"The embedding of {context_id!r} is not finite as float32. Pass finite numbers.")
        kept = half if half is not None and np.isfinite(half).all() else single
        return encode(kept, born=time.time(), own=id_mark(self._key(context_id)))

    async def _write(self, ids: Sequence[str], values: Sequence[Value], ttl: float) -> int:
        writes = [Write(self._key(name), value.raw, ttl) for name, value in zip(ids, values, strict=True)]
        within = self._write_timeout(len(writes))
        return (await vectors_of(self._manager).write(writes, within)).count if writes else 0

    def _write_timeout(self, values: int) -> float:
        return self._timeout * (1 + values // _VALUES_PER_TIMEOUT)

    async def _change(self, ids: Sequence[str], operation: Callable[[], Awaitable[int]]) -> int:
        """Run *operation* so that it wins over computations of *ids*, begun before or meanwhile."""
        self._changes.changing(ids, 1)
        try:
            for computation in self._changes.supersede(ids):
                # Its loop may be another thread's, or was closed meanwhile:
                # a write takes no longer than its deadline.
                ended = asyncio.wrap_future(computation.ended)
                await asyncio.wait({ended}, timeout=self._write_timeout(len(computation.ids)))
            return await operation()
        finally:
            self._changes.changing(ids, -1)


async def _call(compute: Compute, missing: list[str]) -> Any:
    if inspect.iscoroutinefunction(compute) or inspect.iscoroutinefunction(type(compute).__call__):
        return await cast("Awaitable[Any]", compute(missing))

    def compute_here() -> Any:
        try:
            return compute(missing)
        except StopIteration as error:
            raise raisable(error) from error

    computed = await asyncio.to_thread(compute_here)
    return await computed if inspect.isawaitable(computed) else computed


def _is_ttl(ttl: object) -> bool:
    return isinstance(ttl, int | float) and not isinstance(ttl, bool) and math.isfinite(ttl) and ttl > 0


def _checked_ids(ids: Iterable[str]) -> list[str]:
    if isinstance(ids, str | bytes):
        raise TypeError(f"context_ids is one {type(ids).__name__}. Pass a list of ids.")
    checked = list(ids)
    for name in checked:
        if not isinstance(name, str):
            raise TypeError(f"context_id={name!r} is not a str.")
        try:
            size = len(name.encode())
        except UnicodeEncodeError:
            raise ValueError(f"context_id={name!r} holds lone surrogates. Pass valid Unicode.") from None
        if not 0 < size <= _MAX_ID_BYTES:
            raise ValueError(f"A context_id has {size} bytes. Pass 1 to {_MAX_ID_BYTES}.")
    return checked
