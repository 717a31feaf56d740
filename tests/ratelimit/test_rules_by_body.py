"""Rules whose partition is read from the body: what they cover, and what reading it takes."""

import asyncio
import gc
import json
from collections.abc import Sequence
from typing import Any

import orjson
import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redis_asgi import (
    ConfigurationError,
    EmbeddingCacheMiddleware,
    RateLimit,
    RateLimitMiddleware,
    RedisManager,
    Rule,
    Settings,
    by_header,
    by_json,
    by_mcp_tool,
    client_ip,
    rate_limit,
    tokens,
)
from redis_asgi.asgi import bodies
from redis_asgi.asgi.body_budget import process_budget
from redis_asgi.embeddings.requests import question

from .buckets import PLANS, TOOLS, body, call
from .harness import Spy, client_of, drive, header, http_scope, websocket_scope

pytestmark = pytest.mark.anyio


async def remaining(app: ASGIApp, content: bytes, **fields: str) -> Any:
    """What the ``RateLimit`` field of a POST's answer says, or the status of a refusal."""
    async with client_of(app) as client:
        response = await client.post("/", content=content, headers=fields)
    return response.headers.get("ratelimit") if response.status_code == 200 else response.status_code


async def test_each_bucket_has_its_own_counter_for_each_key(any_settings: Settings) -> None:
    """Key and model together; invented models share one counter."""
    rule = Rule("2/minute", name="m", partition_by=[by_header("x-api-key"), by_json("model", PLANS)])
    spy = Spy()
    app = RateLimitMiddleware(spy, rules=[rule], settings=any_settings)
    seen = [
        await remaining(app, body(model=model), **{"x-api-key": key})
        for key, model in [
            ("a", "gpt-5"), ("a", "gpt-5.1"), ("a", "gpt-5"), ("a", "gpt-5-mini"), ("b", "gpt-5"),
            ("a", "x1"), ("a", "x2"), ("a", "x3"),
        ]
    ]  # fmt: skip

    assert ['"m";r=1;t=60', '"m";r=0;t=60', 429, '"m";r=1;t=60', '"m";r=1;t=60'] == seen[:5]
    assert ['"m";r=1;t=60', '"m";r=0;t=60', 429] == seen[5:]
    assert body(model="gpt-5") == spy.bodies[0]


async def test_rule_covers_requests_with_a_body_only(any_settings: Settings) -> None:
    """POST, PUT and PATCH that have one; others are as if the rule were not there."""
    rules = [Rule("9/minute", name="all"), Rule("5/minute", name="m", partition_by=by_json("model", ["a"]))]
    app = RateLimitMiddleware(Spy(), rules=rules, settings=any_settings)
    async with client_of(app) as client:
        covered = [
            '"m"' in (await client.request(method, "/", content=content)).headers["ratelimit"]
            for method, content in [
                ("POST", b"{}"), ("PUT", b"{}"), ("PATCH", b"x"), ("POST", b""), ("GET", b"{}"), ("DELETE", b"{}"),
            ]
        ]  # fmt: skip

    assert [True, True, True, False, False, False] == covered


@pytest.mark.parametrize("encoding", [[(b"transfer-encoding", b"chunked")], []], ids=["overridden", "a lie"])
async def test_no_length_says_that_there_is_no_body(
    any_settings: Settings, encoding: list[tuple[bytes, bytes]]
) -> None:
    """A server that passes on a ``Content-Length`` of 0 beside a body in chunks takes no request
    out of a rule.
    """
    rules = [
        Rule("9/minute", name="m", partition_by=by_json("model", ["a"])),
        Rule("100000/minute", name="tokens", cost=tokens()),
    ]
    app = RateLimitMiddleware(Spy(), rules=rules, settings=any_settings)
    scope = http_scope(method="POST", headers=[(b"content-length", b"0"), *encoding])
    sent = await drive(app, scope, {"type": "http.request", "body": b'{"model":"a"}', "more_body": False})

    told = header(sent[0], b"ratelimit") or b""
    assert (True, True) == (b'"m";r=8' in told, b'"tokens"' in told)


async def test_methods_say_else(any_settings: Settings) -> None:
    """A rule that names GET covers a GET with a body, and none without."""
    rule = Rule("5/minute", methods="GET", partition_by=by_json("model", ["a"]))
    app = RateLimitMiddleware(Spy(), rules=[rule], settings=any_settings)
    async with client_of(app) as client:
        responses = [await client.request("GET", "/", content=content) for content in (b"{}", b"")]
        post = await client.post("/", content=b"{}")

    assert [True, False] == ["ratelimit" in response.headers for response in responses]
    assert "ratelimit" not in post.headers


