"""The benchmarks run; what they measure is nobody's business here."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ..kit.processes import clean_environment
from ..kit.servers import Server
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


def test_cache_benchmark_gives_every_ratio(private_server: Callable[..., Server]) -> None:
    """Each way to answer is timed, each promise has its ratio,
    and a warm call never reached the app.
    """
    command = [sys.executable, "-m", "tests.benchmarks.embeddings", "--no-peers"]

    ran = subprocess.run(
        command,
        cwd=ROOT,
        env=clean_environment(REDIS_URL=private_server().url),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert (0, "") == (ran.returncode, ran.stderr)
    ratios = re.findall(r"^(\w.* / \w.*) \(<=? \d.*\) +(\d+\.\d\d) +(\d+\.\d\d)$", ran.stdout, re.MULTILINE)
    assert {
        "base64 from Redis / MGET and join",
        "base64 in process / MGET and join",
        "float in process / base64 in process",
        "float from Redis / MGET and orjson",
    } == {name for name, _, _ in ratios}
    assert all(float(best) > 0 and float(median) > 0 for _, best, median in ratios)
    assert 2 == len(re.findall(r"longest stall, .*at worst of \d+ \d+\.\d ms", ran.stdout))
    assert "bytes per vector in Redis      7304" in ran.stdout


def test_cache_benchmark_says_what_it_lacks() -> None:
    """One line, without a traceback."""
    command = [sys.executable, "-m", "tests.benchmarks.embeddings"]
    env = clean_environment(REDIS_URL="redis://127.0.0.1:1/0")
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (1, 1) == (ran.returncode, ran.stderr.count("\n"))
    assert ran.stderr.startswith("No Redis to measure with")
