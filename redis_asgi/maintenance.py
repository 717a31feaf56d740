"""Operations done now and then: flush a model, make Redis persist, work out what it will hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import redis.asyncio as aioredis
from redis.exceptions import RedisClusterException, RedisError

from .connection.client_factory import Client
from .connection.manager import RedisManager
from .connection.redis_argument import RedisArgument
from .errors import ConfigurationError, Failure, RedisASGIError, classify
from .keys import embedding_epoch_key
from .settings import Settings

__all__ = [
    "Change",
    "FlushError",
    "MaintenanceError",
    "PersistenceError",
    "calculate_memory_usage",
    "client_bytes",
    "configure_persistence",
    "flush_model",
    "vector_bytes",
]

# What `configure_persistence` sets: snapshots after 15, 5 and 1 minutes with that many changes,
# compressed, and no writes accepted while they fail.
PERSISTENCE = {
    "save": "900 1 300 10 60 10000",
    "stop-writes-on-bgsave-error": "yes",
    "rdbcompression": "yes",
}

# Bytes, measured on Redis 7.0.15 with jemalloc ("What is in Redis" in examples/production); the
# sizing adds them up.
CLIENT_BYTES = 120  # MEMORY USAGE of one client's hash with one policy
POLICY_BYTES = 40  # of each further policy in it
KEYSPACE_BYTES = 77  # what a key with a TTL costs beside that: its places in two hash tables
_VECTOR_OVERHEAD = 136  # key, entry and object of one input's vector
_VECTOR_HEADER = 32 + 10  # of our value, and of the string that holds it
_LOG_OVERHEAD = 184  # key, entry and list of a moving window
_STAMP_BYTES = 10  # of one unit in it

_DTYPE_BYTES = {"float16": 2, "float32": 4, "float64": 8}


class MaintenanceError(RedisASGIError):
    """Redis did not do what an operator asked of it.

    Attributes:
        failure: Why.
    """

    def __init__(self, message: str, failure: Failure) -> None:
        super().__init__(message)
        self.failure = failure


class FlushError(MaintenanceError):
    """Redis did not take the new epoch: stored vectors are still served."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(
            f"Redis did not take the flush ({failure.value}): stored vectors are still served. `redis-asgi check` says "
            "what is wrong.",
            failure,
        )


class PersistenceError(MaintenanceError):
    """Redis did not take all of what `configure_persistence` sets.

    Attributes:
        changes: What was set before that, on which server; it stays set.
    """

    def __init__(self, message: str, failure: Failure, changes: "Sequence[Change]") -> None:
        super().__init__(message, failure)
        self.changes = tuple(changes)


@dataclass(frozen=True, slots=True)
class Change:
    """One configuration parameter of one server that was set.

    Attributes:
        node: ``host:port`` on a cluster, else empty.
        before: What it was; ``None`` where Redis does not say.
        after: What it is now.
    """

    node: str
    name: str
    before: str | None
    after: str


