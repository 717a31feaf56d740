"""The figures of the package and of its Redis, for Prometheus and as JSON."""

import asyncio
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import fakeredis
import httpx
import pytest
import redis
import redis.asyncio as aioredis
from prometheus_client import Counter, Histogram
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from redis_asgi import (
    ConfigurationError,
    EmbeddingCacheMiddleware,
    RateLimiter,
    RateLimitMiddleware,
    RedisManager,
    RedisMetrics,
    Rule,
    Settings,
    by_header,
    health_app,
    metrics_app,
    status_app,
)
from redis_asgi.asgi.sub_app import SubApp
from redis_asgi.connection.client_factory import build_client
from redis_asgi.connection.server_info import Health
from redis_asgi.errors import Failure
from redis_asgi.sub_apps.prometheus import counted as counted_families
from redis_asgi.telemetry import Telemetry, fresh_telemetry

from ..kit.certificates import Certificates
from ..kit.documents import section, table
from ..kit.fair_time import fair_time
from ..kit.patience import PATIENCE
from ..kit.processes import clean_environment, run_python
from ..kit.proxy import FaultProxy
from ..kit.servers import Cluster, ExternalServer, SentinelTrio, Server, free_port, wait_until

pytestmark = pytest.mark.anyio

StartServer = Callable[..., Server]
CLOSED_PORT = "redis://127.0.0.1:1"
MEMORY = Settings(REDIS_URL="memory://")
DEADLINE = 0.5
TLS = ssl.create_default_context()  # httpx would load the authorities for every request of its own
KEYS = ["hits", "misses", "hit_rate", "memory_used", "peak_memory", "clients", "operations"]

FAILURES = tuple(failure.value for failure in Failure)
BYPASSES: tuple[str, ...] = ("late-chunking", "multi-vector", "encoding", "not-json", "body-header", "no-store")
BYPASSES += ("response-no-store", "vary", "integers", "too-large", "busy", "redis-down", "not-understood", "replayed")
BYPASSES += (
    "item-lists",
    "unique-header",
    "partition",
    "other",
)  # a partition_by said None; a word of a wire format that is not ours
# Every value that a label may have; the names of policies come from the code of the app.
CLOSED_SETS: dict[tuple[str, str], tuple[str, ...]] = {
    ("ratelimit_requests", "outcome"): ("allowed", "refused", "exempt", "unavailable"),
    ("ratelimit_requests", "source"): ("redis", "memory", "local", "refusal_memory", "none"),
    ("ratelimit_policy", "outcome"): ("allowed", "refused", "shadow_refused"),
    ("ratelimit_estimate_error_units", "was"): ("too_high", "too_low"),
    ("ratelimit_fallback", "mode"): ("local", "open", "closed"),
    ("ratelimit_fallback", "reason"): FAILURES,
    ("ratelimit_check_duration_seconds", "source"): ("redis", "local", "none"),
    ("cache_requests", "result"): ("hit", "miss", "partial", "bypass", "stale", "error"),
    ("cache_bypass", "reason"): BYPASSES,
    ("cache_items", "result"): ("hit", "miss", "collapsed"),
    ("cache_rejected", "reason"): (
        "response-no-store",
        "vary",
        "integers",
        "unique-header",
        "not-understood",
        "status",
    ),
    ("redis_commands", "op"): ("check", "settle", "lookup", "store", "ping"),
    ("redis_commands", "outcome"): ("ok", *FAILURES),
    ("redis_command_duration_seconds", "op"): ("check", "settle", "lookup", "store", "ping"),
    ("breaker_transitions", "to"): ("closed", "half_open", "open"),
    ("redis_pool_connections", "state"): ("in_use", "idle", "max"),
}


@pytest.fixture(autouse=True)
def counted() -> Iterator[Telemetry]:
    """Counters of this test alone."""
    with fresh_telemetry() as mine:
        yield mine


def use_every_metric(counted: Telemetry) -> None:
    """Count something everywhere, with each value that a label may have."""
    for metric in vars(counted).values():
        if isinstance(metric, Counter | Histogram):
            name = next(iter(metric.describe())).name.removeprefix("redis_asgi_")
            children: list[Any] = [metric]
            if metric._labelnames:
                sets = [CLOSED_SETS.get((name, label), ("default",)) for label in metric._labelnames]
                width = max(map(len, sets))
                children = [metric.labels(*(values[i % len(values)] for values in sets)) for i in range(width)]
            for child in children:
                child.inc() if isinstance(metric, Counter) else child.observe(0.003)


