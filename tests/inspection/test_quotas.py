"""A client's quota as an operator sees it is what the middleware counts."""

from typing import Any

import httpx
import pytest
import redis
from redis.exceptions import RedisError

from redis_asgi import (
    ConfigurationError,
    RateLimiter,
    RateLimitMiddleware,
    RedisManager,
    Rule,
    Settings,
    by_header,
    by_json,
    by_mcp_tool,
    client_ip,
)
from redis_asgi.inspection.quotas import QuotaError, QuotaRow, known_policies, look, partition_of, reset
from redis_asgi.ratelimit.limits.policy import STRATEGIES

from ..conftest import StartServer
from ..kit.servers import Cluster
from ..test_guides import not_found

pytestmark = pytest.mark.anyio


async def ask(app: RateLimitMiddleware, address: str, **headers: str) -> None:
    """One request from *address*."""
    transport = httpx.ASGITransport(app, client=(address, 5000))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/", headers=headers)).status_code == 404


@pytest.mark.parametrize(
    ("address", "asked"),
    [
        pytest.param("203.0.113.7", "203.0.113.7", id="IPv4"),
        pytest.param("203.0.113.7", " ::ffff:203.0.113.7 ", id="IPv4 mapped, with blanks"),
        pytest.param("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::9", id="IPv6 of the same network"),
        pytest.param("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64", id="IPv6 as the label has it"),
        pytest.param("2001:db8::1", "[2001:db8::1]:443", id="as in a log, with a port"),
        pytest.param("", "unknown", id="no address"),
    ],
)
@pytest.mark.parametrize("secret", [None, "pepper"])
async def test_an_address_is_found(
    address: str, asked: str, secret: str | None, manager: RedisManager, redis_client: redis.Redis
) -> None:
    """What an operator types leads to the counter of that client, with a key secret too."""
    settings = Settings(
        REDIS_URL=manager.settings.REDIS_URL, REDIS_KEY_SECRET=secret, REDIS_KEY_PREFIX="p:", RATE_LIMITS="7/minute"
    )
    await ask(RateLimitMiddleware(not_found, settings=settings), address)
    partition = await partition_of(asked, None, settings)

    assert [partition.key] == redis_client.keys()
    (standing,) = await look(manager, partition, tuple(known_policies(None, None, None, settings)))
    assert ("default", 7, 1, 6, True) == (
        standing.policy,
        standing.quota,
        standing.used,
        standing.remaining,
        standing.stored,
    )


async def test_an_address_of_another_prefix_length(manager: RedisManager, redis_client: redis.Redis) -> None:
    """The network is cut by the setting, as the middleware does."""
    settings = Settings(REDIS_URL=manager.settings.REDIS_URL, RATE_LIMIT_IPV6_PREFIX=48)
    await ask(RateLimitMiddleware(not_found, settings=settings), "2001:db8:1:2::3")
    partition = await partition_of("2001:db8:1:ffff::", "ip", settings)

    assert ([partition.key], "2001:db8:1::/48") == (redis_client.keys(), partition.label)


@pytest.mark.parametrize(
    ("by", "typed", "sent"),
    [
        pytest.param("header:X-API-Key", "k3y", "k3y", id="plain"),
        pytest.param("header:x-api-key", " k3y ", "k3y", id="blanks around"),
        pytest.param("header:x-api-key", "schlüssel", "schlüssel", id="not ASCII"),
        pytest.param("header:Authorization", "BEARER   k3y", "Bearer k3y", id="another spelling of a scheme"),
    ],
)
async def test_a_header_is_found(
    by: str, typed: str, sent: str, settings: Settings, manager: RedisManager, redis_client: redis.Redis
) -> None:
    """A header's value is read as the middleware reads it; its label never shows it."""
    name = by.partition(":")[2].lower()
    app = RateLimitMiddleware(not_found, rules=[Rule("5/minute", partition_by=by_header(name))], settings=settings)
    transport = httpx.ASGITransport(app, client=("192.0.2.1", 5000))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.get("/", headers=[(name.encode(), sent.encode())])
    partition = await partition_of(typed, by, settings)

    assert [partition.key] == redis_client.keys()
    assert partition.label.startswith(f"header:{name}:")
    assert sent not in partition.label
    assert len(partition.label) == len(f"header:{name}:") + 8


