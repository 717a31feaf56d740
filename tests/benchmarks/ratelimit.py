"""How fast rate limiting is: every app in turn, round after round, and ratios taken within a round.

::

    python -m pip install -e '.[bench]'
    python -m tests.benchmarks.ratelimit [--quick] [--json FILE]

All servers run side by side and wait; each round puts a short load on one after the other, so that
what slows the machine down slows all of them. Where the system allows it the server under load has
one core, and Redis and the load generator another. Only the ratios of one run mean anything on
another machine.
"""

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from http.client import HTTPConnection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from redis_asgi import RateLimiter, RedisManager, Settings

from ..kit.processes import clean_environment
from ..kit.servers import Server, find_binaries, free_port, wait_until
from .apps import APPS, is_installed
from .load import CLIENTS, ROOT, Load, generate, has_wrk
from .machine import Usage, cpu_seconds, pin, two_cores
from .report import MANY, Results, Sample, promise_table, promises, table

# Redis's own tables, which double,
# are as full with a million divided by a power of two as with a million.
MEASURED_CLIENTS = 62_500
FEW_CLIENTS = 7_812
_WARM_UP = 0.3  # seconds
_PACKAGES = ("redis", "starlette", "uvicorn", "uvloop", "httptools", "fastapi")
_PEERS = ("limits", "throttled-py", "asgi-ratelimit", "slowapi", "fastapi-limiter")


class Broken(Exception):
    """Something did not do what it is there for, so that its figures would mean nothing."""


