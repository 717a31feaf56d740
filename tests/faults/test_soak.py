"""Restart after restart: no 5xx, nobody served wrongly, used again at once, and nothing that grows.

``REDIS_ASGI_SOAK_SECONDS=600`` makes the long one last ten minutes.
"""

import asyncio
import os
import random
from pathlib import Path

import pytest

from ..conftest import StartServer
from .serving import serving
from .soak import QUOTA, Soak

SEED = 20_261_129


def soaked(start: StartServer, folder: Path, seconds: float, figures: list[str], *, restart_every: float) -> Soak:
    """A soak of *seconds*, and the checks that hold for any."""
    server = start()
    with serving(server.url, folder, workers=1, quota=QUOTA) as served:
        soak = Soak(served.port, server, random.Random(SEED))
        asyncio.run(soak.run(seconds, restart_every=restart_every))
    figures.append(f"soak of {seconds:.0f} s: {soak.figures()}")

    assert [] == soak.wrong
    assert set() == served.raised
    assert {} == soak.over()
    assert len(soak.recoveries) > 1
    assert 0 == soak.late, soak.figures()
    assert all(held["tasks"] < 60 for held in soak.held)
    assert all(held["files"] < 60 for held in soak.held)
    return soak


def test_restarts(private_server: StartServer, tmp_path: Path, figures: list[str]) -> None:
    """A few, one after another."""
    soaked(private_server, tmp_path, 1.5, figures, restart_every=0.4)


@pytest.mark.slow
def test_restarts_for_long(private_server: StartServer, tmp_path: Path, figures: list[str]) -> None:
    """One every few seconds; memory is flat."""
    seconds = float(os.environ.get("REDIS_ASGI_SOAK_SECONDS", "45"))
    soak = soaked(private_server, tmp_path, seconds, figures, restart_every=2.5)
    figures.append(f"memory grew by {soak.growth() - 1:.1%}")

    assert soak.growth() < 1.1