def client_of(app: Any) -> httpx.AsyncClient:
    """An HTTP client in front of *app*."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def scraped(app: Any, path: str = "/", **headers: str) -> httpx.Response:
    """One answer of *app*."""
    async with client_of(app) as client:
        return await client.get(path, headers=headers)


async def samples(app: Any) -> dict[str, float]:
    """The series of a scrape, as ``name{label="value"}``, less the prefix."""
    text = (await scraped(app)).text
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name.removeprefix("redis_asgi_"): float(value) for name, _, value in lines}


# RedisMetrics


async def test_figures_of_a_fresh_server(private_server: StartServer) -> None:
    """All names are there, memory is in bytes, and without a lookup the hit rate is 0.0."""
    async with aioredis.Redis.from_url(private_server().url) as client:
        figures = await RedisMetrics(client).collect_metrics()

    assert KEYS == list(figures)
    assert (0, 0, 0.0) == (figures["hits"], figures["misses"], figures["hit_rate"])
    assert isinstance(figures["hit_rate"], float)
    assert 100_000 < figures["memory_used"] <= figures["peak_memory"] < 100_000_000
    assert 1 <= figures["clients"] <= 3
    assert ["commands_processed", "expired_keys", "evicted_keys"] == list(figures["operations"])


@pytest.mark.parametrize("options", [{}, {"decode_responses": True}, {"protocol": 3}, {"protocol": 2}], ids=str)
async def test_figures_are_redis_own(redis_server: ExternalServer, options: dict[str, Any]) -> None:
    """Hits, misses and the rate are what the server counted, whatever the client decodes or speaks."""
    looker = redis_server.client()
    looker.set("a", 1)
    for key in ("a", "a", "a", "b"):
        looker.get(key)
    async with aioredis.Redis.from_url(redis_server.url, retry=Retry(NoBackoff(), 0), **options) as client:
        before = await client.info("stats")
        figures = await RedisMetrics(client).collect_metrics()

    assert (3, 1, 0.75) == (figures["hits"], figures["misses"], figures["hit_rate"])
    # What the server counts after the INFO is its connections' own commands.
    assert 0 < figures["operations"]["commands_processed"] - before["total_commands_processed"] < 10
    assert (0, 0) == (figures["operations"]["expired_keys"], figures["operations"]["evicted_keys"])


async def test_figures_of_a_cluster_are_sums(cluster: Cluster) -> None:
    """Over its primaries, however many nodes the client was told of."""
    keys = [next(f"k{i}" for i in range(99) if cluster.node_of(f"k{i}") is node) for node in cluster.nodes]
    for i, (node, key) in enumerate(zip(cluster.nodes, keys, strict=True), 1):
        node.client().set(key, 1)
        for _ in range(i):
            node.client().get(key)
    manager = RedisManager(Settings(REDIS_URL=cluster.url, REDIS_CLUSTER=True))
    await (await manager.get_connection()).initialize()  # as its first command does: it learns of the nodes
    figures = await RedisMetrics(manager).collect_metrics()
    gauges = await samples(metrics_app(redis=manager))

    assert (6, 0, 1.0) == (figures["hits"], figures["misses"], figures["hit_rate"])
    memory = sum(node.client().info("memory")["used_memory"] for node in cluster.nodes)
    assert figures["memory_used"] == pytest.approx(memory, rel=0.2)
    assert 6 == gauges["server_keyspace_hits_total"]
    assert 1 == gauges["redis_up"]
    assert 90 == gauges['redis_pool_connections{state="max"}']


async def test_cluster_that_lost_a_node_gives_no_figures(private_cluster: Cluster) -> None:
    """Sums over the rest would look like counters that were reset."""
    manager = RedisManager(Settings(REDIS_URL=private_cluster.url, REDIS_CLUSTER=True))
    metrics = RedisMetrics(manager)
    assert KEYS == list(await metrics.collect_metrics())
    private_cluster.nodes[2].kill()

    assert {} == await metrics.collect_metrics()


async def timed(metrics: RedisMetrics) -> tuple[dict[str, Any], float]:
    """Figures, and how long they took in seconds."""
    began = fair_time()
    return await metrics.collect_metrics(), fair_time() - began


async def test_dead_redis_gives_no_figures() -> None:
    """Nobody listens: nothing, at once."""
    figures, seconds = await timed(RedisMetrics(CLOSED_PORT))

    assert {} == figures
    assert seconds < DEADLINE


@pytest.mark.usefixtures("shipped_deadlines")
async def test_hung_redis_gives_no_figures_in_time(private_server: StartServer) -> None:
    """The kernel accepts the connection and nobody answers; later it does."""
    server = private_server()
    metrics = RedisMetrics(server.url)
    assert KEYS == list(await metrics.collect_metrics())
    server.pause()
    try:
        figures, seconds = await timed(metrics)
    finally:
        server.resume()

    assert {} == figures
    assert seconds < DEADLINE + 0.4
    assert KEYS == list(await metrics.collect_metrics())


@pytest.mark.parametrize("mode", ["blackhole", "reset", "cut_replies", "drop_replies"])
@pytest.mark.usefixtures("shipped_deadlines")
async def test_broken_network_gives_no_figures_in_time(redis_server: ExternalServer, mode: Any) -> None:
    """Whatever the network does with the question or the answer."""
    async with FaultProxy("127.0.0.1", int(redis_server.url.rpartition(":")[2])) as proxy:
        await proxy.set(mode)
        figures, seconds = await timed(RedisMetrics(proxy.url))
        assert {} == figures
        assert seconds < DEADLINE + 0.4
        await proxy.set("pass")
        assert KEYS == list((await timed(RedisMetrics(proxy.url)))[0])


@pytest.mark.parametrize(
    ("user", "is_up"),
    [("", 0), ("nobody:wrong@", 0), ("blind:secret@", 1), ("mute:secret@", 0)],
    ids=["password missing", "password wrong", "INFO forbidden", "PING forbidden"],
)
async def test_redis_that_refuses(private_server: StartServer, user: str, is_up: int) -> None:
    """No figures, no error, and nothing of the server in the answer; up is who answers a PING."""
    server = private_server()
    server.add_user("blind", ">secret", "~*", "+@all", "-info")
    server.add_user("mute", ">secret", "~*", "+@all", "-info", "-ping")
    # The connection that looks from outside stays what it is.
    server.command("ACL", "SETUSER", "default", "resetpass", ">secret")
    url = f"redis://{user}127.0.0.1:{server.port}"
    app = metrics_app(redis=url)
    answer = await scraped(app, "/json")

    assert {} == await RedisMetrics(url).collect_metrics()
    assert [None] * 6 == [answer.json()[key] for key in KEYS[:6]]
    assert {"commands_processed": None, "expired_keys": None, "evicted_keys": None} == answer.json()["operations"]
    text = (await scraped(app)).text
    assert f"redis_asgi_redis_up {is_up}.0" in text
    assert "redis_asgi_server_" not in text
    for secret in ("secret", "127.0.0.1", f":{server.port}", "blind", "nobody", "Error", "WRONGPASS", "NOPERM"):
        assert secret not in answer.text + text


@pytest.mark.usefixtures("shipped_deadlines")
async def test_figures_over_tls(tls_server: Server, certificates: Certificates) -> None:
    """With the certificates of the settings, as every other connection."""
    settings = Settings(
        REDIS_URL=tls_server.url,
        REDIS_SSL_CA_CERTS=certificates.ca.cert,
        REDIS_SSL_CERTFILE=certificates.client.cert,
        REDIS_SSL_KEYFILE=certificates.client.key,
    )

    metrics = RedisMetrics(RedisManager(settings))
    assert KEYS == list(await metrics.collect_metrics())

    tls_server.pause()
    try:
        figures, seconds = await timed(metrics)
    finally:
        tls_server.resume()
    assert {} == figures
    assert seconds < DEADLINE + 0.4


@pytest.mark.usefixtures("shipped_deadlines")
async def test_hung_tls_peer_is_not_waited_for(tls_server: Server, certificates: Certificates) -> None:
    """One that hangs after the handshake gets no goodbye, which TLS would wait 30 s for."""
    url = urlsplit(tls_server.url)
    async with FaultProxy("127.0.0.1", url.port or 0) as proxy:
        settings = Settings(
            REDIS_URL=f"rediss://localhost:{proxy.port}",
            REDIS_SSL_CA_CERTS=certificates.ca.cert,
            REDIS_SSL_CERTFILE=certificates.client.cert,
            REDIS_SSL_KEYFILE=certificates.client.key,
        )
        client = build_client(settings).client
        assert isinstance(client, aioredis.Redis)
        connection = client.connection_pool.make_connection()
        await connection.connect()
        client.connection_pool.make_connection = lambda: connection  # type: ignore[method-assign]  # connected before
        await proxy.set("blackhole")
        figures, seconds = await timed(RedisMetrics(client))
        assert {} == figures
        assert seconds < DEADLINE + 0.4
        async with asyncio.timeout(PATIENCE):
            while proxy.open:
                await asyncio.sleep(0.01)
        await client.aclose()


async def test_figures_behind_sentinels(sentinels: SentinelTrio) -> None:
    """Those of the primary that the sentinels name now."""
    sentinels.servers[0].client().get("absent")
    addresses = ",".join(f"{server.host}:{server.port}" for server in sentinels.sentinels)
    settings = Settings(REDIS_SENTINELS=addresses, REDIS_SENTINEL_MASTER=sentinels.MASTER)

    assert 1 == (await RedisMetrics(RedisManager(settings)).collect_metrics())["misses"]


async def test_fake_redis_has_no_figures() -> None:
    """A fake without ``INFO`` is no error either."""
    async with fakeredis.FakeAsyncRedis(retry=Retry(NoBackoff(), 0)) as client:
        assert {} == await RedisMetrics(client).collect_metrics()


async def test_memory_has_no_figures() -> None:
    """On ``memory://`` there is no server to ask, and none that could be down."""
    app = metrics_app(settings=MEMORY)
    text = (await scraped(app)).text

    assert {} == await RedisMetrics(RedisManager(MEMORY)).collect_metrics()
    assert "redis_asgi_redis_up" not in text
    assert "redis_asgi_server_" not in text
    assert 'server="memory"' in text