@dataclass(frozen=True, slots=True)
class Serving:
    """An app that runs in a process of its own."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def answers(self) -> bool:
        """Whether it answers a request.

        Raises:
            Broken: It has ended; the message is what it printed.
        """
        if self.process.poll() is not None:
            raise Broken(f"{self.name} ended:\n{self.log.read_text(errors='replace')[-3000:]}")
        connection = HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("GET", "/")
        status = connection.getresponse().status
        connection.close()
        if status >= 500:
            raise Broken(f"{self.name} answers {status}:\n{self.log.read_text(errors='replace')[-3000:]}")
        return True


@contextmanager
def serving(name: str, url: str, folder: Path) -> Iterator[Serving]:
    """Start an app with one uvicorn worker; it ends with the block."""
    log = folder / f"{name}.log"
    port = free_port()
    command = [sys.executable, "-m", "tests.benchmarks.apps", name, str(port), url]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stdout=output, stderr=output)
    try:
        yield Serving(name, process, port, log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True, slots=True)
class RedisCounters:
    """What Redis has done so far."""

    cpu: float  # seconds
    reads: int  # from sockets, the one of this look included
    scripts: int

    @classmethod
    def of(cls, server: Server) -> "RedisCounters":
        """Look."""
        found: dict[str, Any] = server.client().info("all")
        scripts = sum(found.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "eval"))
        cpu = found["used_cpu_user"] + found["used_cpu_sys"]
        return cls(cpu, found["total_reads_processed"], scripts)


def sample(app: Serving, connections: int, seconds: float, server: Server, *, wrk: bool, folder: Path) -> Sample:
    """Put load on one app and look at what it, its clients and Redis did.

    Raises:
        Broken: Answers are not what the app is there to give.
    """
    pid = app.process.pid
    usage, counters, cpu = Usage.now(pid, server.pid), RedisCounters.of(server), cpu_seconds(pid)
    load = generate(app.port, connections, seconds, wrk=wrk, folder=folder, path=APPS[app.name].path)
    cpu_later, counters_later, usage_later = cpu_seconds(pid), RedisCounters.of(server), Usage.now(pid, server.pid)
    check(app.name, load)
    n = load.requests
    return Sample(
        app=app.name,
        connections=connections,
        rate=load.rate,
        p50=load.p50,
        p99=load.p99,
        errors=load.errors,
        server_cpu=None if cpu is None or cpu_later is None else (cpu_later - cpu) / n * 1e6,
        redis_cpu=(counters_later.cpu - counters.cpu) / n * 1e6,
        trips=(counters_later.reads - counters.reads - 1) / n,
        scripts=(counters_later.scripts - counters.scripts) / n,
        others=usage_later.others_since(usage),
    )


def check(name: str, load: Load) -> None:
    """Nothing is refused, or all but each client's first request.

    Raises:
        Broken: It is otherwise.
    """
    admitted = load.requests - load.refused
    if not load.requests or (admitted > CLIENTS if APPS[name].refuses else load.refused):
        raise Broken(f"{name}: {load.refused} of {load.requests} requests were refused.")


def measure(
    names: Sequence[str],
    rounds: int,
    seconds: float,
    server: Server,
    *,
    patience: float,
    wrk: bool,
    folder: Path,
) -> list[Sample]:
    """Every app in turn at 32 connections and at one, round after round, forwards and backwards.

    A sample that others disturbed is taken again, whatever it shows,
    until *patience* seconds have gone into that.
    """
    server_core, other_core = two_cores()
    samples: list[Sample] = []
    with ExitStack() as stack:
        dead_url = f"redis://127.0.0.1:{free_port()}"
        apps = [
            stack.enter_context(serving(name, dead_url if APPS[name].redis_is_dead else server.url, folder))
            for name in names
        ]
        for app in apps:
            wait_until(app.answers, f"{app.name} answers", within=30)
            pin(app.process.pid, server_core)
        pin(os.getpid(), other_core)
        pin(server.pid, other_core)
        for app in apps:
            check(app.name, generate(app.port, MANY, _WARM_UP, wrk=False, folder=folder, path=APPS[app.name].path))
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
            for connections in (MANY, 1):
                for app in apps if number % 2 == 0 else reversed(apps):
                    taken = sample(app, connections, seconds, server, wrk=wrk, folder=folder)
                    while taken.disturbed and patience > 0:
                        begun = time.monotonic()
                        time.sleep(1)
                        taken = sample(app, connections, seconds, server, wrk=wrk, folder=folder)
                        patience -= time.monotonic() - begun
                    samples.append(taken)
    return samples


async def bytes_per_client(server: Server, limits: str, clients: int) -> float:
    """Redis memory for each of *clients* that were counted under *limits*.

    Raises:
        Broken: A check was not decided by Redis.
    """
    server.flush()
    before = cast("dict[str, int]", server.client().info("memory"))["used_memory"]
    manager = RedisManager(Settings(REDIS_URL=server.url))
    limiter = RateLimiter(manager, timeout=10)
    for at in range(0, clients, 100):
        some = range(at, min(at + 100, clients))
        decisions = await asyncio.gather(*(limiter.consume(f"client-{n}", limits) for n in some))
        if any(decision.source != "redis" for decision in decisions):
            raise Broken("The memory of clients cannot be measured: Redis did not decide about some.")
    await manager.close()
    after = cast("dict[str, int]", server.client().info("memory"))["used_memory"]
    return (after - before) / clients


def about(server: Server, *, wrk: bool) -> list[str]:
    """The lines that say where and with what this was measured."""
    found: dict[str, Any] = server.client().info("server")
    redis = f"{found.get('server_name', 'redis')} {found.get('valkey_version', found['redis_version'])}"
    load = f"load by {'wrk' if wrk else 'Python'} from {CLIENTS} clients"
    where = f"Python {platform.python_version()}, {redis}, {os.cpu_count()} cores"
    lines = [f"{datetime.now(UTC):%Y-%m-%d}: {where}, {load}"]
    lines += [", ".join(f"{name} {_version(name)}" for name in names) for names in (_PACKAGES, _PEERS)]
    return lines


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ratelimit", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each sample; wrk takes whole ones")
    parser.add_argument("--patience", type=float, default=120, help="seconds to spend on disturbed samples")
    parser.add_argument("--quick", action="store_true", help="one round: does it run, not how fast is it")
    parser.add_argument("--apps", default=",".join(APPS), help="some of them, by comma; bare is always one")
    parser.add_argument("--load", choices=("wrk", "python"), default="wrk" if has_wrk() else "python")
    parser.add_argument("--json", type=Path, help="also write every sample to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 0 unless something broke: a missed promise is a finding, not a failure."""
    options = _arguments(argv)
    wanted = ["bare", *options.apps.split(",")]
    unknown = [name for name in wanted if name not in APPS]
    binaries = find_binaries()
    if unknown or not binaries:
        print(f"No such app: {unknown}" if unknown else "No redis-server or valkey-server found.", file=sys.stderr)
        return 1
    names = [name for name in APPS if name in wanted and is_installed(APPS[name])]
    for name in APPS:
        if name in wanted and name not in names:
            print(f"{name} is not installed: skipped")
    server = Server.start(binaries[0])
    try:
        with tempfile.TemporaryDirectory(prefix="redis-asgi-") as folder:
            wrk = options.load == "wrk"
            print(*about(server, wrk=wrk), "", sep="\n", flush=True)
            samples = measure(
                names,
                1 if options.quick else options.rounds,
                options.seconds,
                server,
                patience=0 if options.quick else options.patience,
                wrk=wrk,
                folder=Path(folder),
            )
        memory = {
            count: asyncio.run(bytes_per_client(server, limits, FEW_CLIENTS if options.quick else MEASURED_CLIENTS))
            for count, limits in {1: "100/minute", 3: "10/second; 100/minute; 1000/hour"}.items()
        }
    except (Broken, RuntimeError, TimeoutError, subprocess.TimeoutExpired) as error:
        print(f"Broken: {error}", file=sys.stderr)
        return 1
    finally:
        server.stop()
    results = Results(samples)
    found = promises(results, memory[1])
    print(*table(results, names), "", *promise_table(found), sep="\n")
    print(f"\nRedis memory: {memory[1]:.0f} B a client with one limit, {memory[3]:.0f} B with three")
    disturbed = sum(s.disturbed for s in samples)
    print(f"{len(samples)} samples, {disturbed} disturbed by others; {sum(s.errors for s in samples)} socket errors")
    if options.json:
        options.json.write_text(json.dumps({"samples": [asdict(s) for s in samples], "memory": memory}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
