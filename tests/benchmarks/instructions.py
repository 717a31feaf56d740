"""How many instructions one request costs:
the figure that does not depend on how busy the machine is.

::

    python -m pip install -e '.[bench]'
    python -m tests.benchmarks.instructions [--rows bare,address] [--json FILE] [--compare]

Each row's app is served by one uvicorn worker (uvloop, httptools, no access log) under valgrind's
cachegrind, which counts the user-space instructions of the whole process. A row is served twice,
for a short and a long run of requests over 32 connections, and its figure is the difference divided
by the requests between them: what starting and warming up cost falls out of it. It repeats within
about 1 % on one machine and interpreter, 2 % where the machine is busy and batches are smaller; on
others compare what is above the bare app. It says nothing of waiting, of the kernel, or of what
Redis does.

With ``--compare`` the figures kept in ``instructions.json`` are the bounds, and 1 is returned where
one is exceeded by more than 3 % in a second run of its row too; ``--keep`` writes them anew.
"""

import argparse
import asyncio
import compileall
import gc
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import cast

import uvicorn

from redis_asgi.ratelimit.limits.clock import CLOCK

from ..kit.processes import clean_environment
from ..kit.servers import Server, find_binaries, free_port
from .load import ROOT
from .rows import ROWS, Row

CONNECTIONS = 32
SHORT, LONG = 600, 1800  # requests; in the short run each of 200 clients has been seen three times
TOLERATED = 1.03
KEPT = Path(__file__).with_name("instructions.json")
_SLOWNESS = 300  # seconds that a run may take


class Broken(Exception):
    """Something did not do what it is there for, so that its figures would mean nothing."""


