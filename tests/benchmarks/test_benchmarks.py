"""The benchmark runs; what it measures is nobody's business here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..kit.processes import clean_environment
from .load import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("load", ["python", "best"])
def test_benchmark_gives_sane_rows(tmp_path: Path, server_binary: str, load: str) -> None:
    """One round of two apps gives a row for each and a verdict on every promise."""
    raw = tmp_path / "raw.json"
    command = [sys.executable, "-m", "tests.benchmarks.ratelimit", "--quick", "--seconds", "0.2"]
    command += ["--apps", "bare,redis_asgi", "--json", str(raw)]
    if load == "python":
        command += ["--load", "python"]

    ran = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120, check=False
    )

    assert (0, "") == (ran.returncode, ran.stderr.replace("round 1 of 1\n", ""))
    assert "| redis_asgi " in ran.stdout
    assert "| a million limited clients in Redis" in ran.stdout
    samples = json.loads(raw.read_text())["samples"]
    assert [("bare", 32), ("redis_asgi", 32), ("bare", 1), ("redis_asgi", 1)] == [
        (sample["app"], sample["connections"]) for sample in samples
    ]
    for sample in samples:
        assert sample["rate"] > 0
        assert 0 < sample["p50"] <= sample["p99"]
        assert sample["errors"] == 0
    lone = samples[-1]
    assert lone["scripts"] == pytest.approx(1, rel=0.05)
