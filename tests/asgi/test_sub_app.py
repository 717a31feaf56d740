"""What every mountable sub-app does, whatever its pages say."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redis_asgi import ConfigurationError
from redis_asgi.asgi.sub_app import PageAnswer, SubApp, json_answer

pytestmark = pytest.mark.anyio


async def _root(connection: HTTPConnection) -> PageAnswer:
    return json_answer({"page": "root", "asked": connection.query_params.get("q")})


async def _deep(_connection: HTTPConnection) -> PageAnswer:
    return PageAnswer(b"deep", b"text/plain", 503, ((b"x-more", b"1"),), b"max-age=60")


PAGES = {"": _root, "/deep": _deep}


@asynccontextmanager
async def client_of(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client in front of *app*."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


def _bare(sub_app: SubApp) -> ASGIApp:
    return sub_app


def _in_starlette(sub_app: SubApp) -> ASGIApp:
    return Starlette(routes=[Mount("/outer/sub", sub_app)])


def _in_fastapi(sub_app: SubApp) -> ASGIApp:
    app = FastAPI()
    app.mount("/sub", sub_app)
    return app


def _twice_mounted(sub_app: SubApp) -> ASGIApp:
    inner = FastAPI()
    inner.mount("/sub", sub_app)
    outer = FastAPI()
    outer.mount("/inner", inner)

    async def behind_a_proxy(scope: Scope, receive: Receive, send: Send) -> None:
        # As uvicorn's --root-path does for a proxy that strips the prefix.
        await outer({**scope, "root_path": "/api", "path": f"/api{scope['path']}"}, receive, send)

    return behind_a_proxy


@pytest.mark.parametrize(
    ("wrap", "base"),
    [(_bare, ""), (_in_starlette, "/outer/sub"), (_in_fastapi, "/sub"), (_twice_mounted, "/inner/sub")],
    ids=["bare", "in Starlette", "in FastAPI", "in FastAPI in FastAPI behind a proxy"],
)
async def test_pages_answer_below_any_mount(wrap: Any, base: str) -> None:
    """Its pages are found below the mount,
    a final slash does not matter, and what is no page is 404.
    """
    async with client_of(wrap(SubApp(PAGES))) as client:
        root = await client.get(f"{base}/?q=1")
        deep = await client.get(f"{base}/deep")
        slash = await client.get(f"{base}/deep/")
        absent = [await client.get(base + path) for path in ("/nothing", "/deep/er", "/deep//", "/Deep")]

    assert (200, {"page": "root", "asked": "1"}) == (root.status_code, root.json())
    assert (503, b"deep", "1") == (deep.status_code, deep.content, deep.headers["x-more"])
    assert b"deep" == slash.content
    assert [404] * 4 == [response.status_code for response in absent]


async def test_bare_path_of_a_mount_redirects() -> None:
    """``/sub`` leads to ``/sub/``, which is why documented URLs have the slash."""
    async with client_of(_in_fastapi(SubApp(PAGES))) as client:
        response = await client.get("/sub")

    assert (307, "http://test/sub/") == (response.status_code, response.headers["location"])


@pytest.mark.parametrize("path", ["/", "/deep"])
async def test_head_is_get_without_the_body(path: str) -> None:
    """Status and fields are the same, ``Content-Length`` included."""
    async with client_of(SubApp(PAGES)) as client:
        got, head = await client.get(path), await client.head(path)

    assert b"" == head.content
    assert (got.status_code, got.headers) == (head.status_code, head.headers)
    assert str(len(got.content)) == head.headers["content-length"]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"])
async def test_other_methods_are_refused(method: str) -> None:
    """405 with ``Allow``, whatever the page."""
    async with client_of(SubApp(PAGES)) as client:
        response = await client.request(method, "/")

    assert (405, "GET, HEAD") == (response.status_code, response.headers["allow"])


async def test_nothing_is_stored_unless_a_page_says_so() -> None:
    """``no-store`` on pages and on every refusal; a page may say otherwise; nothing is sniffed."""
    async with client_of(SubApp(PAGES)) as client:
        usual = [await client.get("/"), await client.get("/nothing"), await client.post("/")]
        said = await client.get("/deep")

    assert ["no-store"] * 3 == [response.headers["cache-control"] for response in usual]
    assert "max-age=60" == said.headers["cache-control"]
    assert {"nosniff"} == {response.headers["x-content-type-options"] for response in [*usual, said]}
    assert ["application/json", "application/problem+json"] == [r.headers["content-type"] for r in usual[:2]]


def _token(connection: HTTPConnection) -> bool:
    return connection.headers.get("authorization") == "Bearer good"


async def _async_token(connection: HTTPConnection) -> bool:
    return _token(connection)


class _Callable:
    async def __call__(self, connection: HTTPConnection) -> bool:
        return _token(connection)


@pytest.mark.parametrize("authorize", [_token, _async_token, _Callable()], ids=["sync", "async", "an object"])
async def test_authorize_decides(authorize: Any) -> None:
    """403 without a word about the page, unless it says yes; open pages do not ask."""
    app = SubApp(PAGES, authorize=authorize, open_pages=frozenset(["/deep"]))
    async with client_of(app) as client:
        refused, head = await client.get("/"), await client.head("/")
        admitted = await client.get("/", headers={"authorization": "Bearer good"})
        unguarded = await client.get("/deep")

    assert (403, 403, 200, b"deep") == (refused.status_code, head.status_code, admitted.status_code, unguarded.content)
    assert {"type": "about:blank", "title": "Forbidden", "status": 403} == refused.json()
    assert b"" == head.content


async def test_what_authorize_raises_is_the_apps_to_answer() -> None:
    """An ``HTTPException`` becomes the app's answer; anything else is the app's 500, not swallowed."""

    def ask(connection: HTTPConnection) -> bool:
        if "authorization" not in connection.headers:
            raise HTTPException(401, headers={"WWW-Authenticate": "Basic"})
        raise LookupError("the user's own mistake")

    async with client_of(_in_fastapi(SubApp(PAGES, authorize=ask))) as client:
        asked = await client.get("/sub/")
        with pytest.raises(LookupError, match="own mistake"):
            await client.get("/sub/", headers={"authorization": "x"})

    assert (401, "Basic") == (asked.status_code, asked.headers["www-authenticate"])


def test_authorize_must_be_callable() -> None:
    """A token in its place is told at construction, and not shown."""
    with pytest.raises(ConfigurationError, match="authorize= is a text, which is not callable") as caught:
        SubApp(PAGES, authorize="token")  # type: ignore[arg-type]  # what is tested
    assert "token" not in str(caught.value)


async def _drive(app: ASGIApp, scope: Scope, *messages: Message) -> list[Message]:
    waiting, sent = list(messages), []

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


async def test_lifespan_is_answered() -> None:
    """A server that serves it by itself hears that it has started and ended, after it was closed."""
    closed = []

    class Closing(SubApp):
        async def aclose(self) -> None:
            closed.append(True)

    app = Closing(PAGES)
    sent = await _drive(app, {"type": "lifespan"}, {"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
    await _drive(SubApp(PAGES), {"type": "lifespan"}, {"type": "lifespan.shutdown"})

    assert ["lifespan.startup.complete", "lifespan.shutdown.complete"] == [message["type"] for message in sent]
    assert [True] == closed


async def test_websockets_are_closed() -> None:
    """A handshake is refused before it is accepted, also below a mount; unknown scopes get nothing."""
    scope: Scope = {"type": "websocket", "path": "/sub/", "root_path": "", "headers": [], "query_string": b""}
    sent = await _drive(_in_fastapi(SubApp(PAGES)), scope, {"type": "websocket.connect"})

    assert [{"type": "websocket.close", "code": 1008, "reason": ""}] == sent
    assert [] == await _drive(SubApp(PAGES), {"type": "unknown"})