async def test_handshake_is_not_covered(any_settings: Settings) -> None:
    """It has no body, and a rule that names it cannot be."""
    app = RateLimitMiddleware(
        _accepting, rules=[Rule("1/minute", partition_by=by_json("m", "a"))], settings=any_settings
    )

    assert [None, None] == [header((await drive(app, websocket_scope()))[0], b"ratelimit") for _ in range(2)]
    with pytest.raises(ConfigurationError, match="handshake has no body"):
        RateLimitMiddleware(
            Spy(), rules=[Rule("1/minute", methods="WEBSOCKET", partition_by=by_json("m", "a"))], settings=any_settings
        )


async def _accepting(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "websocket.accept", "headers": []})


async def test_other_of_none_leaves_the_rule_out(any_settings: Settings) -> None:
    """Other models are not limited by it, and not counted."""
    rule = Rule("1/minute", partition_by=[client_ip, by_json("model", ["big"], other=None)])
    app = RateLimitMiddleware(Spy(), rules=[rule], settings=any_settings)

    assert [None, None] == [await remaining(app, body(model="small")) for _ in range(2)]
    assert ['"default";r=0;t=60', 429] == [await remaining(app, body(model="big")) for _ in range(2)]


async def test_none_of_one_part_takes_the_request_out_of_the_rule(any_settings: Settings) -> None:
    """Whichever part says so; parts behind a body that is not covered are not asked."""
    asked: list[str] = []

    async def tenant(conn: HTTPConnection) -> str | None:
        asked.append(conn.headers["x-tenant"])
        return conn.headers["x-tenant"] or None

    rule = Rule("1/minute", partition_by=(tenant, by_json("model", ["a"], other=None)))
    app = RateLimitMiddleware(Spy(), rules=[rule], settings=any_settings)

    assert await remaining(app, body(model="a"), **{"x-tenant": ""}) is None
    assert await remaining(app, body(model="b"), **{"x-tenant": "t"}) is None
    assert '"default";r=0;t=60' == await remaining(app, body(model="a"), **{"x-tenant": "t"})
    assert ["", "t"] == asked


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        pytest.param("ip", ['"default";r=0;t=60', '"default";r=0;t=60', 429], id="address"),
        pytest.param("skip", [None, '"default";r=0;t=60', None], id="skip"),
        pytest.param("shared", ['"default";r=0;t=60', '"default";r=0;t=60', 429], id="shared"),
        pytest.param("refuse", [400, '"default";r=0;t=60', 400], id="refuse"),
    ],
)
@pytest.mark.parametrize("parts", [[client_ip], [by_json("model", ["a"])]], ids=["known", "with the body"])
async def test_missing_identity_of_a_part(any_settings: Settings, missing: Any, expected: Any, parts: Any) -> None:
    """``RATE_LIMIT_MISSING_IDENTITY`` holds for each part;
    the address in its place is no identity of that name.
    """
    strict = any_settings.model_copy(update={"RATE_LIMIT_MISSING_IDENTITY": missing})
    rule = Rule("1/minute", partition_by=[by_header("x-key"), *parts])
    app = RateLimitMiddleware(Spy(), rules=[rule], settings=strict)
    seen = [await remaining(app, body(model="a"), **fields) for fields in ({}, {"x-key": "203.0.113.7"}, {"x-key": ""})]

    assert expected == seen


async def test_sequence_without_a_body_is_one_partition(any_settings: Settings) -> None:
    """By address and key; of GETs too, and a list of one is that one."""
    rules = [
        Rule("1/minute", name="both", partition_by=[client_ip, by_header("x-key")]),
        Rule("2/minute", name="one", partition_by=[by_header("x-key")]),
    ]
    app = RateLimitMiddleware(Spy(), rules=rules, settings=any_settings)
    for address, key, expected in [
        ("1.1.1.1", "a", 200),
        ("1.1.1.2", "a", 200),
        ("1.1.1.1", "a", 429),
        ("1.1.1.1", "b", 200),
    ]:
        async with client_of(app, address=address) as client:
            assert expected == (await client.get("/", headers={"x-key": key})).status_code


