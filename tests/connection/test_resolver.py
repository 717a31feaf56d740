"""Host names are looked up beside the app's executor: once at a time each,
and the last answer helps out in silence.
"""

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from redis_asgi import RateLimiter, RedisManager, Settings
from redis_asgi.connection import resolver as module
from redis_asgi.connection.resolver import MAX_LOOKUPS, Names

from ..kit.certificates import Certificates
from ..kit.logs import event_of
from ..kit.processes import run_python
from ..kit.servers import Cluster, ExternalServer, SentinelTrio, Server, wait_until

pytestmark = pytest.mark.anyio

NOWHERE = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
UNANSWERED = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


class Resolver:
    """Answers what it is told to, and nobody while it hangs.

    Attributes:
        asked: The names it was asked for, in order.
        most: How many it was asked at the same time.
    """

    def __init__(self, **answers: Sequence[str]) -> None:
        self.answers: dict[str, Any] = dict(answers)
        self.asked: list[str] = []
        self.inside = self.most = 0
        self._lock = threading.Lock()
        self._goes_on = threading.Event()
        self._goes_on.set()

    def hang(self) -> None:
        """Answer nobody from now on."""
        self._goes_on.clear()

    def go_on(self) -> None:
        """Answer again, those who wait too."""
        self._goes_on.set()

    def __call__(self, host: str) -> tuple[str, ...]:
        with self._lock:
            self.asked.append(host)
            self.inside += 1
            self.most = max(self.most, self.inside)
        self._goes_on.wait(30)
        with self._lock:
            self.inside -= 1
        answer = self.answers.get(host, ("192.0.2.1",))
        if isinstance(answer, Exception):
            raise answer
        return tuple(answer)


@pytest.fixture
def resolver() -> Iterator[Resolver]:
    """A resolver of this test; whoever still waits for it at the end is let go."""
    made = Resolver()
    yield made
    made.go_on()


async def turns(truth: Callable[[], bool]) -> None:
    """Let the loop turn until *truth* holds."""
    async with asyncio.timeout(20):
        while not truth():
            await asyncio.sleep(0.001)


# One look-up


async def test_one_lookup_per_name(resolver: Resolver) -> None:
    """A hundred who ask for the same name wait for one look-up."""
    resolver.answers["redis"] = ("192.0.2.1", "192.0.2.2")
    resolver.hang()
    ours = Names(resolver)
    asking = [asyncio.create_task(ours.addresses_of("redis")) for _ in range(100)]
    await turns(lambda: resolver.inside == 1)
    resolver.go_on()

    assert [("192.0.2.1", "192.0.2.2")] * 100 == await asyncio.gather(*asking)
    assert ["redis"] == resolver.asked


async def test_four_lookups_in_all(resolver: Resolver) -> None:
    """The fifth name waits until one of four is answered, and all are answered in the end."""
    resolver.hang()
    ours = Names(resolver)
    asking = [asyncio.create_task(ours.addresses_of(f"node-{i}")) for i in range(20)]
    await turns(lambda: resolver.inside == MAX_LOOKUPS)
    resolver.go_on()

    assert [("192.0.2.1",)] * 20 == await asyncio.gather(*asking)
    assert (MAX_LOOKUPS, 20) == (resolver.most, len(resolver.asked))


async def test_two_loops_share_a_lookup(resolver: Resolver) -> None:
    """A loop in another thread gets the answer that this one has asked for."""
    resolver.hang()
    ours = Names(resolver)
    here = asyncio.create_task(ours.addresses_of("redis"))
    await turns(lambda: resolver.inside == 1)
    with ThreadPoolExecutor(1) as other:
        there = asyncio.get_running_loop().run_in_executor(other, asyncio.run, ours.addresses_of("redis"))
        await turns(lambda: sum(len(lookup.waiters) for lookup in ours._under_way.values()) == 2)
        resolver.go_on()

        assert [("192.0.2.1",)] * 2 == [await here, await there]
    assert ["redis"] == resolver.asked


