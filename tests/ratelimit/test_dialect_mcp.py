"""Refusals of tool calls, as MCP has them."""

from typing import Any

import orjson
import pytest
from starlette.types import Message

from redis_asgi import (
    RateLimitMiddleware,
    Rule,
    Settings,
    by_header,
    by_mcp_tool,
    client_ip,
)

from .harness import Spy, client_of, drive, http_scope, memory, own_prefix
from .tool_calls import CALL


def tools(settings: Settings, spy: Spy, **options: Any) -> RateLimitMiddleware:
    """An MCP server behind a limit of one call a minute."""
    rules = [Rule("1/minute", name="calls", paths="/mcp")]
    return RateLimitMiddleware(spy, rules=rules, dialect={"/mcp": "mcp"}, settings=settings, **options)


@pytest.mark.anyio
@pytest.mark.parametrize(("revision", "status"), [("2026-07-28", 429), ("2025-06-18", 200), (None, 200)])
async def test_a_tool_call_is_refused_by_its_id(memory_settings: Settings, revision: str | None, status: int) -> None:
    """A JSON-RPC error that the client takes for the answer to its call,
    with the status that it can read.
    """
    spy = Spy()
    headers = {} if revision is None else {"mcp-protocol-version": revision}
    async with client_of(tools(memory_settings, spy)) as client:
        await client.post("/mcp", json=CALL)
        refused = await client.post("/mcp", json=CALL, headers=headers)

    assert (status, "application/json") == (refused.status_code, refused.headers["content-type"])
    assert str(len(refused.content)) == refused.headers["content-length"]
    answer = refused.json()
    assert ("2.0", "call-1", -32000) == (answer["jsonrpc"], answer["id"], answer["error"]["code"])
    assert int(refused.headers["retry-after"]) == answer["error"]["data"]["retry_after"]
    assert "Limit: calls." in answer["error"]["message"]
    assert 1 == spy.calls


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"id":7}', 7),
        (b'{"id":7.5}', 7.5),
        (b'{"id":"\\u00e4"}', "ä"),
        (b'{"id":null}', None),
        (b'{"id":true}', None),
        (b'{"id":{"a":1}}', None),
        (b'{"method":"notifications/initialized"}', None),
        (b'[{"id":7}]', None),
        (b'{"id":7', None),
        (b"", None),
        (b"\xff\xfe", None),
        (b'{"id":' + b"[" * 200_000, None),
        (b'{"id":1e999}', None),
        (b'{"id":7,"params":"' + b"x" * 70_000 + b'"}', None),
    ],
)
async def test_an_id_that_cannot_be_read_is_null(content: bytes, expected: object) -> None:
    """Whatever stands in a body, it is bounded, and never a 500."""
    settings = memory(REDIS_KEY_PREFIX=own_prefix(), RATE_LIMIT_BODY_CAP=65_536)
    async with client_of(tools(settings, Spy())) as client:
        await client.post("/mcp", content=b"{}")
        refused = await client.post("/mcp", content=content)

    assert (200, expected) == (refused.status_code, refused.json()["id"])


@pytest.mark.anyio
@pytest.mark.parametrize(("coding", "expected"), [("identity", 7), ("Identity", 7), ("gzip", None)])
async def test_an_id_is_read_unless_the_body_is_encoded(
    memory_settings: Settings, coding: str, expected: object
) -> None:
    """``identity`` says that it is not."""
    async with client_of(tools(memory_settings, Spy())) as client:
        await client.post("/mcp", content=b"{}")
        refused = await client.post("/mcp", content=b'{"id":7}', headers={"content-encoding": coding})

    assert expected == refused.json()["id"]


@pytest.mark.anyio
async def test_a_body_is_read_at_a_refusal_only(memory_settings: Settings) -> None:
    """On a path of MCP, that is, and by POST: elsewhere nobody waits for it."""
    app = RateLimitMiddleware(Spy(), "1/minute", dialect={"/mcp": "mcp", "/v1/*": "openai"}, settings=memory_settings)
    asked: list[str] = []

    async def receive() -> Message:
        asked.append("read")
        return {"type": "http.request", "body": b'{"id":1}', "more_body": False}

    await drive(app, http_scope())
    for method, path, reads in (("POST", "/v1/chat", 0), ("POST", "/", 0), ("GET", "/mcp", 0), ("POST", "/mcp", 1)):
        asked.clear()
        sent: list[Message] = []

        async def send(message: Message, sent: list[Message] = sent) -> None:
            sent.append(message)

        await app(http_scope(method=method, path=path), receive, send)
        assert (reads, 2) == (len(asked), len(sent)), path
    assert 1 == orjson.loads(sent[1]["body"])["id"]


@pytest.mark.anyio
async def test_a_client_that_leaves_in_its_body_gets_no_id(memory_settings: Settings) -> None:
    """The refusal goes nowhere then, but nothing breaks."""
    app = tools(memory_settings, Spy())
    await drive(app, http_scope(method="POST", path="/mcp"))
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(http_scope(method="POST", path="/mcp"), receive, send)

    assert orjson.loads(sent[1]["body"])["id"] is None


@pytest.mark.anyio
async def test_a_body_that_a_rule_has_read_has_its_id(memory_settings: Settings) -> None:
    """Rules by the tool read it first; it is there for the answer too."""
    rules = [Rule("1/minute", name="tools", paths="/mcp", partition_by=by_mcp_tool("search"))]
    spy = Spy()
    app = RateLimitMiddleware(spy, rules=rules, dialect={"/mcp": "mcp"}, settings=memory_settings)
    async with client_of(app) as client:
        for _ in range(2):
            answer = await client.post("/mcp", json=CALL)

    assert "call-1" == answer.json()["id"]
    assert 1 == spy.calls


@pytest.mark.anyio
@pytest.mark.parametrize("status", [400, 503])
async def test_a_body_is_received_once_whatever_is_answered(status: int) -> None:
    """A server gives it once: who asks again waits until the client has left."""
    settings = memory(RATE_LIMIT_MISSING_IDENTITY="refuse")
    if status == 503:
        settings = Settings(REDIS_URL="redis://127.0.0.1:1", RATE_LIMIT_ON_REDIS_ERROR="closed")
    by: list[Any] = [by_mcp_tool(["search"]), by_header("x-api-key") if status == 400 else client_ip]
    app = RateLimitMiddleware(Spy(), rules=[Rule("9/minute", partition_by=by)], dialect="mcp", settings=settings)
    messages: list[Message] = [{"type": "http.request", "body": orjson.dumps(CALL), "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"mcp-protocol-version", b"2026-07-28")]
    await app(http_scope(method="POST", path="/mcp", headers=headers), receive, send)

    assert (status, "call-1") == (sent[0]["status"], orjson.loads(sent[1]["body"])["id"])
