"""Usage of answers of any size, encoding, kind and ending."""

import gzip
import json
import tracemalloc
import zlib

import pytest

from redis_asgi.ratelimit.budgets.usage import Usage, UsageReader

from .usages import (
    ALL_OPENAI,
    CHAT,
    CHUNK,
    FORGED,
    JSON,
    LAST_CHUNK,
    MESSAGE_DELTA,
    MESSAGE_START,
    MESSAGE_STOP,
    NDJSON,
    RESPONSE,
    SSE,
    TEXT_DELTA,
    events,
    lines,
    read,
)


def test_usage_of_long_answers_is_that_of_their_end() -> None:
    """Above 1 MiB the last 64 KiB are read, of a document as of an event;
    what stands before them is not found.
    """
    vectors = {"data": [[0.123456789] * 1000] * 200}
    usage = {"prompt_tokens": 5, "total_tokens": 5}
    assert Usage(input=5, output=0) == read(json.dumps({**vectors, "usage": usage}).encode()).usage
    assert None is read(json.dumps({"usage": usage, **vectors}).encode()).usage
    assert Usage(input=5, output=0) == read(json.dumps({"embeddings": vectors, "prompt_eval_count": 5}).encode()).usage
    meta = {"billed_units": {"input_tokens": 5}}
    assert Usage(input=5, output=0) == read(json.dumps({"embeddings": vectors, "meta": meta}).encode()).usage
    assert None is read(json.dumps({"outer": {**vectors, "usage": usage}}).encode()).usage
    assert None is read(json.dumps({"outer": [{**vectors, "usage": usage}]}).encode()).usage
    assert None is read(json.dumps({**vectors, "usage": usage}).encode()[:-1], complete=False).usage
    chunk = events({"choices": vectors, "usage": {"prompt_tokens": 5, "completion_tokens": 7}})
    assert Usage(input=5, output=7) == read(chunk, SSE).usage
    line = lines({"context": [1] * 500_000, "done": True, "prompt_eval_count": 5, "eval_count": 7})
    assert Usage(input=5, output=7) == read(line, NDJSON).usage