async def flush_model(
    model: str,
    *,
    namespace: str | None = None,
    redis: RedisArgument = None,
    settings: Settings | None = None,
    only_stored: bool = False,
) -> bool:
    """Make every stored vector of *model*, as requests name it, a miss:
    in Redis now, in every process soon.

    Soon is after ``EMBEDDING_CACHE_L1_SECONDS`` (5). Writes one key; Redis takes the memory back as
    the vectors end. A computation under way is flushed too.

    Args:
        model: The name in the requests; ``""`` for TEI, which has none.
        namespace: ``None`` = ``EMBEDDING_CACHE_NAMESPACE``.
        redis: As of `EmbeddingCacheMiddleware`.
        settings: ``None`` reads the environment now.
        only_stored: Write nothing where nothing can be stored,
            such as under a model's misspelt name.

    Returns:
        Whether it was flushed; ``False`` only with *only_stored*.

    Raises:
        FlushError: When Redis did not take it.
    """
    # Here, because it brings numpy along, which nothing else in this module needs.
    from .embeddings.storage import epochs  # noqa: PLC0415
    from .embeddings.storage.operations import WriteResult  # noqa: PLC0415
    from .embeddings.storage.store import resolve_vectors, vectors_of  # noqa: PLC0415

    manager, is_ours = resolve_vectors(redis, settings)
    settings = settings if settings is not None else manager.settings
    namespace = settings.EMBEDDING_CACHE_NAMESPACE if namespace is None else namespace
    name = embedding_epoch_key(settings.REDIS_KEY_PREFIX, namespace, model, secret=settings.key_secret)
    opened_before = not is_ours or manager.pool is not None
    vectors, within = vectors_of(manager), settings.REDIS_TIMEOUT
    # Without an epoch nothing that may be stored is valid.
    found = await vectors.lookup([name], within) if only_stored else [b""]
    if isinstance(found, Failure):
        done = WriteResult(0, found)
    elif found == [None]:
        done = WriteResult(0)
    else:
        done = await vectors.write([epochs.flush(name)], within)
    if not opened_before and not settings.REDIS_CLUSTER:
        # No other part in this loop uses the client;
        # a cluster's has no pool to tell by and ends with the loop.
        await manager.close()
    if done.failure is not None:
        raise FlushError(done.failure)
    return done.count > 0


async def configure_persistence(client: "Client | RedisManager") -> tuple[Change, ...]:
    """Make Redis save snapshots: `PERSISTENCE`, on every node of a cluster, replicas included.

    Counters and vectors then survive a restart of Redis, as of the last snapshot. It lasts until
    Redis itself restarts: to keep it, write the same into its configuration file or run
    ``CONFIG REWRITE``. Behind sentinels only the master is reached; a replica that takes over has
    its own configuration.

    Args:
        client: A ``redis.asyncio`` client, or a `RedisManager`. It needs ``CONFIG SET``; with
            ``CONFIG GET`` too the result says what was changed.

    Returns:
        Three changes per server, in the order they were made.

    Raises:
        PersistenceError: Redis forbids CONFIG, as managed ones do,
            or does not answer; its ``changes`` were set.
        ConfigurationError: *client* is something else, or on ``memory://``.
    """
    if isinstance(client, RedisManager):
        client = await client.get_connection()
    if not isinstance(client, aioredis.Redis | aioredis.RedisCluster) or isinstance(client, aioredis.client.Pipeline):
        kind = f"{type(client).__module__}.{type(client).__qualname__}"
        raise ConfigurationError(f"client={kind} is neither a redis.asyncio client nor a RedisManager. Pass one.")
    changes: list[Change] = []
    node = ""
    try:
        for node, target in await _nodes(client):
            for name, value in PERSISTENCE.items():
                before = await _config_get(client, name, target)
                await client.execute_command("CONFIG SET", name, value, **target)
                changes.append(Change(node, name, before, value))
    except (RedisError, RedisClusterException, OSError) as error:
        raise _persistence_error(error, node, changes) from error
    return tuple(changes)


async def _nodes(client: Client) -> list[tuple[str, dict[str, Any]]]:
    """Each server a client speaks to: its name,
    and what directs a command there. Primaries come first.
    """
    if isinstance(client, aioredis.Redis):
        return [("", {})]
    await client.initialize()
    nodes = [*client.get_primaries(), *client.get_replicas()]
    return [(node.name, {"target_nodes": node}) for node in nodes]


