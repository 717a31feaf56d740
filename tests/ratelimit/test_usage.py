"""What a model's answer says it used, read while it passes."""

import gzip
import json
import random
import tracemalloc
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from redis_asgi.ratelimit.budgets.usage import Usage, UsageReader

SSE = b"text/event-stream; charset=utf-8"
NDJSON = b"application/x-ndjson"
JSON = b"application/json"


def read(
    body: bytes | Iterable[bytes],
    content_type: bytes | None = JSON,
    *,
    encoding: bytes | None = None,
    complete: bool = True,
    status: int = 200,
) -> UsageReader:
    """A reader that has seen all of *body*."""
    headers = [(b"server", b"x")]
    headers += [(b"content-type", content_type)] if content_type is not None else []
    headers += [(b"content-encoding", encoding)] if encoding is not None else []
    reader = UsageReader(status, headers)
    for chunk in [body] if isinstance(body, bytes) else body:
        reader.feed(chunk)
    reader.close(complete)
    return reader


def events(*documents: Any, named: bool = False) -> bytes:
    """Server-sent events as servers send them."""
    return b"".join(
        (f"event: {each['type']}\n" if named else "").encode() + b"data: " + json.dumps(each).encode() + b"\n\n"
        for each in documents
    )


def lines(*documents: Any) -> bytes:
    """NDJSON."""
    return b"".join(json.dumps(each).encode() + b"\n" for each in documents)


CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "gpt-5-mini",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
    "usage": {
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "total_tokens": 150,
        "prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 10, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 20, "audio_tokens": 0},
    },
}
CHUNK = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}],
    "usage": None,
}
LAST_CHUNK = {**CHUNK, "choices": [], "usage": CHAT["usage"]}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "status": "completed",
    "output": [{"type": "message", "content": [{"type": "output_text", "text": "Hi"}]}],
    "tools": [{"type": "function", "parameters": {"properties": {"usage": {"type": "object"}}}}],
    "usage": {
        "input_tokens": 100,
        "input_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 10},
        "output_tokens": 50,
        "output_tokens_details": {"reasoning_tokens": 20},
        "total_tokens": 150,
    },
    "metadata": {"usage": "1"},
}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"usage": {"input_tokens": 0}}}],
    "usage": {
        "input_tokens": 30,
        "cache_creation_input_tokens": 10,
        "cache_read_input_tokens": 60,
        "output_tokens": 50,
    },
}
MESSAGE_START = {
    "type": "message_start",
    "message": {**MESSAGE, "content": [], "usage": {**MESSAGE["usage"], "output_tokens": 1}},  # type: ignore[dict-item]  # of this shape
}
MESSAGE_DELTA = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 50}}
MESSAGE_STOP = {"type": "message_stop"}
TEXT_DELTA = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}}
COHERE = {
    "id": "c",
    "finish_reason": "COMPLETE",
    "message": {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]},
    "usage": {
        "billed_units": {"input_tokens": 1.0, "output_tokens": 2.0},
        "tokens": {"input_tokens": 100.0, "output_tokens": 50.0},
        "cached_tokens": 60.0,
    },
}
COHERE_END = {"type": "message-end", "delta": {"finish_reason": "COMPLETE", "usage": COHERE["usage"]}}
OLLAMA = {
    "model": "m",
    "message": {"role": "assistant", "content": ""},
    "done": True,
    "prompt_eval_count": 100,
    "eval_count": 50,
}
OLLAMA_LINE = {"model": "m", "message": {"role": "assistant", "content": "Hi"}, "done": False}
ALL_OPENAI = Usage(30, 60, 10, 30, 20)


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        pytest.param(json.dumps(CHAT).encode(), JSON, ALL_OPENAI, id="chat"),
        pytest.param(events(CHUNK, LAST_CHUNK) + b"data: [DONE]\n\n", SSE, ALL_OPENAI, id="chat streamed"),
        pytest.param(
            json.dumps({"object": "text_completion", "usage": {"prompt_tokens": 5, "completion_tokens": 7}}).encode(),
            JSON,
            Usage(5, None, None, 7, None),
            id="completion",
        ),
        pytest.param(json.dumps(RESPONSE).encode(), JSON, ALL_OPENAI, id="response"),
        *(
            pytest.param(
                events(
                    {"type": "response.created", "response": {**RESPONSE, "usage": None}},
                    {"type": "response.output_text.delta", "delta": "Hi"},
                    {"type": f"response.{end}", "response": RESPONSE},
                    named=True,
                ),
                SSE,
                ALL_OPENAI,
                id=f"response {end}",
            )
            for end in ("completed", "incomplete", "failed")
        ),
        pytest.param(
            json.dumps(
                {"object": "list", "data": [{"embedding": [0.5]}], "usage": {"prompt_tokens": 5, "total_tokens": 5}}
            ).encode(),
            JSON,
            Usage(input=5, output=0),
            id="embeddings",
        ),
        pytest.param(json.dumps(MESSAGE).encode(), JSON, Usage(30, 60, 10, 50), id="message"),
        pytest.param(
            events(MESSAGE_START, TEXT_DELTA, MESSAGE_DELTA, MESSAGE_STOP, named=True),
            SSE,
            Usage(30, 60, 10, 50),
            id="message streamed",
        ),
        pytest.param(json.dumps(COHERE).encode(), JSON, Usage(40, 60, None, 50), id="cohere"),
        pytest.param(events({"type": "content-delta"}, COHERE_END), SSE, Usage(40, 60, None, 50), id="cohere streamed"),
        pytest.param(
            json.dumps({"embeddings": {"float": []}, "meta": {"billed_units": {"input_tokens": 5}}}).encode(),
            JSON,
            Usage(input=5, output=0),
            id="cohere embeddings",
        ),
        pytest.param(json.dumps(OLLAMA).encode(), JSON, Usage(input=100, output=50), id="ollama"),
        pytest.param(lines(OLLAMA_LINE, OLLAMA), NDJSON, Usage(input=100, output=50), id="ollama streamed"),
        pytest.param(
            lines(OLLAMA_LINE, {"done": True, "eval_count": 50}), NDJSON, Usage(output=50), id="ollama without a prompt"
        ),
        pytest.param(
            json.dumps({"model": "m", "embeddings": [[0.5]], "prompt_eval_count": 5}).encode(),
            JSON,
            Usage(input=5, output=0),
            id="ollama embeddings",
        ),
    ],
)
def test_each_format_is_read(body: bytes, content_type: bytes, expected: Usage) -> None:
    """In parts that do not overlap, wherever chunks begin, compressed or not."""
    whole = read(body, content_type)
    assert expected == whole.usage
    assert whole.output_is_known
    for size in (1, 2, 3, 7):
        chunks = [body[i : i + size] for i in range(0, len(body), size)]
        chunked = read(chunks, content_type)
        assert (whole.usage, whole.events, whole.bytes_sent, whole.smallest_event) == (
            chunked.usage,
            chunked.events,
            chunked.bytes_sent,
            chunked.smallest_event,
        )
    assert expected == read(gzip.compress(body), content_type, encoding=b"gzip").usage
    assert expected == read(zlib.compress(body), content_type, encoding=b"Deflate").usage


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, 0), (5, 5), (5.0, 5), (2**53, 2**53), (2**53 + 1, None), (-1, None), (-0.0, 0), (5.5, None), (10**30, None),
        (1e300, None), (float("inf"), None), (float("nan"), None), (True, None), ("5", None), ([5], None),
        ({"n": 5}, None), (None, None),
    ],
)  # fmt: skip
def test_numbers(number: object, expected: int | None) -> None:
    """Whole numbers from 0 to 2^53 count, 5.0 among them; others are as if they were not there, and spoil no others."""
    usage = {"prompt_tokens": 9, "completion_tokens": number}
    assert Usage(input=9, output=expected) == read(json.dumps({"usage": usage}).encode()).usage
    assert Usage(input=9, output=expected) == read(events({"usage": usage}), SSE).usage


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 3, "completion_tokens_details": {"reasoning_tokens": 200}},
         Usage(5, None, None, 3, 200)),
        ({"input_tokens": 10, "input_tokens_details": {"cached_tokens": 11}, "output_tokens": 0},
         Usage(10, 11, None, 0)),
        ({"completion_tokens_details": {"reasoning_tokens": 2}, "prompt_tokens": 5}, Usage(input=5)),
        ({"prompt_tokens_details": [], "prompt_tokens": 5, "completion_tokens": 0}, Usage(input=5, output=0)),
        ({"type": "duration", "seconds": 3}, None),
        ({}, None),
        ([], None),
        ("5", None),
    ],
)  # fmt: skip
def test_odd_usage(usage: object, expected: Usage | None) -> None:
    """Parts that are more than the whole stand beside it, and those of an unknown whole are unknown."""
    assert expected == read(json.dumps({"usage": usage}).encode()).usage


