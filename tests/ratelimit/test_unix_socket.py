"""Behind a proxy on a unix socket: what real servers say of a peer without an address."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest

from ..embeddings.clients import needed
from ..kit.processes import clean_environment
from ..kit.servers import wait_until

SERVERS = {
    "uvicorn": ["-m", "uvicorn", "served:app", "--uds", "{path}", "--no-proxy-headers"],
    "hypercorn": ["-m", "hypercorn", "served:app", "--bind", "unix:{path}"],
    "granian": ["-m", "granian", "--interface", "asgi", "--uds", "{path}", "served:app"],
}
APP = """
from starlette.applications import Starlette
from redis_asgi import RateLimitMiddleware
app = RateLimitMiddleware(Starlette(), "1/minute")
"""


def _statuses(path: Path, addresses: list[str]) -> list[int]:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x") as client:
        return [client.get("/", headers={"x-forwarded-for": address}).status_code for address in addresses]


@pytest.mark.parametrize(
    "server",
    ["uvicorn", *(pytest.param(each, marks=pytest.mark.clients) for each in ("hypercorn", "granian"))],
)
@pytest.mark.parametrize(
    ("trusted", "expected"), [("unix", [404, 404, 429, 429]), ("0.0.0.0/0,::/0", [404, 429, 429, 429])]
)
def test_clients_behind_a_unix_socket(server: str, trusted: str, expected: list[int], tmp_path: Path) -> None:
    """With ``unix`` trusted each has its counter; without it all share one,
    whatever networks are trusted.
    """
    if server != "uvicorn":
        needed(server)
    (tmp_path / "served.py").write_text(APP)
    # The path of a socket has about a hundred characters at most.
    with tempfile.TemporaryDirectory(prefix="uds") as folder:
        path = Path(folder) / "s"
        environment = clean_environment(
            PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path.cwd())]),
            REDIS_URL="memory://",
            RATE_LIMIT_TRUSTED_PROXIES=trusted,
        )
        command = [sys.executable, *(each.format(path=path) for each in SERVERS[server])]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:

            def listens() -> bool:
                # Not by httpx, which leaves a socket behind where nobody listens yet.
                with socket.socket(socket.AF_UNIX) as connection:
                    connection.connect(str(path))
                return True

            wait_until(listens, f"{server} on its socket", within=30)
            answers = _statuses(path, ["198.51.100.1", "198.51.100.2", "198.51.100.1", "6.6.6.6, 198.51.100.2"])
        finally:
            process.terminate()
            process.wait(10)
    assert expected == answers
