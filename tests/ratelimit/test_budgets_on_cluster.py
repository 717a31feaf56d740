"""Budgets on Redis Cluster: the parts of a request live on several nodes, and are settled on each."""

import asyncio
import json
import random
from collections import Counter

import pytest

from redis_asgi import RateLimitMiddleware, RedisManager, Rule, Settings, by_header, by_json, client_ip, tokens
from redis_asgi.ratelimit.rules.joined import joined

from ..kit.servers import Cluster
from .concurrency import settled
from .spending import READ, endings, playing, remaining, request

pytestmark = pytest.mark.anyio

QUOTA = 1_000_000
ADDRESS = "203.0.113.7"


async def test_each_part_is_charged_what_was_used(cluster: Cluster) -> None:
    """Whatever the endings; and what one part refuses leaves nothing in the others."""
    rng = random.Random(18)
    manager = RedisManager(Settings(REDIS_URL=cluster.url, REDIS_CLUSTER=True, RATE_LIMIT_TIMEOUT=5.0))
    key, model = by_header("x-key"), by_json("model", {"a*": "a", "b*": "b"})
    rules = [
        Rule("60/hour", name="requests", partition_by=key),
        Rule(f"{QUOTA}/hour", name="tokens", partition_by=client_ip, cost=tokens(500)),
        Rule(f"{QUOTA}/hour", name="models", partition_by=[key, model], cost=tokens(500)),
        Rule(concurrency=50, name="streams", partition_by=client_ip),
    ]
    app = RateLimitMiddleware(playing, rules=rules, redis=manager)
    used = Counter[tuple[str, str]]()
    refused = 0

    async def one(who: str, bucket: str) -> None:
        nonlocal refused
        ending = endings(rng)
        body = json.dumps({"model": f"{bucket}1", "prompt": "x" * (4 * READ - 2)}).encode()
        sent = await request(app, ending, key=who, body=body)
        if b"retry-after" in dict(sent[0]["headers"] if sent else []):
            refused += 1
        else:
            used[who, bucket] += ending.cost

    for _ in range(12):
        await asyncio.gather(*(one(rng.choice("klm"), rng.choice("ab")) for _ in range(20)))
    await settled(manager)

    assert 60 == refused
    assert QUOTA - used.total() == await remaining(app, key=ADDRESS)
    for (who, bucket), units in used.items():
        assert QUOTA - units == await remaining(app, key=joined([who, bucket]), name="models")
    await manager.close()
