"""Answers of models, and what they say was used."""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

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


ALL_OPENAI = Usage(30, 60, 10, 30, 20)


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
    """An answer in the format *style*: forged usage in texts and arguments;
    usage first or last, twice, in each.
    """
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
    """*text* as an event: with or without a name, a comment, a blank,
    several data lines, in each way to end a line.
    """
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