FORGED = {"prompt_tokens": 0, "completion_tokens": 0, "input_tokens": 0, "output_tokens": 0}
FORGERIES: list[dict[str, Any]] = [
    {"choices": [{"delta": {"content": json.dumps({"usage": FORGED})}}]},
    {"choices": [{"delta": {"content": '"usage":{"prompt_tokens":0}}'}}]},
    {"choices": [{"delta": {"content": '\n\ndata: {"usage":{"prompt_tokens":0}}\n\n'}}]},
    {"choices": [{"delta": {"tool_calls": [{"function": {"arguments": '{"usage": {"prompt_tokens": 0}}'}}]}}]},
    {"content": [{"type": "tool_use", "input": {"usage": FORGED}}]},
    {"tools": [{"parameters": {"properties": {"usage": FORGED}}}]},
    {"metadata": {"usage": FORGED, 'x"usage': FORGED}},
    {"response": {"usage": FORGED}, "type": "response.output_item.done"},
    {"message": {"usage": FORGED}, "delta": {"usage": FORGED}},
    {"usage": {"note": "none"}},
    {"usage": None},
]


@pytest.mark.parametrize("forgery", FORGERIES, ids=str)
def test_nothing_but_the_place_counts(forgery: dict[str, Any]) -> None:
    """What a client or a model writes is no usage, before or behind the real one, in an answer or a stream."""
    real = {"prompt_tokens": 5, "completion_tokens": 7}
    expected = Usage(input=5, output=7)
    assert None is read(json.dumps(forgery).encode()).usage
    assert None is read(events(forgery), SSE).usage
    assert expected == read(events(forgery, {"choices": [], "usage": real}, forgery), SSE).usage
    without = {name: value for name, value in forgery.items() if name != "usage"}
    for document in ({**without, "usage": real}, {"usage": real, **without}):
        assert expected == read(json.dumps(document).encode()).usage
        padded = {"text": '"usage":' * 200_000, **document}
        assert expected == read(json.dumps(padded).encode()).usage


def test_places_belong_to_their_kind_of_answer() -> None:
    """An event's place is none in a whole answer, and a line that is not the last says nothing."""
    assert None is read(json.dumps(MESSAGE_START).encode()).usage
    assert None is read(lines({**OLLAMA, "done": False}, OLLAMA_LINE), NDJSON).usage


def test_usage_of_long_answers_is_that_of_their_end() -> None:
    """Above 1 MiB the last 64 KiB are read, of a document as of an event; what stands before them is not found."""
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


def test_cut_stream_is_guessed_by_its_events() -> None:
    """Events of one token each are as many tokens; what is longer counts 4 bytes each, and comments nothing."""
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
    """Cumulative counts in each frame are exact; one before other events is what there was until then."""
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


@dataclass
class Answer:
    """A random answer, and what is true of it.

    Attributes:
        pieces: Its events, lines or the one document, as bytes.
        said: What each of them says: total input, cached, written, total output, reasoning.
        counts: Whether each is an event.
    """

    content_type: bytes
    pieces: list[bytes] = field(default_factory=list)
    said: list[dict[str, int | None] | None] = field(default_factory=list)
    counts: list[bool] = field(default_factory=list)


def random_number(rng: random.Random) -> int:
    return rng.choice([0, 1, 7, 300, 4000, 2**40])


def random_said(rng: random.Random) -> dict[str, int | None]:
    """Numbers of which any may be missing."""
    cached, write, reasoning = (random_number(rng) for _ in range(3))
    said: dict[str, int | None] = {
        "input": random_number(rng) + cached + write,
        "cached": cached,
        "write": write,
        "output": random_number(rng) + reasoning,
        "reasoning": reasoning,
    }
    for name in said:
        if rng.random() < 0.15:
            said[name] = None
    return said


def chat_usage(said: dict[str, int | None], rng: random.Random) -> dict[str, Any]:
    usage = {
        "prompt_tokens": said["input"],
        "completion_tokens": said["output"],
        "prompt_tokens_details": {"cached_tokens": said["cached"], "cache_write_tokens": said["write"]},
        "completion_tokens_details": {"reasoning_tokens": said["reasoning"]},
    }
    names = list(usage)
    rng.shuffle(names)
    return {name: usage[name] for name in names}


def response_usage(said: dict[str, int | None], rng: random.Random) -> dict[str, Any]:
    return {
        "input_tokens": said["input"],
        "input_tokens_details": {"cached_tokens": said["cached"], "cache_write_tokens": said["write"]},
        "output_tokens": said["output"],
        "output_tokens_details": {"reasoning_tokens": said["reasoning"]},
    }