def test_only_clients_are_taken() -> None:
    """A sync client is told at construction."""
    with pytest.raises(ConfigurationError, match="synchronous"):
        RedisMetrics(redis.Redis())  # type: ignore[arg-type]  # what is tested


async def test_users_client_is_left_as_it_was(private_server: StartServer) -> None:
    """None of its connections is used, one question leaves none of ours, many share one, and it is not closed."""
    redis_server = private_server()
    async with aioredis.Redis.from_url(redis_server.url, retry=Retry(NoBackoff(), 0)) as client:
        await RedisMetrics(client).collect_metrics()
        assert [] == redis_server.connections()
        app = metrics_app(redis=client)
        await scraped(app)
        pool = client.connection_pool
        assert (0, 0) == (len(pool._available_connections), len(pool._in_use_connections))
        assert 1 == len(redis_server.connections())
        await app._target.own.close()
        assert await client.ping()


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"redis_version": "7.0.15"}, "redis 7.0.15"),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "8.1.1"}, "valkey 8.1.1"),
        ({"redis_version": "7.4.0", "dragonfly_version": "df-v1.30"}, "dragonfly df-v1.30"),
        ({}, "unknown"),
    ],
)
def test_server_is_named(said: dict[str, str], named: str) -> None:
    """By its own name: they all claim to be some Redis."""
    assert named == Health(servers=(said,)).server


