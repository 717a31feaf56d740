"""Usage is read where each format has it, and nowhere else."""

import gzip
import json
import zlib
from typing import Any

import pytest

from redis_asgi.ratelimit.budgets.usage import Usage

from .usages import (
    ALL_OPENAI,
    CHAT,
    CHUNK,
    FORGERIES,
    JSON,
    LAST_CHUNK,
    MESSAGE,
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
    """Whole numbers from 0 to 2^53 count, 5.0 among them;
    others are as if they were not there, and spoil no others.
    """
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
    """Parts that are more than the whole stand beside it,
    and those of an unknown whole are unknown.
    """
    assert expected == read(json.dumps({"usage": usage}).encode()).usage


@pytest.mark.parametrize("forgery", FORGERIES, ids=str)
def test_nothing_but_the_place_counts(forgery: dict[str, Any]) -> None:
    """What a client or a model writes is no usage,
    before or behind the real one, in an answer or a stream.
    """
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
