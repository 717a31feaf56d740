"""Leases: what the app has allowed, for how long, to whom, and what a hit repeats."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import orjson
import pytest
import redis
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from redis_asgi.connection.manager import RedisManager
from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.embeddings.records.lease import Lease, decode_denied, decode_lease, encode_denied, encode_lease
from redis_asgi.settings import Settings

from ..kit.embedding_apps import FORMATS, Spy, cache_status, client, listed, read, respond, server
from ..kit.inside import shared_of
from ..kit.patience import quiet, until
from .callers import Caller, Gate

pytestmark = pytest.mark.anyio

NAME = b"embedding_lease:v1:" + 32 * b"5a"
GRANTED = Lease(1.0, 2.5, 201, "m", ((b"content-type", b"application/json"),), {"fields": {"a": [1]}})


def test_a_record_says_what_was_granted() -> None:
    """Both times, the status, the model, headers and frame come back."""
    raw = encode_lease(NAME, GRANTED)
    assert raw is not None
    assert decode_lease(NAME, raw) == GRANTED


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "other version": lambda record: record | {"v": 1},
    "another record's key": lambda record: record | {"own": 16 * "5b"},
    "status of no answer": lambda record: record | {"status": 302},
    "line break in a header's name": lambda record: record | {"headers": [["x\r\nset-cookie: a", "Yg=="]]},
    "blank in a header's name": lambda record: record | {"headers": [["x y", "Yg=="]]},
    "empty header name": lambda record: record | {"headers": [["", "Yg=="]]},
    "line break in a header's value": lambda record: record | {"headers": [["x", "YQ0KYg=="]]},
    "header of three": lambda record: record | {"headers": [["x", "Yg==", "Yg=="]]},
    "model of another type": lambda record: record | {"model": None},
    "frame of another type": lambda record: record | {"frame": []},
    "time of another type": lambda record: record | {"at": "soon"},
    "no times": lambda record: {k: v for k, v in record.items() if k != "asked"},
    "list": lambda _: [],
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN)
def test_a_record_of_another_shape_grants_nothing(spoil: Callable[[dict[str, Any]], Any]) -> None:
    """Whoever writes to Redis opens no door by that, and splits no answer."""
    raw = encode_lease(NAME, GRANTED)
    assert raw is not None
    assert decode_lease(NAME, orjson.dumps(spoil(orjson.loads(raw)))) is None


@pytest.mark.parametrize("raw", [None, b"", b"{", 42, ValueError("of a proxy"), [b""], b" " * 20_000], ids=repr)
def test_what_is_no_record_grants_nothing(raw: object) -> None:
    """Also a reply of another shape."""
    assert decode_lease(NAME, raw) is None


@pytest.mark.parametrize(
    ("raw", "at"),
    [(None, None), (encode_denied(5.25), 5.25), (b"", float("inf")), (b"x", float("inf")), (7, float("inf"))],
)
def test_an_unreadable_refusal_is_one(raw: object, at: float | None) -> None:
    """Only its absence says that nobody was refused."""
    assert at == decode_denied(raw)


def test_a_refusal_is_kept_as_no_earlier_than_it_was() -> None:
    """What was allowed a moment before it is over in every worker."""
    kept = decode_denied(encode_denied(5.0004))
    assert kept is not None
    assert kept >= 5.0004


def behind(app: ASGIApp, may: Callable[[dict[bytes, bytes]], int]) -> ASGIApp:
    """*app* behind a door: *may* gives the status, 200 = come in."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        status = may(dict(scope["headers"]))
        await (app(scope, receive, send) if status == 200 else respond(send, b'{"error":"no"}', status))

    return checked


async def ask(app: ASGIApp, *items: Any, path: str = "/v1/embeddings", **headers: str) -> Any:
    """One request; its headers have dashes."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with client(app, **named) as c:
        return await c.post(path, json={"model": "m", "input": list(items)})


KEY_HEADERS = ["x-litellm-api-key", "x-goog-api-key", "ocp-apim-subscription-key", "apikey", "x-forwarded-access-token"]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", [*KEY_HEADERS, "x-key-of-a-gateway"])
async def test_a_credential_may_be_in_any_header(name: str, share: bool, any_settings: Settings) -> None:
    """Who comes without it, or with another one, gets the app's own 401."""
    app = behind(server(Spy()), lambda headers: 200 if headers.get(name.encode()) == b"good" else 401)
    cached = EmbeddingCacheMiddleware(app, share=share, settings=any_settings)
    assert "stored" in cache_status(await ask(cached, "a", **{name: "good"}))
    assert "; hit" in cache_status(await ask(cached, "a", **{name: "good"}))
    for headers in ({}, {name: "bad"}, {name: ""}, {"authorization": "good"}):
        assert 401 == (await ask(cached, "a", **headers)).status_code