class Served:
    """A process under cachegrind that has imported everything,
    and serves each run from a fork of itself.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = (folder / "log").open("wb")
        command = ["valgrind", "--tool=cachegrind", "--cache-sim=no", f"--cachegrind-out-file={folder}/%p.out"]
        self._process = subprocess.Popen(
            [*command, sys.executable, "-m", "tests.benchmarks.instructions", "--serve"],
            cwd=ROOT,
            env=clean_environment(PYTHONHASHSEED="0"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def run(self, name: str, row: Row, url: str, requests: int) -> int:
        """Serve *row* for as many *requests* and return the instructions of the whole process.

        Raises:
            Broken: The app ended early, or answered what the row is not about.
        """
        port = free_port()
        pid = int(self._ask(f"{name} {port} {url}"))
        try:
            statuses = asyncio.run(asyncio.wait_for(_send(port, row.requests, requests), _SLOWNESS))
        except (OSError, TimeoutError) as error:
            raise Broken(f"{row.title}: {error!r}\n{self._said()}") from error
        finally:
            os.kill(pid, signal.SIGINT)
            ended = self._read()
        refused = statuses.get(429, 0)
        expected = requests - len(row.requests) if row.refuses else 0
        if set(statuses) - {200, 429} or not expected <= refused <= (requests if row.refuses else 0):
            raise Broken(f"{row.title} answered {statuses}.\n{self._said()}")
        found = re.search(r"^summary: (\d+)", (self._folder / f"{pid}.out").read_text(), re.MULTILINE)
        if ended != "ended" or found is None:
            raise Broken(f"{row.title} did not end well: {ended!r}\n{self._said()}")
        return int(found[1])

    def _ask(self, line: str) -> str:
        print(line, file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _said(self) -> str:
        return (self._folder / "log").read_text(errors="replace")[-3000:]

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=_SLOWNESS)
        self._log.close()


def _serve() -> None:
    """Fork for every line ``NAME PORT URL`` of standard input:
    print the pid at once, and ``ended`` at its end.
    """
    for line in sys.stdin:
        name, port, url = line.split()
        pid = os.fork()
        if not pid:
            try:
                if ROWS[name].refuses:
                    # A refusal is remembered for a second,
                    # in which this slow motion answers a few dozen requests.
                    CLOCK.monotonic = repeat(CLOCK.monotonic()).__next__
                app = ROWS[name].build(url)
                # One collection of everything imported costs what ten thousand requests do not:
                # whether the long run has one more than the short one would decide the figure.
                gc.collect()
                gc.freeze()
                uvicorn.run(app, port=int(port), access_log=False, log_level="warning", loop="uvloop", http="httptools")
            except KeyboardInterrupt:
                pass
            finally:
                os._exit(0)
        print(pid, flush=True)
        os.waitpid(pid, 0)
        print("ended", flush=True)


class _Connection(asyncio.Protocol):
    """One connection: the next request goes out when the answer to the last has come."""

    def __init__(self, run: "_Run") -> None:
        self._run = run
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._next()

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", self._received[: max(end, 0)], re.IGNORECASE)
        if end < 0 or length is None or len(self._received) < end + 4 + int(length[1]):
            return
        status = int(self._received[9:12])
        self._run.statuses[status] = self._run.statuses.get(status, 0) + 1
        self._received.clear()
        self._next()

    def _next(self) -> None:
        request = next(self._run.requests, None)
        if request is None:
            self._transport.close()
        else:
            self._transport.write(request)

    def connection_lost(self, exc: Exception | None) -> None:
        self._run.open -= 1
        if not self._run.open:
            self._run.over.set()


class _Run:
    """What the connections of one run share."""

    def __init__(self, requests: Sequence[bytes], count: int) -> None:
        self.requests: Iterator[bytes] = (requests[n % len(requests)] for n in range(count))
        self.statuses: dict[int, int] = {}
        self.open = CONNECTIONS
        self.over = asyncio.Event()


async def _send(port: int, requests: Sequence[bytes], count: int) -> Mapping[int, int]:
    """Send *count* of *requests* in turn; how often each status came."""
    run = _Run(requests, count)
    loop = asyncio.get_running_loop()
    begun = time.monotonic()
    while True:
        try:
            first, _ = await loop.create_connection(asyncio.Protocol, "127.0.0.1", port)
        except OSError:
            if time.monotonic() > begun + 60:
                raise
            await asyncio.sleep(0.05)
        else:
            first.close()
            break
    for _ in range(CONNECTIONS):
        await loop.create_connection(lambda: _Connection(run), "127.0.0.1", port)
    await run.over.wait()
    if sum(run.statuses.values()) != count:
        raise OSError(f"{count} requests, answers {run.statuses}")
    return run.statuses


@contextmanager
def _redis() -> Iterator[Server]:
    server = Server.start(find_binaries()[0])
    try:
        yield server
    finally:
        server.stop()


def measure(names: Sequence[str], short: int, long: int) -> dict[str, float]:
    """Thousands of instructions of one request, for each of *names*.

    Raises:
        Broken: A row did not answer as it should.
    """
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="redis-asgi-") as folder, _redis() as server:
        served = Served(Path(folder))
        try:
            for name in names:
                totals = []
                for count in (short, long):
                    server.flush()
                    totals.append(served.run(name, ROWS[name], server.url, count))
                found[name] = (totals[1] - totals[0]) / (long - short) / 1e3
                print(f"{ROWS[name].title}: {found[name]:.0f} k", file=sys.stderr, flush=True)
        finally:
            served.close()
    return found


@dataclass(frozen=True, slots=True)
class Verdict:
    """A row beside its promise."""

    row: Row
    found: float  # k instructions
    base: float | None  # k instructions of the app it is compared with

    def cells(self) -> list[str]:
        """The row of the printed table."""
        above = "" if self.base is None else f"{self.found - self.base:+.0f}"
        share = "" if self.base is None else f"{self.base / self.found:.2f}"
        promise = "" if self.row.promise is None else f"<= {'+' * self.row.above}{self.row.promise}"
        return [self.row.title, f"{self.found:.0f}", above, share, promise, self.verdict]

    @property
    def verdict(self) -> str:
        """Whether the promise is kept; empty where there is none."""
        if self.row.promise is None or (self.row.above and self.base is None):
            return ""
        cost = self.found - (self.base or 0) if self.row.above else self.found
        return "ok" if cost <= self.row.promise else "MISSED"


def table(found: Mapping[str, float]) -> list[str]:
    """The rows as Markdown."""
    lines = [["app", "k instructions", "above its base", "base / own", "promise", "verdict"]]
    lines += [Verdict(ROWS[name], cost, found.get(ROWS[name].base or "")).cells() for name, cost in found.items()]
    lines.insert(1, ["---", *["---:"] * 4, "---"])
    return [f"| {' | '.join(line)} |" for line in lines]


def exceeded(found: Mapping[str, float], kept: Mapping[str, float]) -> dict[str, str]:
    """By row, a sentence on what costs over 3 % more than was kept,
    once the base's own change is taken off.
    """
    lines = {}
    for name, before in kept.items():
        base = ROWS[name].base
        if base is None or name not in found:
            continue
        allowed = before + found[base] - kept[base]
        if found[name] > allowed * TOLERATED:
            share = found[name] / allowed - 1
            lines[name] = (
                f"{ROWS[name].title}: {found[name]:.1f} k a request where {allowed:.1f} k were kept ({share:+.1%})"
            )
    return lines


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.instructions", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", default="", help=f"some of them, by comma: {', '.join(ROWS)}")
    parser.add_argument("--short", type=int, default=SHORT, help="requests of the short run")
    parser.add_argument("--long", type=int, default=LONG, help="requests of the long run")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--compare", action="store_true", help="the rows that are kept, against their figures")
    parser.add_argument("--keep", action="store_true", help="write the figures of the rows that are kept anew")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _missing() -> str | None:
    """What is needed and not there."""
    if shutil.which("valgrind") is None:
        return "valgrind is missing: on Debian, apt-get install valgrind."
    if find_spec("uvloop") is None or find_spec("httptools") is None:
        return "uvloop and httptools are missing: python -m pip install uvloop httptools."
    return None if find_binaries() else "No redis-server or valkey-server found."


def _compile() -> None:
    """Compile all that rows may import, else the first run of a row does,
    and its second one seems to cost less.
    """
    for folder in {
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        *(str(ROOT / name) for name in ("redis_asgi", "tests")),
    }:
        compileall.compile_dir(folder, quiet=2, workers=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 0 unless something broke or, with ``--compare``, a figure is exceeded."""
    options = _arguments(argv)
    if options.serve:
        _serve()
        return 0
    kept: dict[str, dict[str, float]] = json.loads(KEPT.read_text())
    version = ".".join(platform.python_version_tuple()[:2])
    wanted = options.rows.split(",") if options.rows else list(ROWS)
    if options.compare or options.keep:
        wanted = list(kept.get(version) or next(iter(kept.values())))
    unknown = [name for name in wanted if name not in ROWS]
    if (missing := _missing()) or unknown:
        print(missing or f"No such row: {', '.join(unknown)}", file=sys.stderr)
        return 1
    if options.compare and version not in kept:
        print(
            f"Figures are kept for Python {', '.join(kept)}, not for {version}: add them with --keep.", file=sys.stderr
        )
        return 1
    names = [name for name in wanted if ROWS[name].needs is None or find_spec(str(ROWS[name].needs))]
    _compile()
    try:
        found = measure(names, options.short, options.long)
        over = exceeded(found, kept[version]) if options.compare else {}
        if over:
            # A busy machine makes smaller batches, some 2 % dearer: what is dearer itself stays so.
            again = measure(sorted({*over, *(str(ROWS[name].base) for name in over)}), options.short, options.long)
            found |= again
            over = exceeded(again, kept[version])
    except Broken as error:
        print(f"Broken: {error}", file=sys.stderr)
        return 1
    print(*table(found), sep="\n")
    figures = {name: round(cost, 1) for name, cost in found.items()}
    if options.json:
        options.json.write_text(json.dumps({"python": platform.python_version(), "k": figures}, indent=1))
    if options.keep:
        KEPT.write_text(json.dumps({**kept, version: figures}, indent=1) + "\n")
    print(*over.values(), sep="\n", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
