"""Counting instructions: the figures are sane,
and the gate falls where a request has become dearer.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..kit.processes import clean_environment
from .instructions import KEPT, exceeded, table
from .load import ROOT
from .rows import ROWS

_BEFORE = {"bare": 200.0, "address": 260.0}


@pytest.mark.parametrize(
    ("found", "over"),
    [
        pytest.param({"bare": 200.0, "address": 267.0}, False, id="within-3-percent"),
        pytest.param({"bare": 200.0, "address": 268.5}, True, id="over-3-percent"),
        pytest.param({"bare": 220.0, "address": 280.0}, False, id="a-dependency-moved-the-bare-app"),
        pytest.param({"bare": 180.0, "address": 260.0}, True, id="the-bare-app-became-cheaper-and-ours-did-not"),
        pytest.param({"bare": 200.0}, False, id="not-measured"),
    ],
)
def test_a_dearer_request_is_told_from_a_dearer_base(found: dict[str, float], over: bool) -> None:
    """The bound is what was kept, moved by what the bare app of the same run moved by."""
    assert over == bool(exceeded(found, _BEFORE))


def test_kept_rows_have_their_bases() -> None:
    """A kept figure without its base could not be compared."""
    for rows in json.loads(KEPT.read_text()).values():
        assert {ROWS[name].base or name for name in rows} <= set(rows)


def test_a_missed_promise_is_said() -> None:
    """A row says what it costs, what that is above its base, and whether that was promised."""
    lines = table({"bare": 200.0, "address": 300.0, "fastapi": 400.0, "depends": 520.0})
    assert lines[3] == "| one rule, by address | 300 | +100 | 0.67 | <= 265 | MISSED |"
    assert lines[5].endswith("| 520 | +120 | 0.77 | <= +140 | ok |")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is missing: apt-get install valgrind")
def test_counts_what_requests_cost(tmp_path: Path, server_binary: str) -> None:
    """A limit costs more than none, and less than the bare app does."""
    pytest.importorskip("uvloop")
    pytest.importorskip("httptools")
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "tests.benchmarks.instructions", "--rows", "bare,address"]
    command += ["--short", "300", "--long", "500", "--json", str(figures)]

    ran = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=300, check=False
    )

    assert ran.returncode == 0, ran.stderr
    found = json.loads(figures.read_text())["k"]
    assert 50 < found["bare"] < found["address"] < 2 * found["bare"]