async def test_a_tenant_is_let_in_as_that_tenant_only(any_settings: Settings) -> None:
    """A caller whom the app answers 403 for one tenant is not let in by what it allowed him for
    another.
    """

    def tenant(conn: HTTPConnection) -> str | None:
        return conn.headers["x-tenant"]

    def may(headers: dict[bytes, bytes]) -> int:
        return 200 if headers[b"authorization"] == b"of " + headers[b"x-tenant"] else 403

    cached = EmbeddingCacheMiddleware(behind(server(Spy()), may), partition_by=tenant, settings=any_settings)
    assert 200 == (await ask(cached, "a", authorization="of a", x_tenant="a")).status_code
    assert 200 == (await ask(cached, "a", authorization="of b", x_tenant="b")).status_code
    assert 403 == (await ask(cached, "a", authorization="of b", x_tenant="a")).status_code
    assert "; hit" in cache_status(await ask(cached, "a", authorization="of a", x_tenant="a"))


async def test_a_401_ends_every_lease_of_its_credential_in_every_worker(redis_url: str) -> None:
    """For other models and paths, too; a 403 ends only the one that it answered."""
    settings, keys, now = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_L1_BYTES=0), {b"k"}, [time.time()]

    def may(headers: dict[bytes, bytes]) -> int:
        return 200 if headers[b"authorization"] in keys else int(headers.get(b"x-request-id", b"401"))

    here, elsewhere = (
        EmbeddingCacheMiddleware(behind(server(Spy()), may), redis=RedisManager(settings)) for _ in range(2)
    )
    for app in (here, elsewhere):
        shared_of(app).clock.wall = lambda: now[0]
    await ask(here, "a", authorization="k")
    async with client(here, authorization="k") as c:
        await c.post("/api/embed", json={"model": "m", "input": "a"})
    keys.clear()
    now[0] += 1
    assert 403 == (await ask(here, "new", authorization="k", x_request_id="403")).status_code
    async with client(elsewhere, authorization="k") as c:
        assert "; hit" in cache_status(await c.post("/api/embed", json={"model": "m", "input": "a"}))
        assert 401 == (await ask(here, "new", authorization="k")).status_code
        assert 401 == (await c.post("/api/embed", json={"model": "m", "input": "a"})).status_code
    now[0] += 1
    keys.add(b"k")
    assert 200 == (await ask(elsewhere, "a", authorization="k")).status_code
    assert "; hit" in cache_status(await ask(elsewhere, "a", authorization="k"))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        *({"authorization": said} for said in ("", " ", "Bearer", "bearer ", "Basic")),
        {"x_forwarded_user": "(null)"},
    ],
    ids=repr,
)
async def test_a_credential_header_that_says_nothing_is_nobody(headers: dict[str, str], any_settings: Settings) -> None:
    """Where the app lets addresses in, another one is not let in by that."""
    app = behind(server(Spy()), lambda sent: 200 if sent[b"x-forwarded-for"].startswith(b"10.") else 401)
    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    for said in ("stored", "; hit"):
        assert said in cache_status(await ask(cached, "a", x_forwarded_for="10.0.0.1", **headers))
    assert 401 == (await ask(cached, "a", x_forwarded_for="192.0.2.1", **headers)).status_code


NOT_CACHED: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"late_chunking": True}, {}),
    ({"input": [["nested"]]}, {}),
    ({"input": ["a", "b"], "lora_path": ["a", "b"]}, {}),
    ({}, {"accept": "text/plain"}),
    ({}, {"content-md5": "x"}),
    ({}, {"cache-control": "no-store"}),
    ({}, {"x-nobody": "1"}),
]