@pytest.mark.parametrize("error", [NOWHERE, UNANSWERED, UnicodeError("label too long")])
async def test_no_address(resolver: Resolver, error: Exception) -> None:
    """What the resolver says against a name is told to each who asked,
    as the error that redis-py expects.
    """
    resolver.answers["redis"] = error
    found = await asyncio.gather(*(Names(resolver).addresses_of("redis") for _ in range(3)), return_exceptions=True)

    assert [socket.gaierror] * 3 == [type(each) for each in found]
    assert 3 == len({id(each) for each in found})


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "2001:db8::1", "localhost", "LocalHost."])
async def test_addresses_are_not_looked_up(resolver: Resolver, host: str) -> None:
    """An address, and the name of this machine, are known."""
    found = await Names(resolver).addresses_of(host)

    assert (found, []) == (("127.0.0.1", "::1") if host.lower().startswith("l") else (host,), resolver.asked)


# Who goes away


async def test_who_gives_up_leaves_nothing(resolver: Resolver) -> None:
    """A cancelled caller is forgotten at once,
    and what only he wanted and was not asked yet is never asked.
    """
    resolver.hang()
    ours = Names(resolver)
    asking = [asyncio.create_task(ours.addresses_of(f"node-{i}")) for i in range(MAX_LOOKUPS + 1)]
    await turns(lambda: resolver.inside == MAX_LOOKUPS)
    for task in asking:
        task.cancel()
    await asyncio.wait(asking)

    assert MAX_LOOKUPS == len(ours._under_way)
    assert not any(lookup.waiters for lookup in ours._under_way.values())
    resolver.go_on()
    await turns(lambda: not ours._threads)
    assert ({f"node-{i}" for i in range(MAX_LOOKUPS)}, {}) == (set(resolver.asked), ours._under_way)


