"""What an operator does now and then: sizes that are true,
persistence that is set, errors that say what to do.
"""

import math
from typing import Any, Literal

import pytest
import redis
import redis.asyncio as aioredis

from redis_asgi import (
    ConfigurationError,
    RedisASGIError,
    RedisManager,
    Settings,
    calculate_memory_usage,
    configure_persistence,
)
from redis_asgi.errors import Failure
from redis_asgi.maintenance import (
    KEYSPACE_BYTES,
    PERSISTENCE,
    FlushError,
    MaintenanceError,
    PersistenceError,
    client_bytes,
    vector_bytes,
)
from redis_asgi.ratelimit.limiter import RateLimiter

from .conftest import StartServer
from .kit.processes import run_python
from .kit.servers import Cluster, Server


@pytest.mark.parametrize(
    ("size", "count", "factor", "expected"),
    [
        pytest.param(6144, 1000, 1.2, 7_372_800, id="1,000 vectors of 1,536 floats"),
        pytest.param(6144, 0, 1.2, 0, id="none"),
        pytest.param(100, 3, 1.0, 300, id="no overhead"),
        pytest.param(0.5, 3, 1, 2, id="rounded up"),
        pytest.param(1, 10**15, 2, 2 * 10**15, id="a petabyte"),
    ],
)
def test_memory_usage(size: float, count: int, factor: float, expected: int) -> None:
    """Size times number times overhead, in whole bytes."""
    usage = calculate_memory_usage(size, count, factor)

    assert (expected, int) == (usage, type(usage))


def test_memory_usage_has_an_overhead_of_its_own() -> None:
    """Without a factor it is 1.2."""
    assert calculate_memory_usage(1000, 10) == 12_000


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        pytest.param((0, 1), "avg_embedding_size", id="no size"),
        pytest.param((-1, 1), "avg_embedding_size", id="size below zero"),
        pytest.param((math.nan, 1), "avg_embedding_size", id="size not a number"),
        pytest.param((math.inf, 1), "avg_embedding_size", id="endless size"),
        pytest.param(("6144", 1), "avg_embedding_size", id="size as text"),
        pytest.param((True, 1), "avg_embedding_size", id="size a boolean"),
        pytest.param((1, -1), "num_embeddings", id="number below zero"),
        pytest.param((1, 1.5), "num_embeddings", id="half a vector"),
        pytest.param((1, True), "num_embeddings", id="number a boolean"),
        pytest.param((1, 10**400), "num_embeddings", id="number beyond all memory"),
        pytest.param((1, 1, 0.9), "overhead_factor", id="an overhead that saves"),
        pytest.param((1, 1, math.nan), "overhead_factor", id="overhead not a number"),
        pytest.param((1, 1, None), "overhead_factor", id="no overhead"),
    ],
)
def test_memory_usage_of_nonsense(arguments: Any, names: str) -> None:
    """Arguments that cannot be are a ValueError that names them and something that works."""
    with pytest.raises(ValueError, match=rf"{names}.*Try"):
        calculate_memory_usage(*arguments)


def _used(client: redis.Redis) -> int:
    return int(client.info("memory")["used_memory"])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("dims", [384, 768, 1536])
def test_vector_bytes_are_what_redis_takes(dims: int, dtype: Any, redis_client: redis.Redis) -> None:
    """One vector takes what is said, as MEMORY USAGE gives it, within what servers differ by."""
    key = "embedding_input:v1:" + "0" * 64
    size = {"float16": 2, "float32": 4, "float64": 8}[dtype]
    redis_client.set(key, b"x" * (24 + dims * size), ex=60)

    assert redis_client.memory_usage(key) == pytest.approx(vector_bytes(dims, dtype) - KEYSPACE_BYTES, rel=0.15)


