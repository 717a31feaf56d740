"""Redis Cluster: limits hold across slots and nodes,
and a node that dies takes only its own clients along.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot

from redis_asgi import Decision, RateLimiter, RedisManager, Settings
from redis_asgi.ratelimit.counting.engine import Engine
from redis_asgi.ratelimit.counting.verdict import Verdict
from redis_asgi.ratelimit.limits.charge import Charge, Charges, Unread
from redis_asgi.ratelimit.limits.policy import STRATEGIES, Partition, PolicySet, make_partition
from redis_asgi.settings import StrategyName

from ..kit.fair_time import fair_time
from ..kit.patience import PATIENCE, leave_unread
from ..kit.servers import SLOTS, Cluster, Server
from .harness import all_answered, changes_of
from .histories import policy

pytestmark = pytest.mark.anyio
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def manager_of(cluster: Cluster, **values: Any) -> RedisManager:
    """A manager of the whole cluster."""
    return RedisManager(Settings(REDIS_URL=cluster.url, REDIS_CLUSTER=True, **values))


def limiter_of(cluster: Cluster, **options: Any) -> RateLimiter:
    """A limiter on the whole cluster, patient unless told otherwise."""
    return RateLimiter(manager_of(cluster), **({"timeout": 5} | options))


def clients_of(cluster: Cluster, node: Server, count: int) -> list[str]:
    """Clients whose counters live on *node*."""
    found: list[str] = []
    i = 0
    while len(found) < count:
        name = f"client-{i}"
        if cluster.node_of(make_partition("custom", name).key) is node:
            found.append(name)
        i += 1
    return found


def charges(*who: Partition, quotas: Sequence[int], strategy: str = "fixed-window") -> Charges:
    """One rule per partition, with a quota each."""
    return Charges(
        Charge(PolicySet((policy(strategy, quota, 60, name=f"rule-{i}"),)), partition)
        for i, (partition, quota) in enumerate(zip(who, quotas, strict=True))
    )


def remaining(verdict: Verdict) -> list[int]:
    """Units left, by policy."""
    return [state.remaining for state in verdict.decision.policies]


@every_strategy
async def test_limits_are_exact_across_all_slots(cluster: Cluster, strategy: StrategyName) -> None:
    """Sixty clients, twelve requests each, all at once:
    ten of each are admitted, wherever they live.
    """
    limiter = limiter_of(cluster)
    names = [f"client-{i}" for i in range(60)]
    decisions = await asyncio.gather(
        *(limiter.consume(name, "10/hour", strategy=strategy) for _ in range(12) for name in names)
    )

    assert {"redis"} == {decision.source for decision in decisions}
    assert [10] * 60 == [sum(d.allowed for d in decisions[i::60]) for i in range(60)]
    assert all(node.client().dbsize() > 0 for node in cluster.nodes)


async def test_batches_share_trips_per_node(cluster: Cluster) -> None:
    """Three hundred requests of one client at once make a few pipelines, not three hundred."""
    limiter = limiter_of(cluster)
    await limiter.consume("warm")
    before = sum(node.calls("evalsha") for node in cluster.nodes)
    await asyncio.gather(*(limiter.consume("a", "1000/hour") for _ in range(300)))

    assert sum(node.calls("evalsha") for node in cluster.nodes) - before <= 10


@every_strategy
async def test_flushed_scripts_count_once(cluster: Cluster, strategy: StrategyName) -> None:
    """NOSCRIPT ran nothing, so the batch goes once more and every request is counted once."""
    limiter = limiter_of(cluster)
    names = [clients_of(cluster, node, 1)[0] for node in cluster.nodes]
    for turn in range(3):
        for node in cluster.nodes:
            node.command("SCRIPT", "FLUSH")
        decisions = await asyncio.gather(*(limiter.consume(name, "9/hour", strategy=strategy) for name in names))
        assert [("redis", 8 - turn)] * 3 == [(d.source, d.policies[0].remaining) for d in decisions]


async def test_reset_and_peek_find_the_right_node(cluster: Cluster) -> None:
    """On every node, the logs of moving windows included."""
    limiter = limiter_of(cluster, strategy="moving-window")
    for node in cluster.nodes:
        (name,) = clients_of(cluster, node, 1)
        await limiter.consume(name, "5/minute")
        assert 4 == (await limiter.peek(name, "5/minute", cost=0)).policies[0].remaining
        assert [True, False] == [await limiter.reset(name) for _ in range(2)]
        assert 0 == node.client().dbsize()


@every_strategy
async def test_rules_in_two_slots_are_decided_together(cluster: Cluster, strategy: str) -> None:
    """By address and by key, on two nodes: what one refuses, the other gets back."""
    engine = Engine(manager_of(cluster), timeout=5)
    address = make_partition("custom", clients_of(cluster, cluster.nodes[0], 1)[0])
    key = make_partition("custom", clients_of(cluster, cluster.nodes[1], 1)[0])
    asked = charges(address, key, quotas=(10, 2), strategy=strategy)

    verdicts = [await engine.decide(asked) for _ in range(2)]
    refused = await engine.decide(asked)
    await all_answered(engine.manager)  # the refund is a batch of its own

    assert [(True, [9, 1]), (True, [8, 0])] == [(verdict.allowed, remaining(verdict)) for verdict in verdicts]
    assert (False, ("rule-1",)) == (refused.allowed, refused.decision.violated)
    assert [8, 0] == remaining(await engine.decide(asked, "peek"))


@every_strategy
async def test_what_remains_is_given_back_whole_when_another_slot_refuses(cluster: Cluster, strategy: str) -> None:
    """A body that nobody can read holds all of one rule,
    until it is known that the other refuses the request.
    """
    engine = Engine(manager_of(cluster), timeout=5)
    who = [make_partition("custom", clients_of(cluster, node, 1)[0]) for node in cluster.nodes[:2]]
    asked = charges(*who, quotas=(10, 1), strategy=strategy)
    unread = Charges((replace(asked[0], unread=Unread()), asked[1]))

    first = await engine.decide(unread)
    assert (True, [0, 0], [10, 1]) == (first.allowed, remaining(first), first.taken)
    engine.settle(first, changes_of(first, [-7, 0]))
    await all_answered(engine.manager)
    assert [6] == remaining(await engine.decide(Charges(asked[:1])))
    refused = await engine.decide(unread)
    await all_answered(engine.manager)

    assert (False, [6, 0]) == (refused.allowed, remaining(refused))
    assert [6, 0] == remaining(await engine.decide(asked, "peek"))


async def test_rules_in_two_slots_never_over_admit(cluster: Cluster) -> None:
    """A hundred requests at once, thirty admitted by the tighter rule;
    the wider one is charged for those alone.
    """
    engine = Engine(manager_of(cluster), timeout=5)
    address = make_partition("custom", clients_of(cluster, cluster.nodes[0], 1)[0])
    key = make_partition("custom", clients_of(cluster, cluster.nodes[2], 1)[0])
    asked = charges(address, key, quotas=(1000, 30))

    verdicts = await asyncio.gather(*(engine.decide(asked) for _ in range(100)))
    await all_answered(engine.manager)

    assert 30 == sum(verdict.allowed for verdict in verdicts)
    assert [970, 0] == remaining(await engine.decide(asked, "peek"))


async def test_what_is_given_back_is_not_remembered_as_gone(cluster: Cluster) -> None:
    """A client that was refused only for a unit which another request gave back at once is admitted
    again at once.
    """
    engine = Engine(manager_of(cluster), timeout=5)
    address = make_partition("custom", clients_of(cluster, cluster.nodes[0], 1)[0])
    key = make_partition("custom", clients_of(cluster, cluster.nodes[1], 1)[0])
    both = charges(address, key, quotas=(1, 1))
    by_address, by_key = Charges(both[:1]), Charges(both[1:])
    assert (await engine.decide(by_key)).allowed

    refused = await asyncio.gather(engine.decide(both), engine.decide(by_address))
    await all_answered(engine.manager)

    assert [["rule-1"], ["rule-0"]] == [list(verdict.decision.violated) for verdict in refused]
    assert (await engine.decide(by_address)).allowed


async def test_later_charges_reach_both_slots(cluster: Cluster) -> None:
    """What a response changes is settled where each rule's counter lives."""
    engine = Engine(manager_of(cluster), timeout=5)
    who = [make_partition("custom", clients_of(cluster, node, 1)[0]) for node in cluster.nodes[:2]]
    asked = charges(*who, quotas=(10, 10))
    verdict = await engine.decide(asked)

    engine.settle(verdict, changes_of(verdict, [3, -1]))
    await all_answered(engine.manager)

    assert [6, 10] == remaining(await engine.decide(asked, "peek"))


