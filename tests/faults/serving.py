"""The app under test in a real uvicorn, and what its processes say."""

import re
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from ..kit.processes import clean_environment
from ..kit.servers import free_port, wait_until

_OTHERS = {"ClientDisconnect", "LocalProtocolError"}
ROOT = Path(__file__).resolve().parents[2]


class Served:
    """A uvicorn that runs.

    Args:
        folder: Where it and the app write.
    """

    def __init__(self, port: int, folder: Path) -> None:
        self.port = port
        self._folder = folder

    @property
    def reached(self) -> Counter[tuple[str, str]]:
        """How many limited requests came through to the app, in any process,
        by client and who had decided.
        """
        lines = (self._folder / "reached").read_text().splitlines()
        return Counter((client, source) for client, source in map(str.split, lines))

    @property
    def raised(self) -> set[str]:
        """What its processes printed tracebacks of,
        but for what Starlette and h11 say of clients that misbehave.
        """
        log = (self._folder / "uvicorn.log").read_text()
        return set(re.findall(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception|Disconnect))(?::|$)", log, re.MULTILINE)) - _OTHERS

    def get(self, path: str) -> Any:
        """One page, parsed."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return orjson.loads(answer.read())


@contextmanager
def serving(redis_url: str, folder: Path, *, workers: int, quota: int, **environment: str) -> Iterator[Served]:
    """Uvicorn with so many *workers*, ended by the id that it was started with."""
    port = free_port()
    (folder / "reached").touch()
    environment = {
        "REDIS_URL": redis_url,
        "EMBEDDING_CACHE_NAMESPACE": "faults",
        "FAULTS_QUOTA": str(quota),
        "FAULTS_REACHED": str(folder / "reached"),
        **environment,
    }
    command = [sys.executable, "-m", "uvicorn", "--factory", "tests.faults.service:served", "--port", str(port)]
    command += ["--workers", str(workers), "--no-access-log", "--log-level", "warning"]
    # Its five seconds are what httpx keeps an idle connection, too:
    # one might be closed while a request is on its way.
    command += ["--timeout-keep-alive", "75"]
    # Not what else is installed: uvloop raises for what is written to a client who has gone.
    command += ["--loop", "asyncio", "--http", "h11"]
    with (folder / "uvicorn.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=clean_environment(**environment), stdout=log, stderr=log, start_new_session=True
        )
    served = Served(port, folder)
    try:
        wait_until(lambda: served.get("/health/live"), "uvicorn answers", within=30)
        yield served
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