def test_what_is_in_force_is_told(any_settings: Settings) -> None:
    """The kind of a partition, the methods it covers, and that a cost is in tokens."""
    rules = [
        Rule("5/minute", name="m", partition_by=[by_header("x-key"), by_json("model", ["a"])], cost=tokens()),
        Rule("5/minute", name="t", partition_by=by_mcp_tool(["a"]), cost=2, methods="POST"),
    ]
    limits = RateLimitMiddleware(Spy(), rules=rules, settings=any_settings).in_force().limits()

    assert [("header:x-key,json:model", ("POST", "PUT", "PATCH"), "tokens"), ("mcp_tool", ("POST",), 2)] == [
        (limit.by, limit.methods, limit.cost) for limit in limits
    ]


async def test_plain_encoding_is_none(any_settings: Settings) -> None:
    """``Content-Encoding: identity`` hides nothing."""
    app = RateLimitMiddleware(
        Spy(), rules=[Rule("1/minute", partition_by=by_json("model", ["a"]))], settings=any_settings
    )

    assert '"default";r=0;t=60' == await remaining(app, body(model="a"), **{"content-encoding": "identity"})
    assert 429 == await remaining(app, body(model="a"))
    assert '"default";r=0;t=60' == await remaining(app, body(model="a"), **{"content-encoding": "zstd"})


class Body:
    """A ``receive`` that knows whether it was asked, and hands a body out in pieces."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.asked = 0

    async def __call__(self) -> Message:
        self.asked += 1
        part, self._content = self._content[:7], self._content[7:]
        return {"type": "http.request", "body": part, "more_body": bool(self._content)}


async def post(app: ASGIApp, content: bytes, **changes: Any) -> tuple[list[Message], Body]:
    """A POST that is driven by hand."""
    receive, sent = Body(content), list[Message]()

    async def send(message: Message) -> None:
        sent.append(message)

    await app(http_scope(method="POST", **changes), receive, send)
    return sent, receive


async def test_known_refusal_reads_no_body(redis_url: str) -> None:
    """Of a client whose other limit is used up nothing is read."""
    settings = Settings(REDIS_URL=redis_url, RATE_LIMIT_TIMEOUT=5)
    rules = [
        Rule("1/minute", name="all"),
        Rule("5/minute", name="m", partition_by=[client_ip, by_json("model", ["a"])]),
    ]
    app = RateLimitMiddleware(Spy(), rules=rules, settings=settings)
    first, _ = await post(app, body(model="a"))
    again = [await post(app, body(model="a")) for _ in range(3)]

    assert 200 == first[0]["status"]
    assert [429, 429, 429] == [sent[0]["status"] for sent, _ in again]
    assert 0 == again[-1][1].asked


async def test_nothing_is_read_where_no_such_rule_covers(any_settings: Settings) -> None:
    """Another path's request is the app's alone."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("ok")(scope, receive, send)

    rules = [Rule("5/minute", name="m", paths="/v1/*", partition_by=by_json("m", "a")), Rule("9/minute", name="all")]
    limited = RateLimitMiddleware(app, rules=rules, settings=any_settings)

    assert 0 == (await post(limited, b"{}"))[1].asked
    assert 2 == (await post(limited, b'{"m": "a"}', path="/v1/x"))[1].asked


async def test_body_over_the_cap_is_other_and_whole_for_the_app(any_settings: Settings) -> None:
    """Reading stops there; ``other=None`` does not let it pass uncounted."""
    small = any_settings.model_copy(update={"RATE_LIMIT_BODY_CAP": 20})
    content = body(model="a", text="x" * 100)
    for other in ("other", None):
        spy = Spy()
        rule = Rule("1/minute", name=f"m{other}", partition_by=by_json("model", ["a"], other=other))
        app = RateLimitMiddleware(spy, rules=[rule], settings=small)

        assert f'"m{other}";r=0;t=60' == await remaining(app, content)
        assert 429 == await remaining(app, content)
        assert [content] == spy.bodies


async def test_client_that_leaves_in_mid_body_is_seen_by_the_app(any_settings: Settings) -> None:
    """It is counted, and no error."""
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"]])

    limited = RateLimitMiddleware(app, rules=[Rule("5/minute", partition_by=by_json("m", "a"))], settings=any_settings)
    await drive(limited, http_scope(method="POST"), {"type": "http.request", "body": b'{"m', "more_body": True})

    assert ["http.request", "http.disconnect"] == seen