@pytest.mark.parametrize("size", [300_000, 900_000, 3_000_000])
@pytest.mark.parametrize("type_first", [True, False])
def test_completed_response_of_any_size(size: int, type_first: bool) -> None:
    """It repeats the whole answer and the client's schemas; its usage is found, whichever is first."""
    schema = {"properties": {"usage": {"usage": FORGED}, **FORGED}}
    answer = {**RESPONSE, "output": [{"text": 'a "usage":{} b' * (size // 16)}], "tools": [schema] * 3}
    kind = {"type": "response.completed"}
    event = {**kind, "response": answer} if type_first else {"response": answer, **kind}
    body = events({"type": "response.created", "response": {**RESPONSE, "usage": None}}, event)
    for chunk in (100, 65_536, len(body)):
        reader = read((body[i : i + chunk] for i in range(0, len(body), chunk)), SSE)
        assert ALL_OPENAI == reader.usage
        assert (2, len(body)) == (reader.events, reader.bytes_sent)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        pytest.param([b'{"a":"' + b"x" * 99_994] * 300, JSON, id="document"),
        pytest.param([b"data: " + b"x" * 99_994] * 300, SSE, id="event"),
        pytest.param([b"x" * 30_000_000], SSE, id="chunk"),
        pytest.param([b"x" * 100_000] * 300, NDJSON, id="line"),
        pytest.param([b"\r" * 10_000] * 5, SSE, id="blank"),
        pytest.param([b"data:\r\r" * 10_000] * 3, SSE, id="events"),
        pytest.param([b" " * 100_000] * 300, None, id="blanks"),
    ],
)
def test_little_is_kept(body: list[bytes], content_type: bytes | None) -> None:
    """What never ends needs no more than a few MB, whatever it is."""
    read(b"data: x\n\n", content_type)
    tracemalloc.start()
    read(body, content_type, complete=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_bomb_is_not_unpacked() -> None:
    """Of 100 MB of blanks in 100 KB no more than a few MB are ever there, and most never."""
    bomb = gzip.compress(b'data: {"usage":' + b" " * 100_000_000)
    tracemalloc.start()
    reader = read(bomb, SSE, encoding=b"gzip")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16_000_000
    assert reader.usage is None
    assert read(gzip.compress(b" " * 100_000_000), encoding=b"gzip").bytes_sent < 16_000_000


@pytest.mark.parametrize("encoding", [b"br", b"zstd", b"gzip, br", b"x" * 100, b"\xff"])
def test_other_encodings_are_not_read(encoding: bytes) -> None:
    """And that is said; but not of what could have said nothing."""
    reader = read(b"\x00\xff" * 500, SSE, encoding=encoding, complete=False)
    assert encoding[:40].decode("latin-1") == reader.unread_encoding
    assert (None, 0, 1000, 250) == (reader.usage, reader.events, reader.bytes_sent, reader.output_of_cut())
    assert None is read(b"", b"text/html", encoding=encoding).unread_encoding
    assert None is read(b"", SSE, encoding=b"identity").unread_encoding


@pytest.mark.parametrize(
    "body", [b"", b"\x1f", b"\x1f\x8b\x08", b"nonsense", gzip.compress(b"data: {}\n\n", mtime=0)[:-9]]
)
@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
def test_broken_encodings(body: bytes, encoding: bytes) -> None:
    """They say nothing, and raise nothing."""
    assert None is read([*(bytes([byte]) for byte in body), body, body], SSE, encoding=encoding).usage


def test_members_of_gzip_are_one_answer() -> None:
    """A server may compress each chunk by itself; what stands behind the last one is none of it."""
    body = b"".join(gzip.compress(each) for each in (b"", b"data: {}\n\n", events(LAST_CHUNK), b"")) + b"\0\0"
    for size in (1, 7, 5000):
        chunks = [body[i : i + size] for i in range(0, len(body), size)]
        assert ALL_OPENAI == read(chunks, SSE, encoding=b"gzip").usage
    assert None is read(zlib.compress(b"data: {}\n\n") + zlib.compress(body), SSE, encoding=b"deflate").usage


def test_raw_deflate() -> None:
    """Some servers leave out zlib's header."""
    packer = zlib.compressobj(wbits=-15)
    body = packer.compress(events(LAST_CHUNK)) + packer.flush()
    assert ALL_OPENAI == read([bytes([byte]) for byte in body], SSE, encoding=b"deflate").usage


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (events(CHUNK, LAST_CHUNK), b"text/json"),
        (b": hello\n\n" + events(CHUNK, LAST_CHUNK), b"application/json"),
        (b"\xef\xbb\xbf" + events(CHUNK, LAST_CHUNK), SSE),
        (b"\n\n \n" + json.dumps(CHAT).encode(), SSE),
        (b"\n" * 500 + json.dumps(CHAT).encode(), JSON),
        (json.dumps(CHAT).encode(), SSE),
        (json.dumps(CHAT).encode(), b"Application/Vnd.api+JSON; charset=utf-8"),
        (lines(CHUNK, CHAT), b"application/jsonl"),
        (lines(CHUNK, CHAT), JSON),
        (b"\xef\xbb\xbf" + json.dumps(CHAT).encode(), JSON),
        (json.dumps({**CHAT, "logprob": float("-inf"), "half": "\ud83d"}).encode(), JSON),
    ],
)
def test_what_it_is_tells_itself_where_it_is_another(body: bytes, content_type: bytes) -> None:
    """Of the kinds that are read, the first bytes say which."""
    assert ALL_OPENAI == read(body, content_type).usage
    assert ALL_OPENAI == read([body[i : i + 1] for i in range(len(body))], content_type).usage


@pytest.mark.parametrize("content_type", [b"text/html", b"image/png", b"application/octet-stream", b"nonsense"])
def test_what_says_no_usage_is_not_read(content_type: bytes) -> None:
    """Only its bytes are counted."""
    reader = read(json.dumps(CHAT).encode(), content_type)
    assert (None, len(json.dumps(CHAT))) == (reader.usage, reader.bytes_sent)


@pytest.mark.parametrize(
    "text",
    [events(LAST_CHUNK) + b"Once upon a time", events(LAST_CHUNK), json.dumps(CHAT).encode(), lines(CHUNK, CHAT)],
)
@pytest.mark.parametrize("content_type", [None, b"", b"text/plain; charset=utf-8"])
def test_plain_text_is_a_models_to_write(text: bytes, content_type: bytes | None) -> None:
    """Whoever has a model begin with an event, or say nothing but a document, pays all the same.

    `StreamingResponse` sends no ``Content-Type`` unless it is told one.
    """
    reader = read(text, content_type)
    assert (None, len(text), not content_type) == (reader.usage, reader.bytes_sent, reader.is_undeclared)
    assert None is read([text[i : i + 1] for i in range(len(text))], content_type).usage


@pytest.mark.parametrize("second", [b"content-type", b"Content-Type", b"CONTENT-TYPE"])
@pytest.mark.parametrize("first", [b"content-type", b"Content-Type"])
def test_first_content_type_counts_however_it_is_spelled(first: bytes, second: bytes) -> None:
    """A framework may write the names of its own fields otherwise than the app does."""
    for types in ([b"text/plain", JSON], [JSON, b"text/plain"], [b"", JSON]):
        reader = UsageReader(200, list(zip((first, second), types, strict=True)))
        reader.feed(json.dumps(CHAT).encode())
        reader.close(complete=True)
        assert (None if types[0] == b"text/plain" else ALL_OPENAI) == reader.usage


def test_cut_stream_is_guessed_by_its_events() -> None:
    """Events of one token each are as many tokens;
    what is longer counts 4 bytes each, and comments nothing.
    """
    short = events({**CHUNK, "choices": [{"delta": {"content": "a"}}]})
    assert 300 == read(short * 300 + b": ping\n\n", SSE, complete=False).output_of_cut()
    long = events({**CHUNK, "choices": [{"delta": {"content": "a" * 401}}]})
    assert 101 * 100 / 2 == read((short + long) * 50, SSE, complete=False).output_of_cut() + 50


def test_cut_event_says_nothing_of_how_small_one_is() -> None:
    """Nor is one lost that only lacks its blank line."""
    body = events(CHUNK)
    cut = read(body + b"data: {", SSE, complete=False)
    assert (2, len(body)) == (cut.events, cut.smallest_event)
    by_cr = read(body.replace(b"\n", b"\r"), SSE, complete=False)
    assert (1, len(body)) == (by_cr.events, by_cr.smallest_event)
    assert ALL_OPENAI == read(events(LAST_CHUNK).rstrip(), SSE, complete=False).usage


def test_cut_stream_knows_its_output_only_from_its_last_event() -> None:
    """Cumulative counts in each frame are exact;
    one before other events is what there was until then.
    """
    frames = [{**CHUNK, "usage": {"prompt_tokens": 5, "completion_tokens": n}} for n in range(5)]
    assert read(events(*frames), SSE, complete=False).output_is_known
    assert not read(events(*frames, CHUNK), SSE, complete=False).output_is_known
    assert read(events(*frames, CHUNK), SSE).output_is_known
    assert read(events(*frames) + b"data: [DONE]\n\n: ping\n\n", SSE, complete=False).output_is_known
    started = read(events(MESSAGE_START, TEXT_DELTA), SSE, complete=False)
    assert (Usage(30, 60, 10), False) == (started.usage, started.output_is_known)
    assert read(events(MESSAGE_START, MESSAGE_DELTA, MESSAGE_STOP), SSE, complete=False).output_is_known


def test_closing_twice_and_empty_answers() -> None:
    """A second end changes nothing; without a body there is nothing to say."""
    reader = read(b"")
    reader.close(False)
    assert (None, True, 0, 0, 0, 0) == (
        reader.usage,
        reader.complete,
        reader.events,
        reader.bytes_sent,
        reader.smallest_event,
        reader.output_of_cut(),
    )
    unclosed = UsageReader(200, [])
    unclosed.feed(b"da")
    assert (0, 2, 0, False) == (
        unclosed.events,
        unclosed.bytes_sent,
        unclosed.smallest_event,
        unclosed.output_is_known,
    )