def test_unknown_of_one_is_unknown_of_all() -> None:
    """A field that one primary lacks, or that is no number, has no sum."""
    health = Health(servers=({"a": "1", "b": "2"}, {"a": "3", "b": "many"}))

    assert (4.0, 3.0, None, None) == (
        health.number("a"),
        health.number("a", max),
        health.number("b"),
        health.number("c"),
    )


# the scrape


async def test_app_is_one_of_ours(settings: Settings) -> None:
    """It has the manners of every sub-app: mounted anywhere, read-only, asked for by name or not at all."""
    app = metrics_app(settings=settings)
    outer = Starlette()
    outer.mount("/metrics", app)
    async with client_of(outer) as client:
        answers = {path: (await client.get(path)).status_code for path in ("/metrics/", "/metrics/json", "/metrics/x")}
        posted = await client.post("/metrics/")

    assert isinstance(app, SubApp)
    assert {"/metrics/": 200, "/metrics/json": 200, "/metrics/x": 404} == answers
    assert (405, "GET, HEAD") == (posted.status_code, posted.headers["allow"])


async def test_authorize_is_asked_for_every_page(settings: Settings) -> None:
    """Neither page is shown to whom the app does not know."""

    async def knows(connection: HTTPConnection) -> bool:
        return connection.headers.get("authorization") == "Bearer ops"

    app = metrics_app(settings=settings, authorize=knows)
    for path in ("/", "/json"):
        assert 403 == (await scraped(app, path)).status_code
        assert 200 == (await scraped(app, path, authorization="Bearer ops")).status_code


PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "text/plain; version=0.0.4"),
        ("text/plain", "text/plain; version=0.0.4"),
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text; version=1.0.0"),
        (PROMETHEUS, "application/openmetrics-text; version=1.0.0"),
        ("application/json", "application/json"),
        ("application/json;q=0.9, */*;q=0.1", "application/json"),
        ("application/json, text/plain", "text/plain; version=0.0.4"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "text/plain; version=0.0.4"),
    ],
)
async def test_accept_decides(settings: Settings, accept: str, kind: str) -> None:
    """Prometheus gets what it asks for, a script JSON, a browser something to read."""
    answer = await scraped(metrics_app(settings=settings), accept=accept)

    assert answer.headers["content-type"].startswith(kind)
    assert "no-store" == answer.headers["cache-control"]
    if "openmetrics" in kind:
        assert list(parse_openmetrics(answer.text))
    elif kind == "application/json":
        assert "middleware" in answer.json()
    else:
        assert list(parse_text(answer.text))
        assert "accept" == answer.headers["vary"]


async def test_no_created_series(settings: Settings, counted: Telemetry) -> None:
    """Ours have none, in either format, and the app's own keep them if it wants them."""
    use_every_metric(counted)
    app = metrics_app(settings=settings)
    mine = Counter("mine", "The app's.", registry=None)
    mine.inc()

    for accept in ("*/*", "application/openmetrics-text; version=1.0.0"):
        text = (await scraped(app, accept=accept)).text
        assert "redis_asgi_cache_saved_tokens_total 1.0" in text
        assert "_created" not in text
    assert "mine_created" in {sample.name for family in mine.collect() for sample in family.samples}


async def embed(request: Request) -> JSONResponse:
    """An embedding server of vectors with two numbers."""
    body = await request.json()
    count = 1 if isinstance(body["input"], str) else len(body["input"])
    data = [{"object": "embedding", "index": i, "embedding": [0.5, 1.0]} for i in range(count)]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": body["model"], "usage": usage})


async def test_labels_are_of_closed_sets(redis_server: ExternalServer, counted: Telemetry) -> None:
    """No value of a label is a client, a key or a text: all come from small sets, or from the code."""
    settings = Settings(REDIS_URL=redis_server.url, REDIS_KEY_PREFIX="prefix-7:", RATE_LIMIT_TIMEOUT=2)
    rules = [
        Rule("2/minute", name="by-key", paths="/secret-path", partition_by=by_header("x-api-key")),
        Rule("9/minute", name="by-ip"),
    ]
    app = Starlette(routes=[Route("/v1/embeddings", embed, methods=["POST"])])
    app.add_middleware(EmbeddingCacheMiddleware, namespace="secret-namespace", settings=settings)
    app.add_middleware(RateLimitMiddleware, rules=rules, settings=settings)
    app.mount("/metrics", metrics_app(settings=settings))
    use_every_metric(counted)
    async with client_of(app) as client:
        for _ in range(3):
            await client.get("/secret-path", headers={"x-api-key": "secret-key"})
        for text in ("secret text", "secret text", ["secret text", "secret other"]):
            asked = {"model": "secret-model", "input": text}
            answer = await client.post("/v1/embeddings", json=asked, headers={"authorization": "Bearer secret-token"})
            assert "redis-asgi" in answer.headers["cache-status"]
        await RateLimiter(settings=settings).consume("secret-client")
        text = (await client.get("/metrics/")).text

    for secret in ("secret", "127.0.0.1", "prefix-7", "rate_limit:", "embedding_"):
        assert secret not in text
    for family in parse_text(text):
        name = family.name.removeprefix("redis_asgi_")
        for sample in family.samples:
            for label, value in sample.labels.items():
                if (name, label) in CLOSED_SETS:
                    assert value in CLOSED_SETS[name, label], sample
                else:
                    assert (name, label) in ALSO_LABELLED or label == "le", sample
    assert {"default", "by-key", "by-ip"} >= set(re.findall(r'policy="([^"]*)"', text))