def test_answer_after_the_loop(resolver: Resolver) -> None:
    """An answer that comes when the loop is closed disturbs nobody, and is known to the next loop."""
    resolver.hang()
    ours = Names(resolver, patience=0)
    raised: list[object] = []
    threading.excepthook, before = lambda args: raised.append(args.exc_value), threading.excepthook

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await ours.addresses_of("redis")

    try:
        asyncio.run(give_up())
        resolver.go_on()
        wait_until(lambda: not ours._threads, "the look-up ends")
    finally:
        threading.excepthook = before

    assert ([], ("192.0.2.1",)) == (raised, ours._last_of("redis"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_in_mid_lookup() -> None:
    """A child that is forked off while the resolver hangs looks up for itself."""
    done = run_python(
        "import asyncio, os, socket, threading\n"
        "from redis_asgi.connection.resolver import names\n"
        "goes_on, asked = threading.Event(), threading.Event()\n"
        "def getaddrinfo(host, *_, **__):\n"
        "    asked.set(); goes_on.wait(10)\n"
        "    return [(socket.AF_INET, socket.SOCK_STREAM, 6, '', ('192.0.2.9', 0))]\n"
        "socket.getaddrinfo = getaddrinfo\n"
        "parents = names()\n"
        "threading.Thread(target=lambda: asyncio.run(parents.addresses_of('redis')), daemon=True).start()\n"
        "asked.wait(10); parents._lock.acquire()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    goes_on.set()\n"
        "    os._exit(0 if asyncio.run(names().addresses_of('redis')) == ('192.0.2.9',) else 1)\n"
        "parents._lock.release(); goes_on.set()\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n",
        flags=("-W", "ignore::DeprecationWarning"),  # of a fork beside threads, from Python 3.12 on
    )

    assert (0, "") == (done.returncode, done.stderr)


# The last answer


async def test_last_answer_while_there_is_none(resolver: Resolver) -> None:
    """It is used while the resolver hangs or says that it cannot tell,
    and no longer than ten minutes.
    """
    now = [100.0]
    ours = Names(resolver, clock=lambda: now[0], patience=0)
    resolver.answers["redis"] = ("192.0.2.7",)
    assert ("192.0.2.7",) == await Names.addresses_of(ours, "redis")
    resolver.answers["redis"] = UNANSWERED
    await turns(lambda: not ours._threads)
    now[0] += 599
    assert ("192.0.2.7",) == await ours.addresses_of("redis")
    await turns(lambda: not ours._threads)
    resolver.hang()
    assert ("192.0.2.7",) == await ours.addresses_of("redis")

    now[0] += 1
    late = asyncio.create_task(ours.addresses_of("redis"))
    await turns(lambda: bool(ours._under_way["redis"].waiters))
    resolver.go_on()
    with pytest.raises(socket.gaierror):
        await late


async def test_an_answer_replaces_the_last(resolver: Resolver) -> None:
    """A new address, or the word that there is none, is believed at once;
    one that comes late is there for the next.
    """
    ours = Names(resolver, patience=20)
    resolver.answers["redis"] = ("192.0.2.1",)
    assert ("192.0.2.1",) == await ours.addresses_of("redis")
    resolver.answers["redis"] = ("192.0.2.2",)
    assert ("192.0.2.2",) == await ours.addresses_of("redis")
    resolver.answers["redis"] = NOWHERE
    with pytest.raises(socket.gaierror):
        await ours.addresses_of("redis")

    ours._patience = 0
    resolver.answers["redis"] = ("192.0.2.3",)
    resolver.hang()
    assert ("192.0.2.2",) == await ours.addresses_of("redis")
    resolver.go_on()
    await turns(lambda: not ours._threads)
    resolver.hang()
    assert ("192.0.2.3",) == await ours.addresses_of("redis")


async def test_silence_is_said_once(resolver: Resolver, caplog: pytest.LogCaptureFixture) -> None:
    """A look-up without an answer for a second has one line in the log, without the name."""
    now = [100.0]
    ours = Names(resolver, clock=lambda: now[0], patience=0)
    await ours.addresses_of("redis.secret")
    await turns(lambda: not ours._threads)
    resolver.hang()
    await ours.addresses_of("redis.secret")
    assert [] == caplog.records
    now[0] += 2
    for _ in range(3):
        await ours.addresses_of("redis.secret")

    assert ["redis_asgi.resolver_silent"] == [event_of(record) for record in caplog.records]
    assert "secret" not in repr(vars(caplog.records[0]))


async def test_memory_is_bounded(resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names that were answered first are forgotten first."""
    monkeypatch.setattr(module, "_MAX_NAMES", 2)
    ours = Names(resolver)
    for host in ("a", "b", "a", "c"):
        await ours.addresses_of(host)

    assert ["a", "c"] == list(ours._last)


# Several addresses


async def test_each_address_is_tried(resolver: Resolver) -> None:
    """Who refuses is passed over, and comes last the next time; when all refuse,
    the first one's error is told.
    """
    resolver.answers["redis"] = ("192.0.2.1", "192.0.2.2", "192.0.2.3")
    ours = Names(resolver)
    tried: list[str] = []
    works = {"192.0.2.3"}

    async def connect(address: str) -> str:
        tried.append(address)
        if address not in works:
            raise ConnectionRefusedError(address)
        return address

    assert "192.0.2.3" == await ours.reach("redis", connect)
    assert "192.0.2.3" == await ours.reach("redis", connect)
    works.clear()
    with pytest.raises(ConnectionRefusedError, match=r"192\.0\.2\.3"):
        await ours.reach("redis", connect)

    assert ["1", "2", "3", "3", "3", "1", "2"] == [address[-1] for address in tried]


async def test_an_address_that_hangs_comes_last(resolver: Resolver) -> None:
    """Who gives up on one address begins with another the next time."""
    resolver.answers["redis"] = ("192.0.2.1", "192.0.2.2")
    ours = Names(resolver)

    async def connect(address: str) -> str:
        if address == "192.0.2.1":
            await asyncio.Event().wait()
        return address

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await ours.reach("redis", connect)

    assert "192.0.2.2" == await ours.reach("redis", connect)


# Whoever connects


@pytest.fixture
def hosts(resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """The resolver that this process has:
    names that end in ``.test`` are this machine, the rest are the system's.
    """
    theirs = socket.getaddrinfo

    def getaddrinfo(host: str, *arguments: Any, **options: Any) -> list[tuple[Any, ...]]:
        if not str(host).endswith(".test"):
            return list(theirs(host, *arguments, **options))
        resolver(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(module._Process, "names", Names())
    monkeypatch.setattr(module._Process, "pid", os.getpid())
    return resolver


def port_of(server: ExternalServer) -> str:
    """The port that *server* has."""
    return server.url.rpartition(":")[2]


def standalone(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One server by its name."""
    server: ExternalServer = request.getfixturevalue("redis_server")
    return {"REDIS_HOST": "redis.test", "REDIS_PORT": port_of(server)}


def by_url(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The same by a URL."""
    server: ExternalServer = request.getfixturevalue("redis_server")
    return {"REDIS_URL": f"redis://redis.test:{port_of(server)}"}


def sentinels(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Sentinels by their names."""
    trio: SentinelTrio = request.getfixturevalue("sentinels")
    addresses = [f"sentinel-{i}.test:{each.port}" for i, each in enumerate(trio.sentinels)]
    return {"REDIS_SENTINELS": addresses, "REDIS_SENTINEL_MASTER": SentinelTrio.MASTER}


def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A cluster by the name of one node."""
    nodes: Cluster = request.getfixturevalue("cluster")
    return {"REDIS_URL": f"redis://node.test:{nodes.nodes[0].port}", "REDIS_CLUSTER": True}


@pytest.mark.parametrize("where", [standalone, by_url, sentinels, cluster], ids=lambda where: str(where.__name__))
async def test_a_hanging_resolver_takes_nothing_of_the_app(
    where: Callable[[pytest.FixtureRequest], dict[str, Any]], hosts: Resolver, request: pytest.FixtureRequest
) -> None:
    """While it hangs, requests are decided here and the only thread of the app's executor is free;
    then by Redis.
    """
    manager = RedisManager(Settings(REDIS_TIMEOUT=20, **where(request)))
    limiter = RateLimiter(manager, timeout=0.05)
    hosts.hang()
    with ThreadPoolExecutor(1) as only:
        asyncio.get_running_loop().set_default_executor(only)
        decisions = await asyncio.gather(*(limiter.consume(f"{i}") for i in range(50)))
        await turns(lambda: hosts.inside > 0)
        async with asyncio.timeout(20):
            assert "here" == await asyncio.to_thread(lambda: "here")
        assert {(True, "local")} == {(decision.allowed, decision.source) for decision in decisions}
        assert hosts.most <= MAX_LOOKUPS

        hosts.go_on()
        async with asyncio.timeout(20):
            while (await limiter.consume("a", "1000/minute")).source != "redis":
                await asyncio.sleep(0.02)
        await manager.close()


async def test_redis_is_found_again_while_the_resolver_hangs(hosts: Resolver, server_binary: str) -> None:
    """A server that restarts is used again at its last address,
    although nobody can say where it is.
    """
    server = Server.start(server_binary)
    manager = RedisManager(Settings(REDIS_HOST="redis.test", REDIS_PORT=server.port))
    limiter = RateLimiter(manager)
    try:
        assert "redis" == (await limiter.consume("a")).source
        hosts.hang()
        server.restart()
        async with asyncio.timeout(20):
            while (await limiter.consume("a", "1000/minute")).source != "redis":
                await asyncio.sleep(0.02)
        assert 1 == hosts.inside
    finally:
        await manager.close()
        server.stop()


async def test_the_name_is_what_a_certificate_is_for(
    hosts: Resolver, stranger_server: Server, tls_server: Server, certificates: Certificates
) -> None:
    """A certificate made out to another name is refused, and accepted where that name is asked for."""

    async def ping(host: str, server: Server) -> bool:
        manager = RedisManager(Settings(REDIS_HOST=host, REDIS_PORT=server.port, **certificates.settings()))
        try:
            return bool(await (await manager.get_connection()).ping())
        finally:
            await manager.close()

    for host, server in (("redis.test", tls_server), ("redis.test", stranger_server)):
        with pytest.raises(RedisConnectionError, match="certificate"):
            await ping(host, server)
    assert await ping("localhost", tls_server)
    assert await ping("elsewhere.test", stranger_server)
    assert ["redis.test", "redis.test", "elsewhere.test"] == hosts.asked