@pytest.mark.anyio
async def test_client_bytes_are_what_redis_takes(private_server: StartServer) -> None:
    """20,000 limited clients take what is said, within a third: tables grow in leaps."""
    server = private_server()
    client = server.client()
    limiter = RateLimiter(settings=Settings(REDIS_URL=server.url))
    await limiter.consume("first")
    before = _used(client)
    stored = client.hgetall(client.keys()[0])
    pipeline = client.pipeline(transaction=False)
    for i in range(20_000):
        pipeline.hset(f"rate_limit:{{10.0.{i >> 8}.{i & 255}}}", mapping=stored)  # type: ignore[arg-type]  # bytes do
        pipeline.pexpire(f"rate_limit:{{10.0.{i >> 8}.{i & 255}}}", 600_000)
    pipeline.execute()

    assert (_used(client) - before) / 20_000 == pytest.approx(client_bytes(), rel=0.34)


@pytest.mark.anyio
async def test_a_moving_window_takes_what_is_said(settings: Settings, redis_client: redis.Redis) -> None:
    """The log of 1,000 units takes what is said of it."""
    await RateLimiter(settings=settings, strategy="moving-window").consume("a", "1000/minute", cost=1000)
    taken = sum(redis_client.memory_usage(key) or 0 for key in redis_client.keys())

    assert taken == pytest.approx(client_bytes(moving_quotas=[1000]) - 2 * KEYSPACE_BYTES, rel=0.2)


def test_more_policies_take_more() -> None:
    """Each further policy costs 40 bytes;
    a million clients of one fit the 200 MB that are promised.
    """
    assert (40, 40) == (client_bytes(2) - client_bytes(1), client_bytes(3) - client_bytes(2))
    assert client_bytes() * 1_000_000 <= 200_000_000


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda: vector_bytes(0), id="no dimensions"),
        pytest.param(lambda: vector_bytes(65_536), id="too many dimensions"),
        pytest.param(lambda: vector_bytes(-1), id="dimensions below zero"),
        pytest.param(lambda: vector_bytes(8, "int8"), id="unknown type"),  # type: ignore[arg-type]  # what is tested
        pytest.param(lambda: client_bytes(0), id="no policy"),
    ],
)
def test_sizes_of_nonsense(wrong: Any) -> None:
    """What cannot be is a ValueError with something that works."""
    with pytest.raises(ValueError, match="Try"):
        wrong()


# persistence


def _configured(server: Server) -> dict[str, str]:
    return {name: str(server.client().config_get(name)[name]) for name in PERSISTENCE}


@pytest.mark.anyio
@pytest.mark.parametrize("given", ["client", "decoding client", "manager"])
async def test_persistence_is_set(
    given: Literal["client", "decoding client", "manager"], private_server: StartServer
) -> None:
    """All three are set, by any kind of client, and what they were is told."""
    server = private_server("--stop-writes-on-bgsave-error", "no", "--rdbcompression", "no")
    manager = RedisManager(Settings(REDIS_URL=server.url))
    client = aioredis.Redis.from_url(server.url, decode_responses=given == "decoding client", protocol=2)
    changes = await configure_persistence(manager if given == "manager" else client)
    await client.aclose()
    await manager.close()

    assert _configured(server) == PERSISTENCE
    assert PERSISTENCE == {
        "save": "900 1 300 10 60 10000",
        "stop-writes-on-bgsave-error": "yes",
        "rdbcompression": "yes",
    }
    assert [("", "save", ""), ("", "stop-writes-on-bgsave-error", "no"), ("", "rdbcompression", "no")] == [
        (change.node, change.name, change.before) for change in changes
    ]


@pytest.mark.anyio
async def test_persistence_is_set_on_every_node(private_cluster: Cluster) -> None:
    """Each node of a cluster is configured, and named."""
    manager = RedisManager(Settings(REDIS_URL=private_cluster.url, REDIS_CLUSTER=True))
    changes = await configure_persistence(manager)
    await manager.close()

    assert [PERSISTENCE] * 3 == [_configured(node) for node in private_cluster.nodes]
    assert {f"127.0.0.1:{node.port}" for node in private_cluster.nodes} == {change.node for change in changes}
    assert len(changes) == 9