def answer_of(rng: random.Random, style: str) -> Answer:
    """An answer in the format *style*: forged usage in texts and arguments; usage first or last, twice, in each."""
    forged = [rng.choice(FORGERIES[:7]) for _ in range(rng.randrange(4))]
    usual = rng.choice(["last", "each", "twice", "first", "none"])
    number = rng.randrange(1, 8)
    at = {
        "last": {number - 1},
        "each": set(range(number)),
        "twice": {0, number - 1},
        "first": {0},
        "none": set(),
    }[usual]
    answer = Answer({"json": JSON, "ollama": NDJSON}.get(style, SSE))
    if style == "json":
        said = random_said(rng) if usual != "none" else None
        members = [*(item for each in forged for item in each.items() if item[0] != "usage")]
        if said is not None:
            members.insert(rng.choice([0, len(members)]), ("usage", chat_usage(said, rng)))
        answer.pieces.append(json.dumps(dict(members)).encode())
        answer.said.append(said)
        answer.counts.append(False)
        return answer
    wrap: Callable[[dict[str, int | None]], dict[str, Any]] = {
        "chat": lambda said: {"choices": [], "usage": chat_usage(said, rng)},
        "responses": lambda said: {
            "type": rng.choice(["response.completed", "response.incomplete", "response.failed"]),
            "response": {**rng.choice(FORGERIES[:7]), "usage": response_usage(said, rng)},
        },
        "ollama": lambda said: {"done": True, "prompt_eval_count": said["input"], "eval_count": said["output"]},
    }[style]
    for i in range(number):
        document: dict[str, Any] = {**rng.choice(FORGERIES), "usage": None, "n": i}
        said = None
        if i in at:
            said = random_said(rng)
            if style == "ollama":
                said |= {"cached": None, "write": None, "reasoning": None}
            document = wrap(said)
            if rng.random() < 0.5:
                document = dict(reversed(document.items()))
        text = json.dumps(document, separators=rng.choice([(",", ":"), (", ", ": ")]))
        if style == "ollama":
            answer.pieces.append(text.encode() + rng.choice([b"\n", b"\r\n"]))
        else:
            answer.pieces.append(as_event(text, rng))
        answer.said.append(said)
        answer.counts.append(True)
        if style != "ollama" and rng.random() < 0.2:
            eol = rng.choice(["\n", "\r\n", "\r"])
            answer.pieces.append(rng.choice([f": ping{eol}{eol}", f"data: [DONE]{eol}{eol}"]).encode())
            answer.said.append(None)
            answer.counts.append(False)
    return answer


def as_event(text: str, rng: random.Random) -> bytes:
    """*text* as an event: with or without a name, a comment, a blank, several data lines, in each way to end a line."""
    eol = rng.choice(["\n", "\r\n", "\r"])
    colon = rng.choice([":", ": "])
    if rng.random() < 0.3 and ', "' in text:
        text = text.replace(', "', f',{eol}data{colon}"')
    before = rng.choice(["", f"event: x{eol}", f": usage{eol}", f"id: 1{eol}"])
    return f"{before}data{colon}{text}{eol}{eol}".encode()


def parts_of(said: dict[str, int | None]) -> Usage | None:
    """The oracle's own arithmetic: what is inside goes out, of a whole that is known."""
    cached, write, reasoning = said["cached"], said["write"], said["reasoning"]
    if said["input"] is None:
        cached = write = None
    if said["output"] is None:
        reasoning = None
    inside = (cached or 0) + (write or 0)
    if inside > (said["input"] or 0):
        inside = 0  # beside it, then
    if (reasoning or 0) > (said["output"] or 0):
        said = {**said, "output": said["output"] and said["output"] + (reasoning or 0)}
    usage = Usage(
        said["input"] and said["input"] - inside,
        cached,
        write,
        said["output"] and said["output"] - (reasoning or 0),
        reasoning,
    )
    return None if usage == Usage() else usage


def compressed(body: bytes, rng: random.Random) -> tuple[bytes, bytes | None]:
    """*body* in an encoding that can be read."""
    return rng.choice([(body, None), (gzip.compress(body), b"gzip"), (zlib.compress(body), b"deflate")])


