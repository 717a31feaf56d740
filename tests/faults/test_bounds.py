"""However the way to Redis behaves,
nobody is admitted more than documented, and nobody is charged twice.
"""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import pytest

from redis_asgi.ratelimit.limits.policy import STRATEGIES
from redis_asgi.settings import StrategyName
from redis_asgi.telemetry import fresh_telemetry

from ..conftest import StartServer
from ..kit.servers import Server
from . import oracle
from .chaos import DEADLINE, run
from .oracle import Count, Ledger
from .service import MODES

SEED = 20_261_129


def told(server: Server, strategy: StrategyName, seconds: float, **options: Any) -> tuple[Ledger, float]:
    """The ledger, and how long the slowest request took beyond what the loop was late by."""
    with fresh_telemetry():
        chance = random.Random(f"{SEED} {strategy}")
        ledger, slowest, worst = asyncio.run(run(server, strategy, seconds, chance, **options))
    return ledger, slowest - 3 * worst


@pytest.fixture(scope="module", params=STRATEGIES)
def short(request: pytest.FixtureRequest, server_binary: str) -> Iterator[tuple[Ledger, float]]:
    """A moment of chaos with one strategy."""
    server = Server.start(server_binary)
    yield told(server, request.param, 0.6)
    server.stop()


@pytest.mark.parametrize("mode", MODES)
def test_no_mode_admits_more_than_documented(short: tuple[Ledger, float], mode: str) -> None:
    """Redis the quota, the process its share beside it where it may,
    nobody else; each charge once at most.
    """
    ledger, _ = short

    assert {} == ledger.wrong(mode)
    assert ledger.is_telling


def test_nobody_waits_longer_than_the_deadline(
    short: tuple[Ledger, float], figures: list[str], request: pytest.FixtureRequest
) -> None:
    """Whatever the fault, and however it changes while a request waits."""
    ledger, slowest = short
    figures.append(f"bounds, {request.node.callspec.params['short']}: {oracle.figures(ledger)}")

    # The work of a wave is part of what its requests take.
    assert slowest < 2 * DEADLINE


def test_oracle_sees_a_client_that_is_counted_as_many(private_server: StartServer) -> None:
    """The control: where each connection has a quota of its own,
    more is admitted, and found in every mode.
    """
    ledger, _ = told(private_server(), "fixed-window", 0.2, sabotage="counters")

    assert all(ledger.wrong(mode) for mode in MODES)


@pytest.mark.parametrize(
    ("mode", "count", "fits"),
    [
        ("local", Count(redis=10, refused=10), True),
        ("local", Count(redis=11, refused=9), False),
        ("local", Count(redis=8, local=5, refused=7), True),
        ("local", Count(redis=8, local=6, refused=6), False),
        ("local", Count(redis=7, drained=3), True),
        pytest.param("closed", Count(redis=7, drained=2), False, id="a unit that nobody asked for"),
        pytest.param("closed", Count(redis=7, unavailable=1, drained=2), True, id="a lost reply, charged once"),
        pytest.param("closed", Count(redis=7, unavailable=1, drained=1), False, id="a lost reply, charged twice"),
        ("closed", Count(redis=10, local=1), False),
        ("open", Count(redis=10, none=30), True),
        ("open", Count(redis=9, none=1, drained=2), False),
        ("open", Count(redis=10, other=1), False),
    ],
)
def test_oracle_knows_what_is_documented(mode: str, count: Count, fits: bool) -> None:
    """A quota of ten, and a share of five in the process where it counts itself."""
    ledger = Ledger(10, divisor=2)
    ledger.counts[mode, "somebody"] = count

    assert fits is not bool(ledger.wrong(mode))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bounds_hold_for_long(private_server: StartServer, strategy: StrategyName, figures: list[str]) -> None:
    """Twelve seconds of it."""
    ledger, _ = told(private_server(), strategy, 12.0)
    figures.append(f"bounds, {strategy}: {oracle.figures(ledger)}")

    for mode in MODES:
        assert {} == ledger.wrong(mode)