async def test_rules_of_a_dead_and_a_live_node_are_decided_here(private_cluster: Cluster) -> None:
    """When one half cannot be asked, this process decides about both,
    and the other half gets its unit back.
    """
    engine = Engine(manager_of(private_cluster), timeout=PATIENCE)
    alive, dead, _ = private_cluster.nodes
    who = [make_partition("custom", clients_of(private_cluster, node, 1)[0]) for node in (alive, dead)]
    asked = charges(*who, quotas=(10, 10))
    assert (True, "redis") == ((verdict := await engine.decide(asked)).allowed, verdict.source)
    dead.kill()

    verdict = await engine.decide(asked)
    await all_answered(engine.manager)

    assert (True, "local", [9, 9]) == (verdict.allowed, verdict.source, remaining(verdict))
    assert [9] == remaining(await engine.decide(Charges(asked[:1]), "peek"))


@pytest.mark.parametrize("decodes", [False, True])
async def test_client_of_the_user_is_used_as_it_is(cluster: Cluster, decodes: bool) -> None:
    """A ``RedisCluster`` somebody already has: the same decisions, and it stays open."""
    node = cluster.nodes[0]
    async with aioredis.RedisCluster(
        host=node.host, port=node.port, decode_responses=decodes, retry=Retry(NoBackoff(), 0)
    ) as client:
        limiter = RateLimiter(client, timeout=5)
        decisions = [await limiter.consume("a", "2/minute", strategy="moving-window") for _ in range(3)]

        assert [(True, "redis"), (True, "redis"), (False, "redis")] == [(d.allowed, d.source) for d in decisions]
        assert [True, False] == [await limiter.reset("a", name="default") for _ in range(2)]
        assert await client.ping()


