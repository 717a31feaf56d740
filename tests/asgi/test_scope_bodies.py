"""Bodies that users' callables read: replayed byte for byte, or unreadable."""

import asyncio
import json
import tracemalloc
from typing import Any, cast

import pytest
from starlette.types import Message, Receive

from redis_asgi.asgi.scope import (
    BufferedRequest,
    UnreadableBody,
)

from .scopes import http

pytestmark = pytest.mark.anyio


def chunks(*parts: bytes, end: Message | None = None) -> tuple[Receive, list[Message]]:
    """A ``receive`` that gives *parts*, then *end* or a disconnect, and the list of what is left."""
    left: list[Message] = [
        {"type": "http.request", "body": part, "more_body": i < len(parts) - 1} for i, part in enumerate(parts)
    ]
    left.append(end or {"type": "http.disconnect"})

    async def receive() -> Message:
        return left.pop(0) if len(left) > 1 else left[0]

    return receive, left


async def everything(receive: Receive) -> tuple[bytes, str]:
    """What an app reads: the body, and the type of the message after it."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return body, message["type"]
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body, (await receive())["type"]


POST = http(method="POST")


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([b""], id="empty"),
        pytest.param([b'{"a": 1}'], id="at once"),
        pytest.param([b'{"a"', b": ", b"1}"], id="in pieces"),
        pytest.param([bytes([c]) for c in b'{"a": "\xc3\xbc"}'], id="byte by byte"),
        pytest.param([b"{}", b"", b""], id="empty pieces"),
    ],
)
async def test_body_is_read_and_replayed_byte_for_byte(parts: list[bytes]) -> None:
    """What was read ahead reaches the app as it came, followed by what was still to come."""
    receive, _ = chunks(*parts)
    request = BufferedRequest(POST, receive, cap=100)
    whole = b"".join(parts)

    assert whole == await request.body()
    assert whole == await request.body()
    if whole:
        assert json.loads(whole) == await request.json()
    assert (whole, "http.disconnect") == await everything(request.replay())


async def test_nothing_is_read_unless_asked() -> None:
    """A request that nobody reads hands the app its own ``receive``."""
    receive, left = chunks(b"body")
    request = BufferedRequest(POST, receive, cap=100)

    assert request.replay() is receive
    assert len(left) == 2


@pytest.mark.parametrize(
    ("parts", "cap", "fits"),
    [
        pytest.param([b"12345"], 5, True, id="exactly the cap"),
        pytest.param([b"123456"], 5, False, id="one byte over"),
        pytest.param([b"123", b"456", b"789"], 5, False, id="over with the second piece"),
        pytest.param([b"1"], 0, False, id="cap of nothing"),
        pytest.param([b""], 0, True, id="nothing under a cap of nothing"),
    ],
)
async def test_body_over_the_cap_is_unreadable_and_whole_for_the_app(parts: list[bytes], cap: int, fits: bool) -> None:
    """Reading stops at the cap; the app still gets every byte."""
    receive, left = chunks(*parts)
    request = BufferedRequest(POST, receive, cap=cap)
    if fits:
        assert b"".join(parts) == await request.body()
    else:
        with pytest.raises(UnreadableBody):
            await request.body()
        # No more was taken from the server than was needed to know.
        assert len(left) > len(parts) - 2

    assert (b"".join(parts), "http.disconnect") == await everything(request.replay())


async def test_partly_read_stream_is_replayed() -> None:
    """A callable that stops reading in the middle leaves the rest for the app, and its own part
    too.
    """
    receive, _ = chunks(b"one", b"two", b"three")
    request = BufferedRequest(POST, receive, cap=100)
    async for chunk in request.stream():
        assert chunk == b"one"
        break

    assert (b"onetwothree", "http.disconnect") == await everything(request.replay())


async def test_disconnect_while_reading_is_unreadable_and_seen_by_the_app() -> None:
    """A client that leaves in mid-body gives no body, and the app learns that it left."""
    left: list[Message] = [{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return left.pop(0)

    request = BufferedRequest(POST, receive, cap=100)
    with pytest.raises(UnreadableBody):
        await request.body()
    replayed = request.replay()

    assert await replayed() == {"type": "http.request", "body": b"half", "more_body": True}
    assert await replayed() == {"type": "http.disconnect"}


async def test_disconnect_before_the_body_is_replayed_alone() -> None:
    """A client that leaves at once: the app sees the disconnect and no invented body."""
    receive, _ = chunks(end={"type": "http.disconnect"})
    request = BufferedRequest(POST, receive, cap=100)
    with pytest.raises(UnreadableBody):
        await request.body()

    assert await request.replay()() == {"type": "http.disconnect"}


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut"),
        pytest.param(b"\xff\xfe\x00", id="not text"),
        pytest.param(b"[" * 200_000, id="nested too deep"),
        pytest.param(b'{"a":' * 100_000, id="objects nested too deep"),
        pytest.param(b"1" * 10_000, id="number too long"),
    ],
)
async def test_what_is_not_json_is_unreadable(body: bytes) -> None:
    """No body makes the reader raise anything else, and the app still gets it."""
    receive, _ = chunks(body)
    request = BufferedRequest(POST, receive, cap=2**20)
    with pytest.raises(UnreadableBody):
        await request.json()

    assert (body, "http.disconnect") == await everything(request.replay())


FORM = [("content-type", "application/x-www-form-urlencoded")]


MULTIPART = [("content-type", "multipart/form-data; boundary=x")]


PART = b'--x\r\ncontent-disposition: form-data; name="f"; filename="f"\r\n\r\n%s\r\n--x--\r\n'


@pytest.mark.parametrize(
    ("headers", "body", "names"),
    [
        pytest.param(FORM, b"a=1&b=2", ["a", "b"], id="urlencoded"),
        pytest.param(FORM, b"", [], id="empty"),
        pytest.param(MULTIPART, PART % b"12345", ["f"], id="multipart"),
    ],
)
async def test_form_is_read_and_replayed(headers: Any, body: bytes, names: list[str]) -> None:
    """A form is parsed from the bounded body, and the app gets it as it came."""
    receive, _ = chunks(body[:3], body[3:])
    request = BufferedRequest(http(method="POST", headers=headers), receive, cap=1000)

    async with request.form() as form:
        assert names == sorted(form)
    assert (body, "http.disconnect") == await everything(request.replay())
    assert not request.unreadable


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        pytest.param(MULTIPART, b"--x\r\nbad\r\n", id="broken header"),
        pytest.param(MULTIPART, b"hello", id="no part"),
        pytest.param(MULTIPART, b"--x\r\n\r\n\r\n--x--\r\n", id="part without a name"),
        pytest.param([("content-type", "multipart/form-data")], PART % b"1", id="no boundary"),
        pytest.param([("content-type", 'multipart/form-data; boundary="')], PART % b"1", id="broken boundary"),
        pytest.param(MULTIPART, PART % (b"1" * 1000), id="over the cap"),
        pytest.param(FORM, b"a&" * 1001, id="too many fields"),
        pytest.param(FORM, b"a=" + b"1" * 1000, id="urlencoded over the cap"),
        pytest.param([("content-type", "text/plain")], b"a=1", id="no form"),
        pytest.param([], b"a=1", id="no type"),
        pytest.param([("content-type", "\xff\xfe")], b"a=1", id="no type that anybody knows"),
    ],
)
async def test_what_is_no_form_is_unreadable(headers: Any, body: bytes) -> None:
    """No body and no type of it makes the reader raise anything else, and the app still gets it."""
    receive, _ = chunks(body)
    cap = 2**20 if body.count(b"a&") else 1000
    request = BufferedRequest(http(method="POST", headers=headers), receive, cap=cap)
    with pytest.raises(UnreadableBody):
        await request.form()

    assert request.unreadable
    assert (body, "http.disconnect") == await everything(request.replay())


@pytest.mark.parametrize("read", ["body", "json", "form", "stream"])
async def test_client_that_leaves_is_never_an_error_of_the_app(read: str) -> None:
    """However a callable reads it, half a body is unreadable, and it is known that its client left."""
    receive, _ = chunks(end={"type": "http.disconnect"})
    request = BufferedRequest(http(method="POST", headers=FORM), receive, cap=100)

    async def reading() -> None:
        if read == "stream":
            [chunk async for chunk in request.stream()]
        else:
            await getattr(request, read)()

    with pytest.raises(UnreadableBody):
        await reading()

    assert (True, True) == (request.unreadable, request.is_abandoned)


async def test_websocket_handshake_has_an_empty_body() -> None:
    """It is a GET without a body to whoever reads it, and its own messages are left to the app."""

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    request = BufferedRequest({**http(), "type": "websocket", "query_string": b""}, receive, cap=100)

    assert ("GET", b"", "/") == (request.method, await request.body(), request.url.path)
    with pytest.raises(UnreadableBody):
        await request.json()
    assert request.replay() is receive


async def test_error_of_the_server_passes_through() -> None:
    """What ``receive`` raises (another middleware's body limit,
    a cancelled task) is not ours to hide.
    """

    class TooLarge(Exception):
        """Raised by a body limit of somebody else."""

    async def receive() -> Message:
        raise TooLarge

    with pytest.raises(TooLarge):
        await BufferedRequest(POST, receive, cap=100).body()
    with pytest.raises(TooLarge):
        await BufferedRequest(http(method="POST", headers=FORM), receive, cap=100).form()

    async def cancelled() -> Message:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await BufferedRequest(POST, cancelled, cap=100).body()


async def test_message_without_a_body_is_an_empty_one() -> None:
    """``body`` and ``more_body`` are optional in ASGI."""
    receive = cast("Any", chunks(end={"type": "http.disconnect"})[0])
    messages: list[Message] = [{"type": "http.request"}]

    async def bare() -> Message:
        return messages.pop() if messages else await receive()

    request = BufferedRequest(POST, bare, cap=100)

    assert await request.body() == b""
    assert (b"", "http.disconnect") == await everything(request.replay())


async def test_body_in_single_bytes_takes_no_more_than_its_size() -> None:
    """A body of tiny chunks is kept as its bytes, not as a list of messages a hundred times as big."""
    size = 200_000
    left = size

    async def receive() -> Message:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": b"x", "more_body": left > 0}

    tracemalloc.start()
    try:
        request = BufferedRequest({"type": "http", "method": "POST", "headers": []}, receive, cap=size)
        body = await request.body()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert size == len(body)
    assert peak < 5 * size