@pytest.mark.parametrize(("fields", "headers"), NOT_CACHED, ids=repr)
async def test_a_401_counts_whatever_was_asked(
    fields: dict[str, Any], headers: dict[str, str], any_settings: Settings
) -> None:
    """Also what passes through tells that the app does not know a caller any more."""
    keys, now = {b"k"}, [time.time()]
    app = behind(server(Spy()), lambda sent: 200 if sent[b"authorization"] in keys else 401)

    def tenant(conn: HTTPConnection) -> str | None:
        return None if "x-nobody" in conn.headers else "t"

    cached = EmbeddingCacheMiddleware(app, partition_by=tenant, settings=any_settings)
    shared_of(cached).clock.wall = lambda: now[0]
    await ask(cached, "a", authorization="k")
    assert "; hit" in cache_status(await ask(cached, "a", authorization="k"))
    keys.clear()
    now[0] += 1
    async with client(cached, authorization="k", **headers) as c:
        refused = await c.post("/v1/embeddings", json={"model": "m", "input": "a"} | fields)
    assert (401, True) == (refused.status_code, "fwd=bypass" in cache_status(refused))
    assert 401 == (await ask(cached, "a", authorization="k")).status_code


async def test_two_hundred_hits_at_a_leases_end_are_one_call(any_settings: Settings) -> None:
    """Who finds the lease being renewed waits for that; all get their own vectors."""
    spy, gate, now = Spy(), Gate(), [time.time()]
    gate.open.set()
    cached = EmbeddingCacheMiddleware(server(spy, before=gate), settings=any_settings)
    shared_of(cached).clock.wall = lambda: now[0]
    await Caller(cached, "a", "b").task
    now[0] += 301
    gate.open.clear()
    callers = [Caller(cached, text) for text in "ab" * 100]
    await until(lambda: spy.calls >= 2)
    await quiet(shared_of(cached).vectors.manager)
    gate.open.set()
    await asyncio.gather(*(caller.task for caller in callers))
    assert {200} == {caller.status for caller in callers}
    alone = [Caller(server(Spy()), text) for text in "ab"]
    await asyncio.gather(*(caller.task for caller in alone))
    assert 100 * [caller.answer["data"] for caller in alone] == [caller.answer["data"] for caller in callers]
    assert 2 == spy.calls


async def test_with_a_lease_of_zero_whoever_joins_asks_as_well(any_settings: Settings) -> None:
    """The app sees every request, and one that it refuses meanwhile is not let in by the answer to
    another.
    """
    gate, open_doors = Gate(), [True, False]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        may = open_doors.pop(0)
        await gate(scope) if may else None
        await (server(Spy())(scope, receive, send) if may else respond(send, b"{}", 403))

    cached = EmbeddingCacheMiddleware(app, lease=0, settings=any_settings)
    first = Caller(cached, "a", "bb")
    await gate.reached.wait()
    second = Caller(cached, "a", "bb")
    await until(lambda: [] == open_doors)
    gate.open.set()
    await asyncio.gather(first.task, second.task)
    assert (200, 403) == (first.status, second.status)


async def test_an_answer_with_warnings_lets_in_nobody_who_waits_for_it(any_settings: Settings) -> None:
    """It is about its own request, so each that waited asks the app."""
    gate, calls = Gate(), [0]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = orjson.loads(await read(receive))
        calls[0] += 1
        await gate(scope)
        answer = FORMATS["openai"][2](body, listed(body["input"]), Spy())
        await respond(send, orjson.dumps(answer | {"warnings": [f"call {calls[0]}"]}))

    gate.open.set()
    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    await Caller(cached, "a").task
    gate.open.clear()
    callers = [Caller(cached, "a") for _ in range(3)]
    await until(lambda: any(len(flight._waiting) == 3 for flight in shared_of(cached).flights._by_name.values()))
    gate.open.set()
    await asyncio.gather(*(caller.task for caller in callers))
    assert 3 * ["redis-asgi; fwd=stale; detail=lease; stored"] == [caller.said for caller in callers]
    assert all("warnings" in caller.answer for caller in callers)
    assert 4 == calls[0]


