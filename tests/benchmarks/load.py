"""Closed-loop HTTP load over kept-alive connections, from 200 clients in turn: ``wrk``,
or Python where it is missing.

A client is an ``X-Forwarded-For`` address, which uvicorn applies by default, and an ``X-API-Key``.
``python -m tests.benchmarks.load PORT CONNECTIONS SECONDS PATH`` is the Python one; both print one
line of JSON.
"""

import asyncio
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

CLIENTS = 200
ROOT = Path(__file__).resolve().parents[2]
_PATIENCE = 30  # seconds beyond the sample's own

WRK_SCRIPT = f"""
local requests, at = {{}}, 0
function init(args)
  for i = 1, {CLIENTS} do
    requests[i] = wrk.format("GET", wrk.path, {{["X-Forwarded-For"] = "10.0.0." .. i, ["X-API-Key"] = "key-" .. i}})
  end
end
function request()
  at = at % {CLIENTS} + 1
  return requests[at]
end
function done(summary, latency, requests)
  local errors = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  io.write(string.format(
    '\\n{{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "refused": %d, "errors": %d}}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    summary.errors.status, errors))
end
"""


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients saw."""

    requests: int
    seconds: float
    p50: float  # ms
    p99: float  # ms
    refused: int  # answers with a status above 399
    errors: int  # of sockets, time-outs included

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


def has_wrk() -> bool:
    """Whether ``wrk`` is on ``PATH``."""
    return shutil.which("wrk") is not None


def generate(port: int, connections: int, seconds: float, *, wrk: bool, folder: Path, path: str = "/") -> Load:
    """Put load on a local *port*; ``wrk`` counts in whole seconds, at least one.

    Args:
        folder: Where ``wrk``'s script is kept.

    Raises:
        RuntimeError: The generator failed; the message is what it printed.
    """
    if wrk:
        script = folder / "load.lua"
        if not script.exists():
            script.write_text(WRK_SCRIPT)
        options = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}", "-s", str(script)]
        command = ["wrk", *options, f"http://127.0.0.1:{port}{path}"]
    else:
        command = [sys.executable, "-m", "tests.benchmarks.load", str(port), str(connections), str(seconds), path]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds + _PATIENCE, check=False, cwd=ROOT)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    if ran.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)}\n{ran.stdout}{ran.stderr}")
    return Load(**json.loads(lines[-1]))


class _Client(asyncio.Protocol):
    """One connection: sends the next request when the answer to the last has come."""

    def __init__(self, run: "_Run") -> None:
        self._run = run
        self._received = b""
        self._sent_at = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank or len(body) < _content_length(head):
            return
        now = time.perf_counter()
        self._run.latencies.append(now - self._sent_at)
        self._run.refused += int(head[9:12]) > 399
        self._received = b""
        if now < self._run.ends_at:
            self._send()
        elif self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.errors += exc is not None or time.perf_counter() < self._run.ends_at
        self._run.open -= 1
        if not self._run.open:
            self._run.over.set()

    def _send(self) -> None:
        if self._transport is not None:
            self._sent_at = time.perf_counter()
            self._transport.write(self._run.next_request())


class _Run:
    """The state that the connections of one sample share."""

    def __init__(self, port: int, connections: int, seconds: float, path: str) -> None:
        self._requests = [
            b"GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nX-Forwarded-For: 10.0.0.%d\r\nX-API-Key: key-%d\r\n\r\n"
            % (path.encode(), port, i, i)
            for i in range(1, CLIENTS + 1)
        ]
        self._at = 0
        self.latencies: list[float] = []
        self.refused = 0
        self.errors = 0
        self.open = connections
        self.over = asyncio.Event()
        self.ends_at = time.perf_counter() + seconds

    def next_request(self) -> bytes:
        self._at = (self._at + 1) % CLIENTS
        return self._requests[self._at]


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


async def _load(port: int, connections: int, seconds: float, path: str) -> dict[str, Any]:
    run = _Run(port, connections, seconds, path)
    loop = asyncio.get_running_loop()
    begun = time.perf_counter()
    for _ in range(connections):
        await loop.create_connection(lambda: _Client(run), "127.0.0.1", port)
    await asyncio.wait_for(run.over.wait(), seconds + _PATIENCE)
    took = time.perf_counter() - begun
    times = sorted(run.latencies) or [0.0]
    return {
        "requests": len(run.latencies),
        "seconds": took,
        "p50": times[len(times) // 2] * 1e3,
        "p99": times[len(times) * 99 // 100] * 1e3,
        "refused": run.refused,
        "errors": run.errors,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_load(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]))))