async def test_stray_reply_is_nobodys(cluster: Cluster) -> None:
    """What is left unread in a node's connection is not taken for the answer to a check."""
    manager = manager_of(cluster)
    limiter = RateLimiter(manager, timeout=5)
    client = await manager.get_connection()
    assert isinstance(client, aioredis.RedisCluster)
    assert 1 == (await limiter.consume("a", "2/hour")).policies[0].remaining
    for node in client.get_primaries():
        for connection in node._free:
            await leave_unread(connection, "PING")

    decision = await limiter.consume("a", "2/hour")
    assert (True, "redis", 0) == (decision.allowed, decision.source, decision.policies[0].remaining)
    await manager.close()


async def ask_all(limiter: RateLimiter, names: Sequence[str]) -> tuple[list[Decision], float]:
    """The decisions about one request of each, and how long the slowest took."""
    slowest = 0.0

    async def ask(name: str) -> Decision:
        nonlocal slowest
        started = fair_time()
        decision = await limiter.consume(name, "1000/hour")
        slowest = max(slowest, fair_time() - started)
        return decision

    return list(await asyncio.gather(*(ask(name) for name in names))), slowest


@pytest.mark.parametrize("how", ["killed", "hung"])
async def test_dead_node_degrades_only_its_own_clients(private_cluster: Cluster, how: str) -> None:
    """Clients on the other nodes keep being counted by Redis,
    all are answered in time, and nothing is raised.
    """
    manager = manager_of(private_cluster)
    patient, limiter = RateLimiter(manager), RateLimiter(manager, timeout=1)
    dead, *alive = private_cluster.nodes[::-1]
    theirs = clients_of(private_cluster, dead, 5)
    ours = [name for node in alive for name in clients_of(private_cluster, node, 5)]
    decisions, _ = await ask_all(patient, ours + theirs)
    assert {"redis"} == {decision.source for decision in decisions}

    if how == "killed":
        dead.kill()
    else:
        dead.pause()
    try:
        for _ in range(5):
            decisions, slowest = await ask_all(limiter, ours + theirs)
            assert slowest < 1.3
            assert {"local"} == {decision.source for decision in decisions[len(ours) :]}
            assert {"redis"} == {decision.source for decision in decisions[: len(ours)]}
            await asyncio.sleep(0.1)
    finally:
        if how == "hung":
            dead.resume()


async def test_moved_slot_is_followed(private_cluster: Cluster) -> None:
    """After an operator moved a client's slot, its count goes on at the new node."""
    limiter = limiter_of(private_cluster)
    source, target, _ = private_cluster.nodes
    (name,) = clients_of(private_cluster, source, 1)
    await limiter.consume(name, "9/hour")
    slot = key_slot(make_partition("custom", name).key)
    assert 0 <= slot < SLOTS

    private_cluster.move_slot(slot, target)
    decisions = [await limiter.consume(name, "9/hour") for _ in range(3)]

    assert "redis" == decisions[-1].source
    assert 9 - 1 - sum(d.source == "redis" for d in decisions) == decisions[-1].policies[0].remaining
    assert 1 == target.client().dbsize()