@pytest.mark.parametrize(
    ("by", "typed"),
    [
        pytest.param(
            [by_header("x-key"), by_json("model", {"gpt-5*": "large"})], '["k3y", "large"]', id="key and model"
        ),
        pytest.param([client_ip, by_mcp_tool(["search"])], '["192.0.2.1", "other"]', id="address and tool"),
        pytest.param([by_json("model", {"gpt-5*": "large"})], "large", id="model"),
        pytest.param([by_mcp_tool(["search"])], "other", id="tool"),
    ],
)
async def test_who_is_counted_by_the_body_is_found(
    by: Any, typed: str, settings: Settings, redis_client: redis.Redis
) -> None:
    """A bucket, or a list in JSON of what the parts are."""
    rule = Rule("5/minute", partition_by=by)
    app = RateLimitMiddleware(not_found, rules=[rule], settings=settings)
    transport = httpx.ASGITransport(app, client=("192.0.2.1", 5000))
    content = {"model": "gpt-5", "method": "tools/call", "params": {"name": "x"}}
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await client.post("/", headers={"x-key": "k3y"}, json=content)
    (kind,) = [limit.by for limit in app.in_force().limits()]

    assert [(await partition_of(typed, kind, settings)).key] == redis_client.keys()


async def test_a_custom_identity_is_found(settings: Settings, redis_client: redis.Redis) -> None:
    """What a limiter is called with, or a callable returns, is of the kind ``custom``."""
    await RateLimiter(settings=settings).consume("tenant-1")

    assert [(await partition_of("tenant-1", "custom", settings)).key] == redis_client.keys()
    assert (await partition_of("tenant-1", "user", settings)).key not in redis_client.keys()


@pytest.mark.parametrize(
    ("client", "by"),
    [
        pytest.param("s3cr3t", "ip", id="no address"),
        pytest.param("10.0.0.0/99", "ip", id="no network"),
        pytest.param("a", "cookie", id="unknown kind"),
        pytest.param("a", "header:", id="header without a name"),
        pytest.param("a", "header:two words", id="header of two words"),
        pytest.param("a", "json:", id="member without a name"),
        pytest.param("s3cr3t", "ip,user", id="no list"),
        pytest.param('["s3cr3t"]', "ip,user", id="list that is too short"),
        pytest.param('["s3cr3t", 1]', "user,user", id="list of numbers"),
    ],
)
async def test_what_cannot_be_a_client(client: str, by: str) -> None:
    """An impossible kind, or no address where one is asked for,
    is told without showing what may be a credential.
    """
    with pytest.raises(ConfigurationError) as caught:
        await partition_of(client, by, Settings())

    assert "s3cr3t" not in str(caught.value)
    assert "Try" in str(caught.value)


@pytest.mark.parametrize("strategy", STRATEGIES)
async def test_known_and_unknown_quotas(strategy: Any, settings: Settings, manager: RedisManager) -> None:
    """With the quota all is told, and looking charges nothing;
    without it, what is used and until when.
    """
    limiter = RateLimiter(settings=settings)
    for _ in range(2):
        await limiter.consume("a", "8/hour", cost=3, name="rule", strategy=strategy)
    partition = await partition_of("a", "custom", settings)
    known = tuple(known_policies("rule", "8/hour", strategy, settings))
    for _ in range(2):
        (standing,) = await look(manager, partition, known)
        assert (standing.policy, standing.strategy, standing.window) == ("rule", strategy, 3600)
        assert (8, 6, 2, 0.0, True) == (
            standing.quota,
            standing.used,
            standing.remaining,
            standing.retry_after,
            standing.stored,
        )
        assert standing.reset is not None
        assert 0 < standing.reset <= 7200

    (standing,) = await look(manager, partition, ())
    assert (None, 6, None, None) == (standing.quota, standing.used, standing.remaining, standing.retry_after)
    assert (standing.reset is None) == (strategy == "gcra")