async def test_body_is_read_once_and_parsed_once_for_all(
    any_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rules, two callables and the app look at one reading."""
    parsed: list[bytes] = []

    class Orjson:
        JSONDecodeError = orjson.JSONDecodeError

        @staticmethod
        def loads(content: bytes) -> Any:
            parsed.append(content)
            return orjson.loads(content)

    monkeypatch.setattr(bodies, "orjson", Orjson)
    monkeypatch.setattr("redis_asgi.asgi.bodies.json.loads", lambda *_: parsed.append(b"again"))

    async def price(request: Request) -> int:
        return int((await request.json())["n"])

    rules = [
        Rule("50/minute", name="one", partition_by=by_json("model", ["a"]), cost=price),
        Rule("50/minute", name="two", partition_by=[client_ip, by_json("n", ["3"])]),
        Rule("50/minute", name="three", cost=price),
    ]
    spy = Spy()
    app = RateLimitMiddleware(spy, rules=rules, settings=any_settings)
    sent, _ = await post(app, body(model="a", n=3))

    assert b'"three";r=47;t=60, "one";r=47;t=60, "two";r=49;t=60' == header(sent[0], b"ratelimit")
    assert [body(model="a", n=3)] == spy.bodies == parsed


async def test_a_batch_costs_its_calls(any_settings: Settings) -> None:
    """Each call the cost of the rule; the header is not believed."""
    rule = Rule("10/minute", name="t", partition_by=[client_ip, by_mcp_tool(TOOLS)], cost=2)
    app = RateLimitMiddleware(Spy(), rules=[rule], settings=any_settings)
    name = {"mcp-name": "search", "mcp-method": "tools/call"}

    assert '"t";r=8;t=60' == await remaining(app, json.dumps(call("x")).encode(), **name)
    assert '"t";r=2;t=60' == await remaining(app, json.dumps([call()] * 3).encode(), **name)
    assert 429 == await remaining(app, json.dumps([call()] * 2).encode(), **name)
    assert '"t";r=0;t=60' == await remaining(app, json.dumps([call()]).encode(), **name)
    assert await remaining(app, b'{"method": "tools/list"}', **name) is None
    assert 429 == await remaining(app, json.dumps([call()] * 6).encode(), **name)


async def test_stacked_instances_count_once(any_settings: Settings) -> None:
    """The inner one reads the same body, and skips what the outer one has charged."""
    rule = Rule("5/minute", name="m", partition_by=[client_ip, by_json("model", ["a"])])
    spy = Spy()
    manager = RedisManager(any_settings)
    inner = RateLimitMiddleware(spy, rules=[rule], redis=manager, settings=any_settings)
    outer = RateLimitMiddleware(inner, rules=[rule], redis=manager, settings=any_settings)

    assert '"m";r=4;t=60' == await remaining(outer, body(model="a"))
    assert [body(model="a")] == spy.bodies


async def test_limit_of_a_route_counts_by_the_body(any_settings: Settings) -> None:
    """Whether FastAPI has read it already or the endpoint does so later, or nobody."""
    app = FastAPI()
    limit = RateLimit("1/minute", partition_by=[client_ip, by_json("model", PLANS)], settings=any_settings, name="r")

    @app.post("/parsed", dependencies=[Depends(limit)])
    async def parsed(content: dict[str, Any]) -> Any:
        return content

    @app.post("/raw", dependencies=[Depends(limit)])
    async def raw(request: Request) -> Any:
        return await request.json()

    @app.get("/raw", dependencies=[Depends(limit)])
    async def got() -> str:
        return "free"

    async with client_of(app) as client:
        for path, model, expected in [
            ("/parsed", "gpt-5", 200), ("/raw", "gpt-5", 429), ("/raw", "gpt-5-mini", 200),
            ("/parsed", "gpt-5-mini", 429), ("/raw", "x", 200), ("/raw", "y", 429),
        ]:  # fmt: skip
            response = await client.post(path, json={"model": model})
            assert expected == response.status_code
            assert expected == 429 or {"model": model} == response.json()
        assert [200, 200] == [(await client.get("/raw")).status_code for _ in range(2)]


async def test_decorated_endpoint_counts_by_the_body(any_settings: Settings) -> None:
    """The endpoint reads the same bytes."""

    @rate_limit("1/minute", partition_by=by_json("model", ["a"]), settings=any_settings, name="d")
    async def endpoint(request: Request) -> JSONResponse:
        return JSONResponse(await request.json())

    app = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    async with client_of(app) as client:
        one, other, again = [await client.post("/", json={"model": model}) for model in ("a", "b", "a")]

    assert [200, 200, 429] == [one.status_code, other.status_code, again.status_code]
    assert {"model": "a"} == one.json()


@pytest.mark.parametrize("limits", ["9/minute", "1/minute"], ids=["admitted", "refused"])
async def test_body_that_nobody_receives_leaves_no_room_taken(any_settings: Settings, limits: str) -> None:
    """The room is back when the request is over, not when the collector comes:
    else a few clients take all of it.
    """

    async def cost(request: Request) -> int:
        return 1 + len(await request.body()) // 10_000_000

    rules = [
        Rule(limits, name="costly", cost=cost),
        Rule("9/minute", name="m", partition_by=by_json("model", ["a"])),
        Rule("100000/minute", name="tokens", cost=tokens(estimate=lambda request: 5)),
    ]
    app = RateLimitMiddleware(PlainTextResponse("ok"), rules=rules, settings=any_settings)
    before = process_budget().left
    gc.disable()
    try:
        sent = [
            await drive(
                app, http_scope(method="POST"), {"type": "http.request", "body": body(model="a", x="y" * 50_000)}
            )
            for _ in range(3)
        ]
        assert before == process_budget().left
    finally:
        gc.enable()

    assert (429 if limits == "1/minute" else 200) == sent[-1][0]["status"]


async def test_cancelled_request_leaves_no_room_taken(any_settings: Settings) -> None:
    """A client that is cut off while its body is read, or while Redis is asked, holds nothing."""
    never = asyncio.Event()

    async def receive() -> Message:
        if not first:
            await never.wait()
        return first.pop()

    first: list[Message] = [{"type": "http.request", "body": b"x" * 1000, "more_body": True}]

    async def send(message: Message) -> None:
        raise AssertionError(message)

    before = process_budget().left
    app = RateLimitMiddleware(Spy(), rules=[Rule("5/minute", partition_by=by_json("m", "a"))], settings=any_settings)
    task = asyncio.ensure_future(app(http_scope(method="POST"), receive, send))
    while first:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    del task

    assert before == process_budget().left


HOSTILE: Sequence[bytes] = [
    b"[" * 200_000, b'{"model":' * 100_000, b'{"model": ' + b"9" * 100_000 + b"}", b'{"model": -1e400}', b"null", b"[]",
    b'{"model": ["a"]}', b'{"model": {"model": "a"}}', b"\xff" * 100, b'{"model": "\\ud800"}', b'"model"', b"\0" * 100,
    b'{"": 1}', b'{"model": "' + b"a" * 200_000 + b'"}', b'{"model": "a"}' * 2, b" " * 1000,
]  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
async def test_hostile_bodies_are_other_and_reach_the_app(any_settings: Settings, content: bytes) -> None:
    """Never an error of ours, and never a counter of their own."""
    spy = Spy()
    rules = [
        Rule("2/minute", name="m", partition_by=by_json("model", ["x"])),
        Rule("2/minute", name="d", partition_by=by_json("model.model", ["x"])),
        Rule("9/minute", name="t", partition_by=by_mcp_tool(["x"])),
    ]
    app = RateLimitMiddleware(spy, rules=rules, settings=any_settings)

    assert '"m";r=1;t=60, "d";r=1;t=60' in await remaining(app, content)
    assert [content] == spy.bodies
    await remaining(app, b"{}")
    assert 429 == await remaining(app, content)


async def test_cache_behind_uses_the_parse(any_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The body of an embedding request is parsed by the limiter alone,
    and its answer is what it was.
    """

    async def unparsed(*_: Any) -> Any:
        raise AssertionError("parsed again")

    async def embed(request: Request) -> JSONResponse:
        texts = (await request.json())["input"]
        data = [
            {"object": "embedding", "index": i, "embedding": [0.5, float(len(text))]} for i, text in enumerate(texts)
        ]
        return JSONResponse(
            {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}
        )

    app = Starlette(routes=[Route("/v1/embeddings", embed, methods=["POST"])])
    cached = EmbeddingCacheMiddleware(app, settings=any_settings)
    limited = RateLimitMiddleware(
        cached, rules=[Rule("9/minute", partition_by=by_json("model", ["m"]))], settings=any_settings
    )
    async with client_of(limited) as client:
        ask = {"model": "m", "input": ["a", "bbb"]}
        plain = (await client.post("/v1/embeddings", json=ask)).json()
        monkeypatch.setattr(question, "parse_request", unparsed)
        again = await client.post("/v1/embeddings", json={**ask, "user": "u"})
        partly = await client.post("/v1/embeddings", json={"model": "m", "input": ["a", "cc"]})

    assert plain["data"] == again.json()["data"]
    assert [[0.5, 1.0], [0.5, 2.0]] == [item["embedding"] for item in partly.json()["data"]]
    assert "hit" in again.headers["cache-status"]