HOSTILE = [
    'evil"} 1\n# HELP evil evil\nevil{a="b',
    "redis_asgi_ratelimit_requests_total 999",
    "\\n\\",
    "e\u0301vil-\u202e-\U0001f608",
    "evil" * 500,
    "../../evil",
    "${jndi:ldap://evil}",
]


async def test_hostile_clients_reach_no_label(redis_server: ExternalServer, counted: Telemetry) -> None:
    """Whatever clients call themselves, what they ask for and where they say they are from: not a series more."""
    settings = Settings(REDIS_URL=redis_server.url, RATE_LIMIT_TIMEOUT=2, RATE_LIMIT_TRUSTED_PROXIES=["127.0.0.1"])
    rules = [
        Rule("9/minute", name="by-key", partition_by=by_header("x-api-key")),
        Rule("99/minute", name="by-ip"),
        Rule(lambda conn: f"{len(conn.headers['x-api-key'])}/hour", name="by-plan", partition_by=by_header("x-plan")),
    ]
    app = Starlette(routes=[Route("/v1/embeddings", embed, methods=["POST"])])
    app.add_middleware(EmbeddingCacheMiddleware, namespace="labels", settings=settings)
    app.add_middleware(RateLimitMiddleware, rules=rules, settings=settings)
    metrics = metrics_app(settings=settings)

    async def ask(who: str) -> httpx.Response:
        fields = {"x-api-key": who, "x-plan": who, "x-forwarded-for": who, "authorization": f"Bearer {who}"}
        headers = {name.encode(): value.encode().replace(b"\n", b"\\n") for name, value in fields.items()}
        asked = {"model": who, "input": [who], "encoding_format": who, "dimensions": 2}
        await client.get(f"/{quote(who, safe='')}", headers=headers)
        return await client.post("/v1/embeddings", params={"q": who}, headers=headers, json=asked)

    async with client_of(app) as client:
        for _ in range(2):
            assert 200 == (await ask("friend")).status_code
        friendly = set(await samples(metrics))
        for who in HOSTILE:
            assert 200 == (await ask(who)).status_code
            await RateLimiter(settings=settings).consume(who)
        text = (await scraped(metrics)).text

    hostile = {name for name in await samples(metrics) if 'policy="default"' not in name}
    assert friendly == hostile
    assert "evil" not in text
    assert " 999" not in text
    assert list(parse_text(text))


ALSO_LABELLED = {
    (name, "policy") for name in ("ratelimit_policy", "ratelimit_used_units", "ratelimit_estimate_error_units")
} | {("build_info", label) for label in ("version", "redis_client", "server")}


