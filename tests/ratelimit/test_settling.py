"""What has ended is settled together, and each of it exactly once, whatever its neighbours are."""

import asyncio
from typing import Any

import pytest
import redis
from starlette.requests import HTTPConnection

from redis_asgi import Decision, RateLimitMiddleware, RedisManager, Settings
from redis_asgi.ratelimit.counting.engine import Engine
from redis_asgi.ratelimit.counting.verdict import Verdict
from redis_asgi.ratelimit.limits.charge import Charge, Charges
from redis_asgi.ratelimit.limits.policy import PolicySet, make_partition
from redis_asgi.ratelimit.rules.policies import make_concurrency
from redis_asgi.testing import RateLimitClock

from ..conftest import StartServer
from ..kit.patience import PATIENCE, until
from ..kit.proxy import FaultProxy
from ..kit.servers import ExternalServer, Server
from .harness import Spy, changes_of, drive, header, http_scope, memory
from .histories import policy

pytestmark = pytest.mark.anyio

NAMES = [f"client-{n}" for n in range(40)]


def charges_of(name: str, cost: int = 1, *, strategy: Any = "fixed-window", quota: int = 1000) -> Charges:
    """A charge of *name* under two policies."""
    policies = PolicySet((policy(strategy, quota, 60, name="a"), policy(strategy, quota, 3600, name="b")))
    return Charges((Charge(policies, make_partition("custom", name), cost),))


async def admitted(engine: Engine, cost: int) -> list[Verdict]:
    """A verdict on each of `NAMES`."""
    return list(await asyncio.gather(*(engine.decide(charges_of(name, cost)) for name in NAMES)))


async def remaining(engine: Engine, name: str) -> list[int]:
    """What *name* has left of each policy."""
    decision = (await engine.decide(charges_of(name), "peek")).decision
    return [state.remaining for state in decision.policies]


async def test_what_ends_in_one_turn_leaves_in_few_checks(redis_server: ExternalServer, manager: RedisManager) -> None:
    """Charges and refunds of forty requests, under two policies each, and several of one counter."""
    engine = Engine(manager, timeout=1)
    verdicts = await admitted(engine, 10)
    before = redis_server.calls("evalsha")
    for n, verdict in enumerate(verdicts):
        engine.settle(verdict, changes_of(verdict, [-3 if n % 2 else 5] * 2))
        engine.settle(verdict, changes_of(verdict, [-2, 1]))
    found = [await remaining(engine, name) for name in NAMES]

    assert [[1000 - 10 + (3 if n % 2 else -5) + 2, 1000 - 10 + (3 if n % 2 else -5) - 1] for n in range(40)] == found
    assert redis_server.calls("evalsha") - before <= 40 + 6


async def test_what_has_ended_is_told_before_the_end(private_server: StartServer) -> None:
    """A worker that stops right behind its last answers loses none of their changes,
    and leaves nobody in flight.
    """
    server = private_server()
    held = Charges((Charge(make_concurrency("streams", 100), make_partition("custom", NAMES[0])),))
    async with FaultProxy(server.host, server.port) as proxy:
        far = RedisManager(Settings(REDIS_URL=proxy.url, RATE_LIMIT_TIMEOUT=PATIENCE))
        engine = Engine(far, timeout=PATIENCE)
        verdicts = [await engine.decide(held), *await admitted(engine, 10)]
        await proxy.set("delay", seconds=0.05)
        for verdict in verdicts[1:]:
            engine.settle(verdict, changes_of(verdict, [-3, 5]))
            await asyncio.sleep(0)
        verdicts[0].release()
        await far.close()

    near = RedisManager(Settings(REDIS_URL=server.url))
    engine = Engine(near, timeout=1)
    assert [[993, 985]] * len(NAMES) == [await remaining(engine, name) for name in NAMES]
    assert [100] == [state.remaining for state in (await engine.decide(held, "peek")).decision.policies]
    await near.close()


async def test_close_that_is_cancelled_leaves_no_connection(private_server: StartServer) -> None:
    """A server that hangs is waited for at the end, by whom that may take too long."""
    server = private_server()

    def connections() -> int:
        return len(server.client().client_list())

    before = connections()
    manager = RedisManager(Settings(REDIS_URL=server.url))
    engine = Engine(manager, timeout=PATIENCE)
    await remaining(engine, NAMES[0])
    assert before < connections()
    server.pause()
    asked = asyncio.ensure_future(remaining(engine, NAMES[0]))
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(manager.close(), 0.05)
    server.resume()

    await asked
    await until(lambda: before == connections())


async def test_odd_key_costs_its_own_settlement_only(redis_client: "redis.Redis", manager: RedisManager) -> None:
    """Neither what is charged nor what is given back beside it is lost."""
    engine = Engine(manager, timeout=1)
    verdicts = await admitted(engine, 10)
    redis_client.set(verdicts[7].charges[0].partition.key, "no hash")
    for n, verdict in enumerate(verdicts):
        engine.settle(verdict, changes_of(verdict, [-3 if n % 2 else 5] * 2))
    found = [await remaining(engine, name) for n, name in enumerate(NAMES) if n != 7]

    assert [[990 + (3 if n % 2 else -5)] * 2 for n in range(40) if n != 7] == found
    assert "closed" == manager.breaker_state


@pytest.mark.server
async def test_settlements_part_where_slots_are_enforced(slots_server: Server) -> None:
    """Found out by the settlement itself, or known before: each is made once."""
    manager = RedisManager(Settings(REDIS_URL=slots_server.url))
    engine = Engine(manager, timeout=1)
    one = await engine.decide(charges_of(NAMES[0], 10))
    other = await engine.decide(charges_of(NAMES[1], 10))
    for _ in range(2):
        engine.settle(one, changes_of(one, [-2, 4]))
        engine.settle(other, changes_of(other, [4, -2]))
        found = [await remaining(engine, name) for name in NAMES[:2]]
    state = manager.breaker_state
    await manager.close()

    assert [[994, 982], [982, 994]] == found
    assert "closed" == state


async def test_two_loops_settle_each_by_itself(settings: Settings) -> None:
    """A check that waits in one loop takes in nothing of another's."""
    manager = RedisManager(settings)
    engine = Engine(manager, timeout=1)

    async def work(names: list[str]) -> list[list[int]]:
        verdicts = [await engine.decide(charges_of(name, 10)) for name in names]
        for verdict in verdicts:
            engine.settle(verdict, changes_of(verdict, [-4, -4]))
        found = [await remaining(engine, name) for name in names]
        await manager.close()
        return found

    halves = await asyncio.gather(
        asyncio.to_thread(asyncio.run, work(NAMES[:20])), asyncio.to_thread(asyncio.run, work(NAMES[20:]))
    )
    assert [[[994, 994]] * 20] * 2 == list(halves)


async def test_a_refused_request_can_be_charged(rate_limit_clock: RateLimitClock) -> None:
    """``on_exceeded`` may make those wait longer who ask in vain."""

    def fined(conn: HTTPConnection, _decision: Decision) -> None:
        conn.state.rate_limit.charge(1)

    app = RateLimitMiddleware(Spy(), "1/minute", strategy="gcra", on_exceeded=fined, settings=memory())
    waits = [header((await drive(app, http_scope()))[0], b"retry-after") for _ in range(4)]

    assert [None, b"60", b"120", b"180"] == waits