@pytest.mark.anyio
async def test_what_was_set_before_a_refusal_is_told(private_cluster: Cluster) -> None:
    """A node that forbids it ends the work; the error says on which nodes it is done already."""
    private_cluster.nodes[1].command("ACL", "SETUSER", "default", "-config|set")
    manager = RedisManager(Settings(REDIS_URL=private_cluster.url, REDIS_CLUSTER=True))
    with pytest.raises(PersistenceError) as caught:
        await configure_persistence(manager)
    await manager.close()
    private_cluster.nodes[1].command("ACL", "SETUSER", "default", "+config|set")

    done = {change.node for change in caught.value.changes}
    assert f"127.0.0.1:{private_cluster.nodes[1].port}" not in done
    assert all(f"save on {node}" in str(caught.value) for node in done)
    assert [_configured(node) == PERSISTENCE for node in private_cluster.nodes] == [
        f"127.0.0.1:{node.port}" in done for node in private_cluster.nodes
    ]


@pytest.mark.anyio
@pytest.mark.parametrize("how", ["renamed", "no right", "not even to look"])
async def test_forbidden_config(how: str, private_server: StartServer) -> None:
    """A managed Redis that forbids CONFIG gets one error that says what to set, and where."""
    if how == "renamed":
        server = private_server("--rename-command", "CONFIG", "")
        url = server.url
    else:
        server = private_server()
        server.add_user("app", ">pw", "+@all", "~*", "-config|set", *(["-config"] if how == "not even to look" else []))
        url = server.url.replace("redis://", "redis://app:pw@")
    client = aioredis.Redis.from_url(url, protocol=2)
    with pytest.raises(PersistenceError) as caught:
        await configure_persistence(client)
    await client.aclose()

    assert isinstance(caught.value, RedisASGIError)
    assert caught.value.failure is (Failure.REPLY if how == "renamed" else Failure.PERMISSION)
    for part in ('save "900 1 300 10 60 10000"', "configuration file", "parameter group", "Already set: nothing."):
        assert part in str(caught.value)


@pytest.mark.anyio
async def test_persistence_without_redis() -> None:
    """Redis that is not there is the same error, with another reason."""
    manager = RedisManager(Settings(REDIS_URL="redis://127.0.0.1:1"))
    with pytest.raises(PersistenceError, match="connection") as caught:
        await configure_persistence(manager)

    assert caught.value.failure is Failure.CONNECTION


@pytest.mark.anyio
async def test_persistence_of_something_else(redis_url: str) -> None:
    """A synchronous client, a pipeline and memory:// are told apart from trouble with Redis."""
    asynchronous = aioredis.Redis.from_url(redis_url)
    for wrong in (redis.Redis.from_url(redis_url), asynchronous.pipeline(), "redis://localhost"):
        with pytest.raises(ConfigurationError, match=r"neither a redis\.asyncio client"):
            await configure_persistence(wrong)  # type: ignore[arg-type]  # what is tested
    await asynchronous.aclose()
    with pytest.raises(ConfigurationError, match="memory://"):
        await configure_persistence(RedisManager(Settings(REDIS_URL="memory://")))


def test_flush_errors_are_of_the_tree() -> None:
    """A flush that failed is an error of the package, with its reason."""
    error = FlushError(Failure.TIMEOUT)

    assert isinstance(error, MaintenanceError | RedisASGIError)
    assert (error.failure, "timeout" in str(error)) == (Failure.TIMEOUT, True)


def test_maintenance_needs_no_numpy() -> None:
    """Only a flush, which goes through the store of vectors, pays for numpy."""
    done = run_python("import sys, redis_asgi; redis_asgi.calculate_memory_usage; print('numpy' in sys.modules)")

    assert ("False\n", "") == (done.stdout, done.stderr)