async def test_a_lease_is_renewed_before_its_end_by_one(any_settings: Settings) -> None:
    """In its last tenth one request asks early and the others are hits."""
    spy, gate, now = Spy(), Gate(), [time.time()]
    gate.open.set()
    cached = EmbeddingCacheMiddleware(server(spy, before=gate), settings=any_settings)
    shared_of(cached).clock.wall = lambda: now[0]
    await Caller(cached, "a", "bb").task
    now[0] += 269
    hit = Caller(cached, "a", "bb")
    await hit.task
    assert hit.said.startswith("redis-asgi; hit")
    now[0] += 2
    gate.open.clear()
    early = Caller(cached, "a", "bb")
    await until(lambda: spy.calls == 2)
    others = [Caller(cached, "a", "bb") for _ in range(5)]
    await asyncio.gather(*(other.task for other in others))
    gate.open.set()
    await early.task
    assert 5 * ["redis-asgi; hit"] == [other.said[:15] for other in others]
    assert "redis-asgi; fwd=stale; detail=lease; stored" == early.said
    assert ["a", "bb", "a"] == spy.seen
    now[0] += 200
    later = Caller(cached, "a", "bb")
    await later.task
    assert later.said.startswith("redis-asgi; hit")


@pytest.mark.parametrize("how", ["raises", "fails"])
async def test_an_app_that_fails_when_it_is_asked_early_costs_no_hit(how: str, any_settings: Settings) -> None:
    """The lease still lives; its end is soon enough for the app's error."""
    inner, ill, now = server(Spy()), [False], [time.time()]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if not ill[0]:
            await inner(scope, receive, send)
        elif how == "raises":
            raise RuntimeError("of the app")
        else:
            await respond(send, b"{}", 503)

    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    shared_of(cached).clock.wall = lambda: now[0]
    await ask(cached, "a")
    ill[0] = True
    now[0] += 280
    assert "; hit" in cache_status(await ask(cached, "a"))
    now[0] += 30
    if how == "raises":
        with pytest.raises(RuntimeError, match="of the app"):
            await ask(cached, "a")
    else:
        assert 503 == (await ask(cached, "a")).status_code


async def test_a_refusal_when_asked_early_is_one(any_settings: Settings) -> None:
    """A 401 in the last tenth of a lease ends it at once."""
    keys, now = {b"k"}, [time.time()]
    app = behind(server(Spy()), lambda headers: 200 if headers[b"authorization"] in keys else 401)
    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    shared_of(cached).clock.wall = lambda: now[0]
    await ask(cached, "a", authorization="k")
    keys.clear()
    now[0] += 280
    assert [401, 401] == [(await ask(cached, "a", authorization="k")).status_code for _ in range(2)]


SECURITY = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"content-security-policy": b"default-src 'none'",
    b"strict-transport-security": b"max-age=63072000",
    b"referrer-policy": b"no-referrer",
    b"permissions-policy": b"camera=()",
}


async def test_a_hit_repeats_the_status_and_what_keeps_a_browser_safe(any_settings: Settings) -> None:
    """201 stays 201, and the app's security headers are there; what was said of one request is not."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = orjson.loads(await read(receive))
        answer = FORMATS["openai"][2](body, listed(body["input"]), Spy())
        more = ((b"x-request-id", b"1"), (b"set-cookie", b"a=b"), (b"x-ratelimit-remaining", b"4"))
        await respond(send, orjson.dumps(answer), 201, *SECURITY.items(), *more)

    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    cold, warm = [await ask(cached, "a") for _ in range(2)]
    assert 201 == cold.status_code == warm.status_code
    assert "; hit" in cache_status(warm)
    assert {name: value for name, value in warm.headers.raw if name.lower() in SECURITY} == SECURITY
    assert {"content-type", "content-length", "cache-status"} == {*warm.headers} - {n.decode() for n in SECURITY}


async def test_a_copied_record_opens_nothing(redis_url: str, redis_client: "redis.Redis") -> None:
    """A lease that lies under another caller's key, by whatever mistake, is none."""
    keys = {b"k"}
    app = behind(server(Spy()), lambda headers: 200 if headers[b"authorization"] in keys else 401)
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_L1_BYTES=0, EMBEDDING_CACHE_SHARE=True)
    cached = EmbeddingCacheMiddleware(app, settings=settings)
    await ask(cached, "a", authorization="k")
    keys.add(b"other")
    await ask(cached, "a", authorization="other")
    mine: Any = redis_client.keys("embedding_lease:*")
    assert 2 == len(mine)
    keys.clear()
    one, two = (redis_client.get(name) for name in mine)
    redis_client.set(mine[0], two)  # type: ignore[arg-type]  # it is there
    redis_client.set(mine[1], one)  # type: ignore[arg-type]  # it is there
    assert {401} == {(await ask(cached, "a", authorization=key)).status_code for key in ("k", "other")}