async def _config_get(client: Client, name: str, target: dict[str, Any]) -> str | None:
    try:
        found = await client.execute_command("CONFIG GET", name, **target)
    except RedisError as error:
        # CONFIG SET may be allowed where CONFIG GET is not;
        # if neither is, the next command says so.
        if classify(error) in (Failure.PERMISSION, Failure.REPLY):
            return None
        raise
    pairs = found.items() if isinstance(found, dict) else zip(found[::2], found[1::2], strict=True)
    values = {_text(key): _text(value) for key, value in pairs}
    return values.get(name)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _persistence_error(error: BaseException, node: str, changes: Sequence[Change]) -> PersistenceError:
    failure = classify(error)
    wanted = ", ".join(f'{name} "{value}"' for name, value in PERSISTENCE.items())
    done = ", ".join(f"{change.name}{f' on {change.node}' if change.node else ''}" for change in changes) or "nothing"
    where = f" on {node}" if node else ""
    if failure in (Failure.PERMISSION, Failure.REPLY):
        why = "the ACL lacks +config|set" if failure is Failure.PERMISSION else "it refuses the command"
        message = (
            f"Redis does not let us change its configuration{where}: {why}. Set {wanted} in its configuration file, or "
            "in the parameter group of a managed Redis."
        )
    else:
        message = f"Redis did not take the configuration{where} ({failure.value}). Try again when it answers."
    return PersistenceError(f"{message} Already set: {done}.", failure, changes)


def calculate_memory_usage(avg_embedding_size: float, num_embeddings: int, overhead_factor: float = 1.2) -> int:
    """The bytes that *num_embeddings* take in Redis, rounded up.

    Args:
        avg_embedding_size: Bytes of one, above 0:
            dimensions times 4 for float32, times 2 for float16.
        num_embeddings: How many, 0 or more.
        overhead_factor: What Redis adds, 1 or more. The default is that of 1,536 float32 numbers;
            shorter vectors need more (1.3 for 384). `vector_bytes` knows each length.

    Raises:
        ValueError: Names the argument, and a value that works.
    """
    _number("avg_embedding_size", avg_embedding_size, "Try 6144, which is 1536 float32 numbers.")
    if avg_embedding_size <= 0:
        raise ValueError(f"avg_embedding_size={avg_embedding_size!r} is not above 0. Try 6144.")
    _whole("num_embeddings", num_embeddings)
    _number("overhead_factor", overhead_factor, "Try 1.2.")
    if overhead_factor < 1:
        raise ValueError(f"overhead_factor={overhead_factor!r} is below 1, and Redis adds, it never saves. Try 1.2.")
    try:
        return math.ceil(avg_embedding_size * num_embeddings * overhead_factor)
    except OverflowError:
        raise ValueError("num_embeddings is more than any memory holds. Try 1000000.") from None


def vector_bytes(dims: int, dtype: Literal["float16", "float32", "float64"] = "float32") -> int:
    """The bytes one input's vector of *dims* numbers takes in Redis,
    its key and its places in the keyspace included.

    Raises:
        ValueError: For *dims* outside 1 to 65,535, or another *dtype*.
    """
    if _whole("dims", dims) not in range(1, 65_536):
        raise ValueError(f"dims={dims!r} is not between 1 and 65535. Try 1536.")
    if dtype not in _DTYPE_BYTES:
        raise ValueError(f"dtype={dtype!r} is not kept. Try 'float32'.")
    return _allocated(_VECTOR_HEADER + dims * _DTYPE_BYTES[dtype]) + _VECTOR_OVERHEAD + KEYSPACE_BYTES


def client_bytes(policies: int = 1, *, moving_quotas: Sequence[int] = ()) -> int:
    """The bytes one limited client takes in Redis at most.

    Args:
        policies: How many it is counted by, 1 or more.
        moving_quotas: The quotas of those that are moving windows:
            each keeps a log of that many units beside.

    Raises:
        ValueError: For fewer *policies* than 1.
    """
    if _whole("policies", policies) < 1:
        raise ValueError(f"policies={policies!r} is not 1 or more. Try 1.")
    logs = sum(_allocated(_STAMP_BYTES * quota) + _LOG_OVERHEAD + KEYSPACE_BYTES for quota in moving_quotas)
    return CLIENT_BYTES + POLICY_BYTES * (policies - 1) + KEYSPACE_BYTES + logs


def _allocated(size: int) -> int:
    """*size* rounded up to what jemalloc hands out: four sizes for each doubling."""
    step = max(16, 1 << max(0, (size - 1).bit_length() - 3))
    return -(-size // step) * step


def _number(name: str, value: object, hint: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not a number. {hint}")


def _whole(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}={value!r} is not a whole number, 0 or more. Try 1000.")
    return value
