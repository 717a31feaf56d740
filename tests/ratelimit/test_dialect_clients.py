"""The clients that the dialects are for:
they raise what they raise of the services that they were made for.
"""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from redis_asgi import RateLimitMiddleware, Rule, by_mcp_tool, rate_limit, tokens

from ..embeddings.clients import needed
from ..embeddings.test_socket import served
from .harness import memory

pytestmark = [
    pytest.mark.clients,
    # What other people's packages warn about is not ours to fix.
    pytest.mark.filterwarnings("ignore"),
]
ASKED: Any = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


async def chat(request: Request) -> JSONResponse | StreamingResponse:
    """A model that says one word, in OpenAI's format."""
    about = {"id": "1", "model": "m", "created": 0}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    if (await request.json()).get("stream"):
        chunk = '{"id":"1","object":"chat.completion.chunk","model":"m","created":0,"choices":[]}'
        return StreamingResponse(iter([f"data: {chunk}\n\n", "data: [DONE]\n\n"]), media_type="text/event-stream")
    choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
    return JSONResponse({**about, "object": "chat.completion", "choices": [choice], "usage": usage})


async def messages(request: Request) -> JSONResponse:
    """The same in Anthropic's."""
    del request
    about = {"id": "1", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn"}
    usage = {"input_tokens": 1, "output_tokens": 1}
    return JSONResponse({**about, "content": [{"type": "text", "text": "hi"}], "usage": usage})


class Counted:
    """An app, and how often it was asked."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += scope["type"] == "http"
        await self.app(scope, receive, send)


def served_with(limits: str, **rule: Any) -> Iterator[tuple[str, Counted]]:
    """Both formats behind a rule, and the requests that came in."""
    limited = rate_limit("1/day", name="requests")
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/messages", messages, methods=["POST"]),
        Route("/route/chat/completions", limited(chat), methods=["POST"]),
    ]
    app = RateLimitMiddleware(
        Starlette(routes=routes),
        rules=[Rule(limits, paths="/v1/*", **rule)],
        dialect={"/v1/messages": "anthropic", "/*": "openai"},
        settings=memory(REDIS_KEY_PREFIX=f"c{time.monotonic_ns()}:"),
    )
    counted = Counted(app)
    with served(counted) as url:
        yield url, counted


@pytest.fixture
def a_day() -> Iterator[tuple[str, Counted]]:
    """One request a day."""
    yield from served_with("1/day", name="requests")


@pytest.fixture
def a_second() -> Iterator[tuple[str, Counted]]:
    """One request a second."""
    yield from served_with("1/second", name="requests")


@pytest.fixture
def never() -> Iterator[tuple[str, Counted]]:
    """A cost that never fits."""
    yield from served_with("10/minute", name="tokens", cost=lambda conn: 11)


@pytest.fixture
def budget() -> Iterator[tuple[str, Counted]]:
    """Tokens: the first request's estimate is most of them."""
    yield from served_with("12/day", name="tokens", cost=tokens())


def raised_by(call: Any, error: type[Exception]) -> Any:
    """What *call* raises, at once: a client that sleeps until tomorrow fails."""
    start = time.monotonic()
    with pytest.raises(error) as caught:
        call()
    assert time.monotonic() - start < 30
    return caught.value


def test_openai_raises_at_once(a_day: tuple[str, Counted]) -> None:
    """Message, type and code are there, and the client neither sleeps for a day nor asks again."""
    openai = needed("openai")
    url, counted = a_day
    with openai.OpenAI(api_key="k", base_url=f"{url}/v1") as client:
        raw = client.chat.completions.with_raw_response.create(**ASKED)
        error = raised_by(lambda: client.chat.completions.create(**ASKED), openai.RateLimitError)

    assert ("1", "0") == tuple(raw.headers[f"x-ratelimit-{name}-requests"] for name in ("limit", "remaining"))
    assert ("requests", "rate_limit_exceeded") == (error.type, error.code)
    assert error.body["message"].startswith("Rate limit exceeded: 1 per 86400 s. Retry in ")
    assert error.body["message"] in str(error)
    assert 2 == counted.calls


@pytest.mark.anyio
async def test_openai_raises_before_a_stream(a_day: tuple[str, Counted]) -> None:
    """The async client too, where it asks for a stream."""
    openai = needed("openai")
    url, counted = a_day
    async with openai.AsyncOpenAI(api_key="k", base_url=f"{url}/v1") as client:
        async for _ in await client.chat.completions.create(**ASKED, stream=True):
            pass
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(**ASKED, stream=True)

    assert "rate_limit_exceeded" == caught.value.code
    assert 2 == counted.calls


def test_openai_waits_where_it_helps(a_second: tuple[str, Counted]) -> None:
    """A wait of a second is no error: the client comes again when it was told to."""
    openai = needed("openai")
    url, _ = a_second
    with openai.OpenAI(api_key="k", base_url=f"{url}/v1") as client:
        said = [client.chat.completions.create(**ASKED).choices[0].message.content for _ in range(2)]

    assert ["hi", "hi"] == said


def test_openai_asks_once_for_what_never_fits(never: tuple[str, Counted]) -> None:
    """Not three times."""
    openai = needed("openai")
    url, counted = never
    with openai.OpenAI(api_key="k", base_url=f"{url}/v1") as client:
        error = raised_by(lambda: client.chat.completions.create(**ASKED), openai.RateLimitError)

    assert "tokens" == error.type
    assert 1 == counted.calls


def test_openai_is_told_of_its_tokens(budget: tuple[str, Counted]) -> None:
    """The budget in the fields, and its rule in the error."""
    openai = needed("openai")
    url, _ = budget
    with openai.OpenAI(api_key="k", base_url=f"{url}/v1") as client:
        raw = client.chat.completions.with_raw_response.create(**ASKED)

        def until_it_is_used() -> None:
            for _ in range(12):
                client.chat.completions.create(**ASKED)

        error = raised_by(until_it_is_used, openai.RateLimitError)

    assert "12" == raw.headers["x-ratelimit-limit-tokens"]
    assert "tokens" == error.type


def test_openai_of_a_route(a_day: tuple[str, Counted]) -> None:
    """A limit of a route says it as the middleware does."""
    openai = needed("openai")
    url, counted = a_day
    with openai.OpenAI(api_key="k", base_url=f"{url}/route") as client:
        client.chat.completions.create(**ASKED)
        error = raised_by(lambda: client.chat.completions.create(**ASKED), openai.RateLimitError)

    assert ("requests", "rate_limit_exceeded") == (error.type, error.code)
    assert 2 == counted.calls


def test_anthropic_raises_at_once(a_day: tuple[str, Counted]) -> None:
    """Its type and message are there; without `x-should-retry` it would sleep until tomorrow."""
    anthropic = needed("anthropic")
    url, counted = a_day
    with anthropic.Anthropic(api_key="k", base_url=url) as client:
        raw = client.messages.with_raw_response.create(**ASKED)
        error = raised_by(lambda: client.messages.create(**ASKED), anthropic.RateLimitError)

    assert "0" == raw.headers["anthropic-ratelimit-requests-remaining"]
    assert raw.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
    assert ("error", "rate_limit_error") == (error.body["type"], error.body["error"]["type"])
    assert "Limit: requests." in str(error)
    assert 2 == counted.calls


def test_anthropic_asks_once_for_what_never_fits(never: tuple[str, Counted]) -> None:
    """Not three times."""
    anthropic = needed("anthropic")
    url, counted = never
    with anthropic.Anthropic(api_key="k", base_url=url) as client:
        raised_by(lambda: client.messages.create(**ASKED), anthropic.RateLimitError)

    assert 1 == counted.calls


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_session_of_mcp_survives_a_refusal(mode: Any) -> None:
    """The call fails with what the limit says,
    of today's protocol and of the older one, and the next call works.
    """
    fastmcp = needed("fastmcp")
    server = fastmcp.FastMCP("tools")

    @server.tool  # type: ignore[untyped-decorator]  # not installed for a check of types
    def search(query: str) -> str:
        """Find what is asked for."""
        return f"nothing about {query}"

    @server.tool  # type: ignore[untyped-decorator]
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    app = RateLimitMiddleware(
        server.http_app(),
        rules=[Rule("1/day", name="searches", paths="/mcp", partition_by=by_mcp_tool("search", other=None))],
        dialect={"/mcp": "mcp"},
        settings=memory(REDIS_KEY_PREFIX=f"c{time.monotonic_ns()}:"),
    )
    with served(app, lifespan="on") as url:
        async with fastmcp.Client(f"{url}/mcp", mode=mode) as client:
            found = await client.call_tool("search", {"query": "limits"})
            with pytest.raises(Exception, match=r"Rate limit exceeded: 1 per 86400 s\..* Limit: searches\."):
                await client.call_tool("search", {"query": "limits"})
            sum_of_two = await client.call_tool("add", {"a": 1, "b": 2})

    assert ("nothing about limits", 3) == (found.data, sum_of_two.data)