async def test_every_policy_is_told(settings: Settings, manager: RedisManager) -> None:
    """All that is stored, the known ones that are not, and with a name only that rule's."""
    limiter = RateLimiter(settings=settings)
    await limiter.consume("a", "20/second; 1000/hour", name="all")
    await limiter.consume("a", "5/minute", name="login")
    await limiter.consume("a", "5/minute", name="all-1s")
    partition = await partition_of("a", "custom", settings)
    known = tuple(known_policies("login", "5/minute; 9/hour", None, settings))

    def told(standings: list[QuotaRow]) -> list[tuple[str, int | None, bool]]:
        return [(each.policy, each.quota, each.stored) for each in standings]

    assert told(await look(manager, partition, known)) == [
        ("all-1s", None, True),
        ("all-1s", None, True),
        ("all-3600s", None, True),
        ("login", None, True),
        ("login-60s", 5, False),
        ("login-3600s", 9, False),
    ]
    # "all-1s" of a minute is a rule of its own that only looks like a part of "all".
    assert [(s.policy, s.window) for s in await look(manager, partition, (), name="all")] == [
        ("all-1s", 1),
        ("all-3600s", 3600),
    ]
    assert await look(manager, partition, (), name="other") == []


async def test_a_refused_client(settings: Settings, manager: RedisManager) -> None:
    """Of a client that used its quota: when it may come back."""
    limiter = RateLimiter(settings=settings)
    await limiter.consume("a", "3/minute", cost=3)
    partition = await partition_of("a", "custom", settings)
    (standing,) = await look(manager, partition, tuple(known_policies(None, "3/minute", None, settings)))

    assert standing.remaining == 0
    assert standing.retry_after is not None
    assert 59 < standing.retry_after <= 60


async def test_foreign_fields_are_left_alone(
    settings: Settings, manager: RedisManager, redis_client: redis.Redis
) -> None:
    """A field of another layout is passed over;
    one of ours that holds no counter is an error with a reason.
    """
    partition = await partition_of("a", "custom", settings)
    redis_client.hset(partition.key, mapping={"something": "else", "default:f60:2": "1 2 3"})
    assert await look(manager, partition, ()) == []
    redis_client.hset(partition.key, "default:f60:1", "nonsense")
    with pytest.raises(QuotaError, match="reply"):
        await look(manager, partition, ())


async def test_reset(settings: Settings, manager: RedisManager, redis_client: redis.Redis) -> None:
    """One rule, or all, is given back, logs included; and whether there was any."""
    limiter = RateLimiter(settings=settings)
    await limiter.consume("a", "5/minute", name="login", strategy="moving-window")
    await limiter.consume("a", "5/minute", name="other")
    partition = await partition_of("a", "custom", settings)

    assert await reset(manager, partition, name="login")
    assert redis_client.hkeys(partition.key.decode()) == [b"other:f60:1"]
    assert not await reset(manager, partition, name="login")
    assert await reset(manager, partition)
    assert redis_client.keys() == []
    assert not await reset(manager, partition)
    with pytest.raises(ConfigurationError, match="name"):
        await reset(manager, partition, name="no rule's name")


async def test_a_refused_reset_is_no_success(private_server: StartServer) -> None:
    """Redis that does not take it raises: an operator must not think that it is done."""
    server = private_server()
    settings = Settings(REDIS_URL=server.url)
    await RateLimiter(settings=settings).consume("a")
    partition = await partition_of("a", "custom", settings)
    server.add_user("app", ">pw", "~*", "+@all", "-unlink")
    manager = RedisManager(Settings(REDIS_URL=server.url, REDIS_USERNAME="app", REDIS_PASSWORD="pw"))
    with pytest.raises(RedisError, match="unlink"):
        await reset(manager, partition)
    await manager.close()

    assert server.client().exists(partition.key.decode())


async def test_on_a_cluster(cluster: Cluster) -> None:
    """Looking and resetting find the node."""
    settings = Settings(REDIS_URL=cluster.url, REDIS_CLUSTER=True)
    manager = RedisManager(settings)
    limiter = RateLimiter(manager)
    for client in ("a", "b", "c", "d"):
        await limiter.consume(client, strategy="moving-window")
        partition = await partition_of(client, "custom", settings)
        (standing,) = await look(manager, partition, ())
        assert (standing.used, standing.strategy) == (1, "moving-window")
        assert await reset(manager, partition)
        assert await look(manager, partition, ()) == []
    await manager.close()
