"""Requests that spend a budget, and what is left of it."""

import gzip
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from redis_asgi import (
    RateLimitMiddleware,
    Rule,
    Settings,
    by_header,
    tokens,
)
from redis_asgi.ratelimit.limits.charge import Charge, Charges

from ..kit.inside import engine_of
from .harness import http_scope

ESTIMATE, READ = 500, 10


ASK = json.dumps({"prompt": "x" * (4 * READ)}).encode()


JSON = [(b"content-type", b"application/json")]


STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


@dataclass
class Ending:
    """How an answer goes: its messages, whether the app raises behind them, and what that costs.

    Attributes:
        used: What the app says that it used.
        leaves: Whether the client is gone after the messages, so that sending fails.
    """

    messages: Sequence[Message]
    cost: int
    raises: bool = False
    leaves: bool = False
    used: int | None = None


def answer(*chunks: bytes, status: int = 200, headers: Any = JSON, whole: bool = True) -> list[Message]:
    """An answer in these chunks, or the beginning of one."""
    start: Message = {"type": "http.response.start", "status": status, "headers": list(headers)}
    last = {"type": "http.response.body", "body": b"", "more_body": False}
    bodies: list[Message] = [{"type": "http.response.body", "body": chunk, "more_body": True} for chunk in chunks]
    return [start, *bodies, *([last] if whole else [])]


def event(value: Any) -> bytes:
    """An event of a stream."""
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def usage(read: int, written: int) -> dict[str, Any]:
    """As OpenAI says it."""
    return {"usage": {"prompt_tokens": read, "completion_tokens": written}}


def endings(rng: random.Random) -> Ending:  # noqa: C901 - one way after the other
    """One way of ending."""
    read, written = rng.choice([0, 1, 40, 700]), rng.choice([0, 3, 90, 2000])
    told = usage(read, written)
    texts = [event({"choices": [{"delta": {"content": "y" * rng.randrange(30)}}]}) for _ in range(rng.randrange(6))]
    sizes = [len(text) for text in texts]
    guess = math.ceil(READ + max(len(sizes), (sum(sizes) - len(sizes) * min(sizes, default=0)) / 4))
    kind = rng.randrange(15)
    if kind == 0:
        return Ending(answer(json.dumps(told).encode()), read + written)
    if kind == 1:
        document = json.dumps({"a": {"usage": {"prompt_tokens": 9}}, **told}).encode()
        return Ending(answer(*(document[i : i + 3] for i in range(0, len(document), 3))), read + written)
    if kind == 2:
        return Ending(answer(*texts, event(told), event(b"[DONE]"), headers=STREAM), read + written)
    if kind == 3:  # in every frame, cumulative
        frames = [event({"choices": [{}], **usage(read, n)}) for n in range(0, written + 1, max(1, written // 3))]
        return Ending(answer(*frames, event(told), headers=STREAM), read + written)
    if kind == 4:  # and with line ends of another kind, cut anywhere
        stream = b"".join([*texts, event(told)]).replace(b"\n", b"\r\n")
        return Ending(answer(*(stream[i : i + 7] for i in range(0, len(stream), 7)), headers=STREAM), read + written)
    if kind == 5:
        return Ending(answer(b'{"no": "usage"}'), ESTIMATE)
    if kind == 6:
        return Ending(answer(*texts, headers=STREAM), ESTIMATE)
    if kind == 7:
        return Ending(answer(b'{"error": "no"}', status=rng.choice([400, 404, 429, 500])), 0)
    if kind == 8:
        return Ending([], 0, raises=True)
    if kind == 9:
        return Ending(answer(*texts, headers=STREAM, whole=False), min(ESTIMATE, guess), raises=rng.random() < 0.5)
    if kind == 10:
        return Ending(answer(*texts, headers=STREAM, whole=False), min(ESTIMATE, guess), leaves=True)
    if kind == 11:
        return Ending(answer(b"{}"), read + written, used=read + written)
    if kind == 12:
        packed = gzip.compress(json.dumps(told).encode())
        return Ending(answer(packed, headers=[*JSON, (b"content-encoding", b"gzip")]), read + written)
    if kind == 13:
        hidden = {"choices": [{"tool": json.dumps(usage(1, 1)), "input": usage(1, 2)}]}
        return Ending(answer(json.dumps({**hidden, **told}).encode()), read + written)
    large = {"type": "response.completed", "response": {"tools": ["z" * 300_000], "usage": responses(read, written)}}
    return Ending(answer(event({"type": "response.created"}), event(large), headers=STREAM), read + written)


def responses(read: int, written: int) -> dict[str, int]:
    return {"input_tokens": read, "output_tokens": written}


class Boom(Exception):
    """Raised by an app."""


async def request(app: ASGIApp, ending: Ending, *, key: str = "k", body: bytes = ASK, **changes: Any) -> list[Message]:
    """A request that ends so; what its client got."""
    sent: list[Message] = []
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message.get("body") == b"never":
            raise OSError("gone")
        sent.append(message)

    scope = http_scope(method="POST", ending=ending, **{"headers": [(b"x-key", key.encode())], **changes})
    try:
        await app(scope, receive, send)
    except (Boom, OSError):
        assert ending.raises or ending.leaves
    return sent


async def playing(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that ends each request as its scope says, once its ``gate`` is open."""
    await receive()
    ending: Ending = scope["ending"]
    if "gate" in scope:
        scope["arrived"].set()
        await scope["gate"].wait()
    if ending.used is not None:
        scope["state"]["rate_limit"].used(ending.used)
    for message in ending.messages:
        await send(message)
    if ending.leaves:
        await send({"type": "http.response.body", "body": b"never", "more_body": True})
    if ending.raises:
        raise Boom


async def remaining(app: RateLimitMiddleware, *, key: str = "k", name: str = "tokens") -> int:
    """What *key* has left under a rule, when all that was settled so far has been."""
    rule = next(rule for rule in app._rules if rule.name == name)
    assert rule.policies is not None
    charges = Charges((Charge(rule.policies, rule.partition.of(key), 1),))
    return (await engine_of(app).decide(charges, "peek")).decision.policies[0].remaining


def limited(
    settings: Settings, limits: str = "1000000/hour", app: ASGIApp = playing, **rule: Any
) -> RateLimitMiddleware:
    """A budget of each key's own."""
    rule = {"name": "tokens", "partition_by": by_header("x-key"), "cost": tokens(ESTIMATE), **rule}
    return RateLimitMiddleware(app, rules=[Rule(limits, **rule)], settings=settings)
