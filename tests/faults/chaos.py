"""A connection that changes its fault all the time, and clients who ask meanwhile."""

import asyncio
import random
import time
from itertools import count

from starlette.types import ASGIApp

from redis_asgi import RedisManager, Settings
from redis_asgi.settings import StrategyName

from ..kit.proxy import FaultProxy, Mode
from ..kit.servers import Server
from .asking import limited
from .oracle import Ledger
from .service import MODES, Endpoints, build
from .story import Control

QUOTA, DIVISOR = 10, 2
DEADLINE = 0.1  # seconds
Fault = tuple[Mode, float, int | None]
# Momentary ones, of which the breaker does not open, and such as last;
# each may come while anything is under way.
_BRIEF: tuple[Fault, ...] = (
    ("cut_replies", 0.0, 1),
    ("reset", 0.0, None),
    ("torn_replies", 0.0, None),
    ("delay", 0.02, None),
    ("chunk", 0.0, None),
)
_LASTING: tuple[Fault, ...] = (
    ("refuse", 0.0, None),
    ("drop_replies", 0.0, None),
    ("blackhole", 0.0, None),
    ("delay", 3 * DEADLINE, None),
)
_PATIENCE = 10.0  # seconds
_PER_CLIENT = 2 * QUOTA


async def disturb(proxy: FaultProxy, chance: random.Random) -> None:
    """One fault after another, with quiet between; every eighth lasts, and opens the breaker."""
    for number in count(1):
        lasts = number % 8 == 0
        mode, seconds, times = chance.choice(_LASTING if lasts else _BRIEF)
        await proxy.set(mode, seconds=seconds, times=times)
        await asyncio.sleep(0.15 if lasts else 0.005)
        if mode in ("drop_replies", "blackhole"):
            # TCP loses nothing in the middle of a connection that lives:
            # whoever lost something loses the connection.
            await proxy.set("reset")
        await proxy.set("pass")
        await asyncio.sleep(chance.uniform(0.02, 0.06))


async def run(
    server: Server, strategy: StrategyName, seconds: float, chance: random.Random, *, sabotage: str = ""
) -> tuple[Ledger, float, float]:
    """Waves of new clients for *seconds*,
    each client asking twice its quota of every mode; then the quotas' rest.

    Args:
        sabotage: As of `build`; nothing else is wrong then, and nothing is left to drain.

    Returns:
        What was answered, the longest that a request took, and how late the loop was at most.
    """
    ledger = Ledger(QUOTA, divisor=DIVISOR)
    async with FaultProxy(server.host, server.port) as proxy, Control() as control:
        settings = Settings(
            REDIS_URL=proxy.url, REDIS_TIMEOUT=1, RATE_LIMIT_TIMEOUT=DEADLINE, RATE_LIMIT_FALLBACK_DIVISOR=DIVISOR
        )
        manager = RedisManager(settings)
        app = build(manager, Endpoints(), quota=QUOTA, strategy=strategy, sabotage=sabotage)
        slowest = 0.0
        until = time.perf_counter() + seconds
        disturbance = asyncio.create_task(asyncio.Event().wait() if sabotage else disturb(proxy, chance))
        wave = 0
        # On a slow machine the first waves may all fall into one outage, which would say little.
        until_telling = until if sabotage else until + _PATIENCE
        while time.perf_counter() < until or (not ledger.is_telling and time.perf_counter() < until_telling):
            slowest = max(slowest, await _wave(app, ledger, f"10.2.{wave % 256}", chance))
            wave += 1
        disturbance.cancel()
        await asyncio.gather(disturbance, return_exceptions=True)
        worst = control.worst()
        await manager.close()
    if not sabotage:
        await _drain(server, strategy, ledger)
    return ledger, slowest, worst


async def _wave(app: ASGIApp, ledger: Ledger, network: str, chance: random.Random) -> float:
    async def ask(mode: str, client: str) -> float:
        await asyncio.sleep(chance.uniform(0.0, 0.2))
        answer = await limited(app, mode, client).run()
        ledger.note(mode, client, answer)
        return answer.seconds

    clients = [f"{network}.{number}" for number in range(4)]
    asked = [(mode, client) for mode in MODES for client in clients for _ in range(_PER_CLIENT)]
    chance.shuffle(asked)
    return max(await asyncio.gather(*(ask(*each) for each in asked)))


async def _drain(server: Server, strategy: StrategyName, ledger: Ledger) -> None:
    """Ask on as each client until Redis refuses, through an app that knows nothing of what was."""
    manager = RedisManager(Settings(REDIS_URL=server.url, RATE_LIMIT_TIMEOUT=20))
    app = build(manager, Endpoints(), quota=QUOTA, strategy=strategy)

    async def ask_on(mode: str, client: str) -> None:
        while (await limited(app, mode, client).run()).status == 200:
            ledger.counts[mode, client].drained += 1

    await asyncio.gather(*(ask_on(mode, client) for mode, client in tuple(ledger.counts)))
    await manager.close()