async def test_scrape_leaves_the_loop_to_others(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted is put together in a thread that gives way ten times as soon, and in no other time."""
    usual = sys.getswitchinterval()
    seen: list[tuple[float, int]] = []

    def watching() -> Any:
        seen.append((sys.getswitchinterval(), threading.get_ident()))
        return counted_families()

    monkeypatch.setattr("redis_asgi.sub_apps.metrics.counted", watching)
    async with client_of(metrics_app(settings=settings)) as client:
        for path in ("/", "/", "/json"):
            assert 200 == (await client.get(path)).status_code
            assert usual == sys.getswitchinterval()
    assert [usual / 10] * 3 == pytest.approx([interval for interval, _ in seen])
    [thread] = {thread for _, thread in seen}
    assert thread != threading.get_ident()


async def test_gauges_say_how_it_is_now(redis_server: ExternalServer) -> None:
    """The pool by state, clients counted here, and that Redis is up."""
    manager = RedisManager(Settings(REDIS_URL=redis_server.url, REDIS_POOL_SIZE=3))
    app = metrics_app(redis=manager)
    client = await manager.get_connection()
    assert isinstance(client, aioredis.Redis)
    await client.ping()
    held = await client.connection_pool.get_connection()
    try:
        now = await samples(app)
    finally:
        await client.connection_pool.release(held)

    assert 1 == now["redis_up"]
    assert [1, 0, 3] == [now[f'redis_pool_connections{{state="{state}"}}'] for state in ("in_use", "idle", "max")]
    assert (0, 100_000) == (now["ratelimit_local_partitions"], now["ratelimit_local_partitions_max"])
    (about,) = (name for name in now if name.startswith("build_info"))
    assert re.fullmatch(r'build_info\{redis_client="[\d.]+",server="\w+ [\d.]+",version="[\d.]+"\}', about)
    assert 0 == now["breaker_state"]
    assert 1 == (await samples(app))['redis_pool_connections{state="idle"}']


async def test_pool_of_the_users_own_making_is_left_out(redis_url: str) -> None:
    """What it has open nobody knows: the scrape and the page go without, and all else is there."""

    class Own:
        """A pool that keeps its books elsewhere."""

        def __init__(self, pool: aioredis.ConnectionPool) -> None:
            self.connection_kwargs = pool.connection_kwargs
            self.make_connection = pool.make_connection

    client = aioredis.Redis.from_url(redis_url, retry=Retry(NoBackoff(), 0))
    client.connection_pool = Own(client.connection_pool)  # type: ignore[assignment]  # what is tested
    now = await samples(metrics_app(redis=client))
    page = await scraped(status_app(redis=client))

    assert 1 == now["redis_up"]
    assert not [name for name in now if "pool_connections" in name]
    assert 200 == page.status_code


async def test_clients_counted_here_are_shown() -> None:
    """On ``memory://`` those of the manager; while Redis is gone, those of its stand-in and nobody's name."""
    manager = RedisManager(MEMORY)
    limiter = RateLimiter(manager)
    for client in "abc":
        await limiter.consume(client)

    assert 3 == (await samples(metrics_app(redis=manager)))["ratelimit_local_partitions"]


@pytest.mark.parametrize(("state", "number"), [("closed", 0), ("half_open", 1), ("open", 2)])
async def test_breaker_is_shown(state: Any, number: int) -> None:
    """As a number that an alert can compare, and as a word in JSON."""

    class Broken(RedisManager):
        @property
        def breaker_state(self) -> Any:
            asyncio.get_running_loop()  # it is the loop's
            return state

    app = metrics_app(redis=Broken(MEMORY))

    assert number == (await samples(app))["breaker_state"]
    assert state == (await scraped(app, "/json")).json()["middleware"]["breaker"]


async def test_server_gauges_are_what_info_says(private_server: StartServer) -> None:
    """With the suffixes of redis_exporter, and its types."""
    server = private_server("--maxmemory", "50mb")
    server.client().get("absent")
    app = metrics_app(redis=server.url)
    now = await samples(app)
    info: dict[str, Any] = server.client().info()

    assert 50 * 1024 * 1024 == now["server_memory_max_bytes"]
    assert now["server_memory_used_bytes"] == pytest.approx(info["used_memory"], rel=0.3)
    assert 1 == now["server_keyspace_misses_total"]
    assert now["server_rdb_last_save_timestamp_seconds"] == info["rdb_last_save_time"]
    assert 14 == len([name for name in now if name.startswith("server_")])
    types = {family.name: family.type for family in parse_text((await scraped(app)).text)}
    assert "counter" == types["redis_asgi_server_evicted_keys"]
    assert "gauge" == types["redis_asgi_server_connected_clients"]


async def test_json_has_both_halves(redis_server: ExternalServer, counted: Telemetry) -> None:
    """What Redis says, and what the package has counted."""
    counted.ratelimit_requests.labels("allowed", "redis").inc(3)
    counted.ratelimit_requests.labels("allowed", "local").inc(4)
    counted.ratelimit_requests.labels("refused", "refusal_memory").inc(2)
    counted.ratelimit_policy.labels("default", "allowed").inc(7)
    counted.ratelimit_policy.labels("default", "shadow_refused").inc(1)
    counted.ratelimit_fallback.labels("local", "timeout").inc(4)
    counted.cache_requests.labels("partial").inc(1)
    counted.cache_items.labels("hit").inc(3)
    counted.cache_items.labels("miss").inc(1)
    counted.cache_saved_tokens.inc(30)
    answer = (await scraped(metrics_app(redis=redis_server.url), "/json")).json()

    assert [*KEYS, "middleware"] == list(answer)
    assert answer["memory_used"] > 0
    middleware = answer["middleware"]
    assert {
        "allowed": 7,
        "refused": 2,
        "exempt": 0,
        "unavailable": 0,
        "fallbacks": 4,
        "policies": {"default": {"allowed": 7, "refused": 0, "shadow_refused": 1}},
    } == middleware["ratelimit"]
    assert {"hit": 0, "partial": 1, "miss": 0, "stale": 0, "bypass": 0, "error": 0} == middleware["cache"]["requests"]
    assert {"hit": 3, "miss": 1, "collapsed": 0} == middleware["cache"]["inputs"]
    assert (0.75, 30) == (middleware["cache"]["hit_rate"], middleware["cache"]["saved_tokens"])


async def test_guide_lists_every_metric(redis_server: ExternalServer, counted: Telemetry) -> None:
    """With its type and its labels; those of the server are one row."""
    use_every_metric(counted)
    manager = RedisManager(Settings(REDIS_URL=redis_server.url))
    async with RateLimiter(manager).slot("a", 1):
        text = (await scraped(metrics_app(redis=manager))).text
    there = {}
    for family in parse_text(text):
        name = family.name.removeprefix("redis_asgi_") + "_total" * (family.type == "counter")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        there[name] = (family.type, labels)
    listed = {
        row[0].strip("`"): (row[1], set(re.findall(r"`(\w+)`", row[2])))
        for row in table(section("### What is counted"))
        if row[0] != "`server_*`"
    }

    assert {name: about for name, about in there.items() if not name.startswith("server_")} == listed
    assert 14 == len([name for name in there if name.startswith("server_")])


# Redis is not well


async def test_many_scrapes_are_one_question(private_server: StartServer) -> None:
    """However many ask at once or within a second, health checks and the status page too, Redis is asked once."""
    redis_server = private_server()
    manager = RedisManager(Settings(REDIS_URL=redis_server.url))
    apps = [metrics_app(redis=manager), health_app(redis=manager), status_app(redis=manager)]
    pages = [(apps[0], "/"), (apps[0], "/json"), (apps[1], "/"), (apps[1], "/ready"), (apps[2], "/")]
    redis_server.client().config_resetstat()
    answers = await asyncio.gather(*(scraped(app, path) for app, path in pages * 20))

    assert {200} == {answer.status_code for answer in answers}
    assert 1 == redis_server.calls("ping")
    assert 2 == redis_server.calls("info")  # ours, and the one that asks
    assert 1 == len(redis_server.connections())
    await manager.close()
    wait_until(lambda: redis_server.connections() == [], "no connection is left")


async def test_scrape_needs_no_free_connection(redis_server: ExternalServer) -> None:
    """A pool in which nothing is free is what one wants to see then."""
    manager = RedisManager(Settings(REDIS_URL=redis_server.url, REDIS_POOL_SIZE=1))
    client = await manager.get_connection()
    assert isinstance(client, aioredis.Redis)
    held = await client.connection_pool.get_connection()
    try:
        began = fair_time()
        now = await samples(metrics_app(redis=manager))
        assert fair_time() - began < DEADLINE
    finally:
        await client.connection_pool.release(held)

    assert 1 == now["redis_up"]
    assert now['redis_pool_connections{state="in_use"}'] == now['redis_pool_connections{state="max"}'] == 1


@pytest.mark.usefixtures("shipped_deadlines")
async def test_scrape_of_a_hung_redis_is_answered_in_time(private_server: StartServer, counted: Telemetry) -> None:
    """Once a second it waits for the deadline, else it is told at once; what we counted is there, and the reason."""
    server = private_server()
    app = metrics_app(redis=server.url)
    counted.cache_saved_tokens.inc(7)
    server.pause()
    try:
        waits = []
        for _ in range(2):
            began, fairly = time.monotonic(), fair_time()
            now = await samples(app)
            waits.append((time.monotonic() - began, fair_time() - fairly))
    finally:
        server.resume()

    assert 0 == now["redis_up"]
    assert 7 == now["cache_saved_tokens_total"]
    (wall, fair), (_, again) = waits
    assert wall >= DEADLINE
    assert fair < DEADLINE + 0.4
    assert again < 0.2
    assert 1 == now['redis_commands_total{op="ping",outcome="timeout"}']


@pytest.mark.usefixtures("shipped_deadlines")
async def test_scraper_that_goes_away_takes_nothing_along(private_server: StartServer) -> None:
    """Who waits beside it still gets an answer."""
    server = private_server()
    app = metrics_app(redis=server.url)
    server.pause()
    try:
        one, other = (asyncio.create_task(scraped(app)) for _ in range(2))
        await asyncio.sleep(0.1)
        one.cancel()
        answer = await other
    finally:
        server.resume()

    assert one.cancelled()
    assert 200 == answer.status_code


async def test_closing_ends_a_question(private_server: StartServer) -> None:
    """A manager that is closed while Redis is asked neither waits for the answer nor leaves anything running."""
    server = private_server()
    manager = RedisManager(Settings(REDIS_URL=server.url))
    server.pause()
    try:
        scrape = asyncio.create_task(samples(metrics_app(redis=manager)))
        await asyncio.sleep(0.1)
        began = fair_time()
        await manager.close()
        assert 0 == (await scrape)["redis_up"]
        assert fair_time() - began < DEADLINE / 2
    finally:
        server.resume()


async def test_client_that_cannot_be_built_is_shown_as_down() -> None:
    """As a host without an address, where the limits go on without Redis, too."""

    class Unbuildable(RedisManager):
        def _connect(self) -> Any:
            raise OSError("no address for secret-host")

    manager = Unbuildable(Settings())
    text = (await scraped(metrics_app(redis=manager))).text

    assert "redis_asgi_redis_up 0.0" in text
    assert "secret-host" not in text
    assert {} == await RedisMetrics(manager).collect_metrics()


async def test_dead_redis_is_shown_as_down() -> None:
    """With nothing of where it should be."""
    app = metrics_app(redis="redis://someone:secret@127.0.0.1:1")
    answer = await scraped(app)

    assert "redis_asgi_redis_up 0.0" in answer.text
    assert 'server="unknown"' in answer.text
    for word in ("someone", "secret", "127.0.0.1", "Error", "refused."):
        assert word not in answer.text


async def test_served_by_itself_it_closes_what_it_opened(redis_server: ExternalServer) -> None:
    """The manager's client, if it is the package's own; one of the user's stays open."""
    for redis_argument, is_open in ((redis_server.url, False), (RedisManager(Settings()), True)):
        app = metrics_app(redis=redis_argument)
        await app._target.own.get_connection()
        await app.aclose()
        assert is_open == (app._target.own.pool is not None)


# several processes


FILES = """
import asyncio, os, shutil, sys
import httpx
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from redis_asgi import Settings, metrics_app
from redis_asgi.telemetry import telemetry

async def main():
    app = metrics_app(settings=Settings(REDIS_URL="memory://"))
    telemetry().cache_saved_tokens.inc(3)
    Counter("of_the_app", "Not ours to show.").inc()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        text = (await client.get("/")).text
        assert "redis_asgi_cache_saved_tokens_total 3.0" in text, text
        assert "redis_asgi_ratelimit_local_partitions 0.0" in text, text
        assert "of_the_app" not in text, text
        everything = CollectorRegistry()
        MultiProcessCollector(everything)
        theirs = generate_latest(everything).decode()
        assert "of_the_app_total 1.0" in theirs and "redis_asgi_cache_saved_tokens_total 3.0" in theirs, theirs
        shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"])
        for path in ("/", "/json"):
            gone = await client.get(path)
            assert (503, {"error": "counters_unreadable"}) == (gone.status_code, gone.json())

asyncio.run(main())
"""


def test_files_are_read_and_missed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """We show ours, the app both; without the files a scrape fails instead of starting again from zero."""
    folder = tmp_path_factory.mktemp("multiproc")
    # Without -X dev: prometheus-client leaves its files to the end of the process.
    done = run_python(FILES, flags=(), env={"PROMETHEUS_MULTIPROC_DIR": str(folder)})

    assert 0 == done.returncode, done.stderr
    assert "redis_asgi.metrics_unreadable" in done.stderr


def test_missing_folder_is_told_at_construction() -> None:
    """Not to the first scrape, and not to the first request."""
    script = """
from redis_asgi import ConfigurationError, Settings, metrics_app
try:
    metrics_app(settings=Settings(REDIS_URL="memory://"))
except ConfigurationError as error:
    print(error)
"""
    done = run_python(script, env={"PROMETHEUS_MULTIPROC_DIR": "/nonexistent/folder"})

    assert done.stdout.startswith("PROMETHEUS_MULTIPROC_DIR is not a directory"), done.stderr


WORKER = """
import os
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from redis_asgi import metrics_app
from redis_asgi.telemetry import telemetry

requests = telemetry().ratelimit_requests.labels("allowed", "redis")
checks = telemetry().ratelimit_check_duration.labels("redis")

async def count(request):
    requests.inc()
    checks.observe(0.002)
    return PlainTextResponse(str(os.getpid()))

app = Starlette(routes=[Route("/count", count), Mount("/metrics", metrics_app())])
"""


@contextmanager
def workers(folder: Path, source: str, number: int, **environment: str) -> Iterator[str]:
    """The app in *source* with so many uvicorn workers that count together; its URL."""
    (folder / "counting.py").write_text(source)
    (folder / "counters").mkdir()
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "counting:app", "--app-dir", str(folder), "--port", str(port)]
    command += ["--workers", str(number), "--no-access-log"]
    environment = clean_environment(PROMETHEUS_MULTIPROC_DIR=str(folder / "counters"), **environment)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: answers(f"{url}/metrics/"), "workers answer", within=30)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=20)