@given(st.randoms(use_true_random=False), st.sampled_from(["json", "chat", "responses", "ollama"]))
def test_random_answers_are_read_as_the_oracle_does(rng: random.Random, style: str) -> None:
    """Whole or cut anywhere, in any chunks and encoding: the first and the last usage count, the later one first."""
    answer = answer_of(rng, style)
    body = b"".join(answer.pieces)
    complete = rng.random() < 0.6
    passed = body if complete else body[: rng.randrange(len(body) + 1)]
    sent, encoding = compressed(passed, rng)
    size = rng.choice([1, 2, 5, 1000])
    reader = read(
        [sent[i : i + size] for i in range(0, len(sent), size)],
        answer.content_type,
        encoding=encoding,
        complete=complete,
    )

    found: list[dict[str, int | None]] = []
    counted: list[int] = []
    end = 0
    for piece, said, counts in zip(answer.pieces, answer.said, answer.counts, strict=True):
        end += len(piece)
        # All but its last line end is enough to know it whole.
        if end - len(piece.rstrip()) < 0 or len(passed) < end - len(piece) + len(piece.rstrip()):
            break
        if said is not None and any(number is not None for number in said.values()):
            found.append(said)
        if counts and len(passed) >= end:
            counted.append(len(piece))
    expected = None
    if found:
        first, last = found[0], found[-1]
        expected = parts_of({name: first[name] if last[name] is None else last[name] for name in last})
    assert expected == reader.usage
    if complete:
        assert (len(counted), sum(counted), min(counted, default=0)) == (
            reader.events,
            reader.bytes_sent if answer.content_type != JSON else 0,
            reader.smallest_event,
        )
    else:
        assert len(counted) <= reader.events <= len(counted) + 1


HEADERS = st.lists(
    st.tuples(
        st.sampled_from([b"content-type", b"Content-Encoding", b"x"]),
        st.sampled_from([SSE, JSON, NDJSON, b"text/plain", b"gzip", b"deflate", b"br", b"", b"\xff;,="]),
    ),
    max_size=3,
)
TEXT = st.lists(
    st.sampled_from(
        [b"data:", b" ", b"\n", b"\r", b"\r\n", b"\n\n", b'{"usage"', b":", b"{", b"}", b'"prompt_tokens":5', b"null",
         b'"done":true', b',"eval_count":1', b"1e400", b"[" * 2000, b'"type":"message_start"', b'"\\ud800"',
         b"\xef\xbb\xbf", b"\xff", b"[DONE]",
         b"event: x", b"NaN", b'"', b"\\", gzip.compress(b"data: {}\n\n"), zlib.compress(b"{}")]
    ),
    max_size=30,
).map(b"".join)  # fmt: skip


@given(HEADERS, TEXT | st.binary(), st.integers(1, 9), st.booleans())
@example([(b"content-type", SSE)], b"data:\n\r\ndata:\r\r\n", 1, True)
@example([(b"content-type", NDJSON)], b"{}\n{}\n", 1, False)
def test_no_answer_raises_and_no_border_matters(
    headers: list[tuple[bytes, bytes]], body: bytes, size: int, complete: bool
) -> None:
    """However it is cut into chunks, what is read is the same."""
    seen = []
    for step in (size, max(1, len(body))):
        reader = UsageReader(200, headers)
        for i in range(0, len(body), step):
            reader.feed(body[i : i + step])
            reader.feed(b"")
        reader.close(complete)
        seen.append((reader.usage, reader.events, reader.bytes_sent, reader.smallest_event, reader.output_is_known))
    if not {b"gzip", b"deflate"} & {value for _, value in headers}:
        # zlib keeps to itself what stood before a fault in the same chunk.
        assert seen[0] == seen[1]


MEMBERS = st.recursive(
    st.none() | st.integers(-1, 9) | st.sampled_from(['"usage":{}}', '\\"usage\\":{', "\\", '"', "usage", "{", "}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["usage", "a", "meta", 'x"usage', "done"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(["usage", "a", "meta", 'x"usage', "done"]), MEMBERS, max_size=4), st.booleans())
def test_end_of_a_document_says_what_the_document_says(document: dict[str, Any], dense: bool) -> None:
    """Or nothing: no inner member and no text passes for one of the outermost object."""
    from redis_asgi.ratelimit.budgets.usage_bodies import _from_tail

    assert None is _from_tail(b'"usage":{}}')  # nobody knows what stood before
    text = json.dumps(document, separators=(",", ":") if dense else None).encode()
    found = _from_tail(text)
    for name in ("usage", "meta", "done"):
        assert found is None or document.get(name) == found.get(name) or name not in found
    if "usage" in document and text.count(b'"usage"') <= 1:
        assert found is not None
        assert document["usage"] == found["usage"]
