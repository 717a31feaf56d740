"""The examples for language models and tools, driven by the clients that people have."""

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from ..embeddings.clients import needed
from ..test_examples import Example, serving

pytestmark = [
    pytest.mark.clients,
    pytest.mark.anyio,
    # What other people's packages warn about is not ours to fix.
    pytest.mark.filterwarnings("ignore"),
]
MESSAGES: Any = [{"role": "user", "content": "one two three four"}]


@pytest.fixture
def chat() -> Iterator[Example]:
    """The chat service, whose model speaks at once."""
    with serving("chat_api", SECONDS_PER_WORD="0") as example:
        yield example


@pytest.fixture
def slow_chat() -> Iterator[Example]:
    """The same with a model that takes its time."""
    with serving("chat_api", SECONDS_PER_WORD="0.5") as example:
        yield example


def openai_client(example: Example, key: str = "ada", *, is_async: bool = False) -> Any:
    """OpenAI's client of *example*, which tries nothing twice."""
    openai = needed("openai")
    kind = openai.AsyncOpenAI if is_async else openai.OpenAI
    return kind(base_url=f"http://127.0.0.1:{example.port}/v1", api_key=key, max_retries=0)


def told(stream: Any) -> str:
    """The text of a streamed answer."""
    return "".join(part.choices[0].delta.content or "" for part in stream if part.choices).strip()


def repeat(create: Any, asked: Any) -> None:
    """One request more than a minute has."""
    for _ in range(21):
        create(**asked)


async def test_tokens_are_counted_as_the_model_reports_them(chat: Example) -> None:
    """Streamed or not, sync or async: what is left next is what the answers' own usage leaves."""
    sync, asynchronous = openai_client(chat), openai_client(chat, is_async=True)
    asked: Any = {"model": "tiny-1", "messages": MESSAGES, "max_tokens": 100}
    assert 8 == sync.chat.completions.create(**asked).usage.total_tokens
    said = [
        part.choices[0].delta.content for part in sync.chat.completions.create(stream=True, **asked) if part.choices
    ]
    assert "one two three four" == "".join(filter(None, said)).strip()
    stream = await asynchronous.chat.completions.create(stream=True, **asked)
    parts = [part async for part in stream]
    assert 8 == parts[-1].usage.total_tokens
    raw = sync.chat.completions.with_raw_response.create(**asked)
    # Three answers of eight tokens, and what this one was estimated at.
    left, estimated = int(raw.headers["x-ratelimit-remaining-tokens"]), 4000 - 3 * 8
    assert estimated - 150 <= left < estimated
    assert "16" == raw.headers["x-ratelimit-remaining-requests"]
    await asynchronous.close()


def test_a_refusal_is_what_the_client_raises(chat: Example) -> None:
    """OpenAI's and Anthropic's say which limit it was, and when to come again."""
    openai, anthropic = needed("openai"), needed("anthropic")
    asked: Any = {"model": "tiny-1", "messages": MESSAGES, "max_tokens": 1}
    theirs = openai_client(chat, "bob")
    with pytest.raises(openai.RateLimitError, match="20 per 60 s") as refused:
        repeat(theirs.chat.completions.create, asked)
    assert ("requests", "rate_limit_exceeded") == (refused.value.type, refused.value.code)
    assert 0 < int(refused.value.response.headers["retry-after-ms"]) <= 60_000
    base = f"http://127.0.0.1:{chat.port}"
    other = anthropic.Anthropic(base_url=base, auth_token="eve", api_key=None, max_retries=0)
    with pytest.raises(anthropic.RateLimitError, match="20 per 60 s") as refused:
        repeat(other.messages.create, asked)
    assert "rate_limit_error" == refused.value.body["error"]["type"]
    # Another model has a counter of its own, and names that were made up share one.
    assert theirs.chat.completions.create(**asked | {"model": "grand-1"}).usage
    assert theirs.chat.completions.create(**asked | {"model": "invented-1"}).usage
    assert 18 == left(theirs, "invented-2")


def left(client: Any, model: str) -> int:
    """Requests that the client has left for *model*."""
    raw = client.chat.completions.with_raw_response.create(model=model, messages=MESSAGES, max_tokens=1)
    return int(raw.headers["x-ratelimit-remaining-requests"])


def test_two_streams_at_a_time(slow_chat: Example) -> None:
    """The third waits for one of the first two to end, by itself or because its client leaves."""
    openai = needed("openai")
    client = openai_client(slow_chat)
    asked: Any = {"model": "tiny-1", "messages": MESSAGES, "stream": True}
    first, second = (client.chat.completions.create(**asked) for _ in range(2))
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(**asked)
    assert ("streams", "1") == (refused.value.type, refused.value.response.headers["retry-after"])
    first.close()
    again = _patiently(lambda: client.chat.completions.create(**asked), openai.RateLimitError)
    assert (
        "one two three four" == "".join(part.choices[0].delta.content or "" for part in second if part.choices).strip()
    )
    again.close()


def _patiently(ask: Any, refused: type[Exception]) -> Any:
    """What *ask* returns once it is not *refused* any more."""
    for _ in range(200):
        try:
            return ask()
        except refused:
            threading.Event().wait(0.05)
    raise AssertionError("still refused")


async def test_a_tool_has_its_limit() -> None:
    """FastMCP's client gets five searches, is told when to search again,
    and may use the other tool meanwhile.
    """
    fastmcp = needed("fastmcp")
    with serving("mcp_tools") as example:
        async with fastmcp.Client(f"http://127.0.0.1:{example.port}/mcp") as client:
            for _ in range(5):
                assert ["search", "loan"] == [tool.name for tool in await client.list_tools()]
                assert ["All about x"] == (await client.call_tool("search", {"query": "x"})).data
            with pytest.raises(Exception, match=r"5 per 60 s. Retry in \d+ s"):
                await client.call_tool("search", {"query": "x"})
            assert "x is yours for two weeks." == (await client.call_tool("loan", {"title": "x"})).data


def test_an_older_session_outlives_a_refusal() -> None:
    """Clients of revisions before 2026-07-28 end their session at a 429:
    they get the error with status 200.
    """
    needed("fastmcp")
    call = {
        "jsonrpc": "2.0",
        "id": 7,
        "method": "tools/call",
        "params": {"name": "search", "arguments": {"query": "x"}},
    }
    fields = {"accept": "application/json, text/event-stream", "mcp-protocol-version": "2025-06-18"}
    with serving("mcp_tools") as example, httpx.Client(base_url=f"http://127.0.0.1:{example.port}") as client:
        hello = {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": {"name": "old", "version": "1"},
        }
        began = client.post("/mcp", headers=fields, json=call | {"id": 1, "method": "initialize", "params": hello})
        fields["mcp-session-id"] = began.headers["mcp-session-id"]
        answers = [client.post("/mcp", headers=fields, json=call) for _ in range(6)]

    assert [200] * 6 == [answer.status_code for answer in answers]
    error = answers[-1].json()
    assert (7, -32000) == (error["id"], error["error"]["code"])
    assert 0 < error["error"]["data"]["retry_after"] <= 60
