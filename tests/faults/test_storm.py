"""A storm of clients that leave at every stage, through real uvicorn, counted on both sides."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from ..conftest import StartServer
from ..kit.servers import Server, wait_until
from .serving import Served, serving
from .storm import Storm

QUOTA = 25
SEED = 20_261_129
# The machine may be slow under a storm, Redis is not.


def charged(server: Server) -> dict[str, int]:
    """What Redis has counted of each client, read without the package."""
    found = {}
    for key in server.client().scan_iter("rate_limit:{*}", count=1000):
        for value in server.client().hgetall(key).values():
            found[key.decode().partition("{")[2].rstrip("}")] = int(value.split()[1])
    return found


def storm(server: Server, served: Served, connections: int, *, clients: int = 8) -> tuple[Storm, list[str]]:
    """Run one, and what is wrong after it, when all that was under way has ended."""
    weather = Storm(served.port, QUOTA, random.Random(SEED), clients=clients)
    asyncio.run(weather.run(connections))
    wait_until(lambda: served.reached.total() == sum(charged(server).values()), "all is through")
    return weather, weather.verdict(served.reached, charged(server))


def settled(served: Served, before: dict[str, int]) -> dict[str, Any]:
    """What the one process holds when the storm's connections are gone."""
    wait_until(lambda: served.get("/process")["tasks"] <= before["tasks"] + 5, "its tasks have ended")
    return dict(served.get("/process"))


def test_storm_through_one_worker(private_server: StartServer, tmp_path: Path, figures: list[str]) -> None:
    """Nobody gets what is another's, Redis counts exactly what comes through,
    no 5xx, and nothing is left behind.
    """
    server = private_server()
    with serving(server.url, tmp_path, workers=1, quota=QUOTA) as served:
        before = served.get("/process")
        weather, wrong = storm(server, served, 500)
        after = settled(served, before)
    figures.append(f"storm, 1 worker: {weather.figures()}; before {before}, after {after}")

    assert [] == wrong
    assert weather.embeddings > 0 < weather.echoes
    assert {200, 429} == {status for _, status in weather.answers}
    # Its pools, and the files of what it imported last.
    assert after["files"] < before["files"] + 40
    assert set() == served.raised


def test_storm_finds_what_is_wrong(private_server: StartServer, tmp_path: Path) -> None:
    """The control: an app that shares vectors among callers and counts a client as many is found
    out, of both.
    """
    server = private_server()
    sabotage = "vectors and counters"
    with serving(server.url, tmp_path, workers=1, quota=QUOTA, FAULTS_SABOTAGE=sabotage) as served:
        weather = Storm(served.port, QUOTA, random.Random(SEED), clients=2)
        asyncio.run(weather.run(120))
        wrong = weather.verdict(served.reached, charged(server))

    assert any("vectors of" in line for line in wrong)
    assert any(line.endswith(f"came through of {QUOTA}") for line in wrong)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_long_storm(private_server: StartServer, tmp_path: Path, workers: int, figures: list[str]) -> None:
    """Thousands of them, on four workers that share the clients too."""
    server = private_server()
    with serving(server.url, tmp_path, workers=workers, quota=QUOTA) as served:
        weather, wrong = storm(server, served, 6000, clients=80)
    figures.append(f"storm, {workers} workers: {weather.figures()}")

    assert [] == wrong
    assert set() == served.raised