def answers(url: str) -> bool:
    """Whether somebody answers with 200."""
    try:
        return httpx.get(url, trust_env=False, verify=TLS).status_code == 200
    except httpx.HTTPError:
        return False


def lives(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def total(url: str, series: str) -> set[float]:
    """What some scrapes, each over a connection of its own and so by any worker, say of *series*."""
    found = set()
    for _ in range(6):
        text = httpx.get(f"{url}/metrics/", trust_env=False, verify=TLS).text
        found.add(float(next(line for line in text.splitlines() if line.startswith(series)).rpartition(" ")[2]))
    return found


def test_sums_over_workers_are_exact(tmp_path: Path, redis_url: str) -> None:
    """Whichever of three workers is scraped says what all have counted, also of one that has been replaced."""
    requests = 'redis_asgi_ratelimit_requests_total{outcome="allowed",source="redis"}'
    with workers(tmp_path, WORKER, 3, REDIS_URL=redis_url) as url:
        counted_by: list[int] = []

        def count_until(seen: int) -> None:
            # Which worker takes a connection is the kernel's choice.
            while len(set(counted_by)) < seen:
                assert len(counted_by) < 5_000
                counted_by.append(int(httpx.get(f"{url}/count", trust_env=False, verify=TLS).text))

        count_until(3)
        assert {float(len(counted_by))} == total(url, requests)
        assert {float(len(counted_by))} == total(url, "redis_asgi_ratelimit_check_duration_seconds_count")
        figures = httpx.get(f"{url}/metrics/json", trust_env=False, verify=TLS).json()
        assert len(counted_by) == figures["middleware"]["ratelimit"]["allowed"]

        os.kill(counted_by[0], signal.SIGTERM)
        # Until it is gone it may take a connection and drop it, counted or not.
        wait_until(lambda: not lives(counted_by[0]), "the worker ends", within=30)
        count_until(4)
        assert {float(len(counted_by))} == total(url, requests)
