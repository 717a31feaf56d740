"""Answers through a budget: untouched, read as they pass, and believed or not."""

import json
import random
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from redis_asgi import (
    RateLimitMiddleware,
    Rule,
    Settings,
    by_header,
    tokens,
)
from redis_asgi.ratelimit.limits.charge import Charge, Charges

from ..kit.inside import engine_of
from .harness import drive, header, http_scope
from .spending import (
    ASK,
    ESTIMATE,
    JSON,
    READ,
    STREAM,
    Ending,
    answer,
    endings,
    event,
    limited,
    playing,
    remaining,
    request,
    usage,
)

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("status", [204, 304])
async def test_answer_without_a_body_keeps_the_estimate(any_settings: Settings, status: int) -> None:
    """It is complete, and says nothing."""
    app = limited(any_settings)
    await request(app, Ending(answer(status=status), ESTIMATE))

    assert 1_000_000 - ESTIMATE == await remaining(app)


async def test_file_that_the_server_sends_keeps_the_estimate(any_settings: Settings) -> None:
    """A path in place of a body is a complete answer."""
    app = limited(any_settings)
    await request(app, Ending([*answer(whole=False), {"type": "http.response.pathsend", "path": "/x"}], ESTIMATE))

    assert 1_000_000 - ESTIMATE == await remaining(app)


@pytest.mark.parametrize("seed", range(5))
async def test_streams_are_untouched(any_settings: Settings, seed: int) -> None:
    """Every message of an answer passes as it is and when it is, but for the fields at its start."""
    rng = random.Random(seed)
    for ending in [endings(rng) for _ in range(20)]:
        with_budget = await request(limited(any_settings), ending)
        without = await request(RateLimitMiddleware(playing, "900/hour", settings=any_settings), _silent(ending))

        assert without[1:] == with_budget[1:]
        assert all(one["body"] is other["body"] for one, other in zip(without[1:], with_budget[1:], strict=True))
        assert [] == [each for each in ending.messages[:1] if each["status"] != with_budget[0]["status"]]


def _silent(ending: Ending) -> Ending:
    return Ending(ending.messages, 0, raises=ending.raises, leaves=ending.leaves)


@pytest.mark.parametrize("kind", [memoryview, bytearray])
@pytest.mark.parametrize("content_type", ["text/event-stream", "application/x-ndjson", "application/json", "text/x"])
async def test_chunks_of_any_kind_are_read(any_settings: Settings, kind: Any, content_type: str) -> None:
    """Starlette passes a ``memoryview`` on as it is, and servers take it;
    some take ``None`` for nothing.
    """
    line = json.dumps(usage(7, 8))
    whole = f"data: {line}\n\n" if content_type == "text/event-stream" else f"{line}\n"
    ending = Ending(answer(*[kind(whole[i : i + 9].encode()) for i in range(0, len(whole), 9)]), 0)
    ending.messages[0]["headers"] = [(b"content-type", content_type.encode())]
    ending.messages[-1]["body"] = None
    app = limited(any_settings)
    await request(app, ending)

    assert 1_000_000 - (15 if content_type != "text/x" else ESTIMATE) == await remaining(app)


@pytest.mark.parametrize("status", [200, 302])
async def test_headers_that_can_be_read_once_reach_the_client(any_settings: Settings, status: int) -> None:
    """ASGI wants an iterable, of which a list is one."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        start, *bodies = answer(json.dumps(usage(7, 8)).encode())
        await send({**start, "status": status, "headers": iter([(b"x-own", b"1"), *start["headers"]])})
        for each in bodies:
            await send(each)

    costs: list[Any] = [1, tokens()]
    for name, cost in zip(("requests", "tokens"), costs, strict=True):
        limiting = RateLimitMiddleware(app, rules=[Rule("9000/hour", name=name, cost=cost)], settings=any_settings)
        asked = {"type": "http.request", "body": ASK}
        start = [(await drive(limiting, http_scope(method="POST"), asked))[0] for _ in range(2)][-1]
        start["headers"] = [*start["headers"]]
        assert (b"1", JSON[0][1]) == (header(start, b"x-own"), header(start, b"content-type"))
    if status == 200:
        # What the first has used, and the estimate of the second.
        assert b"r=%d;" % (9000 - 15 - (READ + 1000)) in (header(start, b"ratelimit") or b"")


async def test_each_chunk_passes_before_it_is_looked_at(any_settings: Settings) -> None:
    """Nothing is held back: the client has each message before the app goes on."""
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for n, message in enumerate(answer(event({"a": 1}), event(usage(1, 2)), headers=STREAM)):
            await send(message)
            assert n + 1 == len(sent)

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": ASK, "more_body": False}

    await limited(any_settings, app=app)(http_scope(method="POST"), receive, send)


async def test_the_app_is_believed_rather_than_the_answer(any_settings: Settings) -> None:
    """The last that it said, of a policy or of all;
    it may be more than the answer says, less, or nothing.
    """
    told = answer(json.dumps(usage(300, 300)).encode())
    for used, left in ((5, 995), (0, 995), (600, 395)):
        app = limited(any_settings, "1000/hour; 100000/day")
        await request(app, Ending(told, 0, used=used))
        assert left == await remaining(app)


async def test_what_was_used_of_one_policy(any_settings: Settings) -> None:
    """A rule's name stands for all its policies;
    what counts no tokens is an error, and so is what is no number.
    """
    said: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        limit = scope["state"]["rate_limit"]
        limit.used(7)
        limit.used(20, "tokens-3600s")
        for wrong in ((-1,), (True,), (1.5,), ("7",), (7, "requests"), (7, "nobody")):
            with pytest.raises(ValueError, match=r"whole number|does not count"):
                limit.used(*wrong)
        await playing(scope, receive, send)
        with pytest.raises(RuntimeError, match="before its last byte"):
            limit.used(7)
        said.append(limit)

    rules = [
        Rule("1000/hour; 5000/day", name="tokens", partition_by=by_header("x-key"), cost=tokens(ESTIMATE)),
        Rule("100/hour", name="requests", partition_by=by_header("x-key")),
    ]
    limited_app = RateLimitMiddleware(app, rules=rules, settings=any_settings)
    await request(limited_app, Ending(answer(b"{}"), 0))
    charges = Charges(
        Charge(rule.policies, rule.partition.of("k"), 1) for rule in limited_app._rules if rule.policies is not None
    )
    states = (await engine_of(limited_app).decide(charges, "peek")).decision.policies

    assert {"tokens-3600s": 980, "tokens-86400s": 4993, "requests": 99} == {s.name: s.remaining for s in states}
    assert said


async def test_app_may_say_what_was_used_where_nothing_counts_tokens(any_settings: Settings) -> None:
    """Under a rule that does not apply this time it is no error, unless it names the policy."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["rate_limit"].used(7)
        with pytest.raises(ValueError, match="No rule"):
            scope["state"]["rate_limit"].used(7, "tokens")
        await playing(scope, receive, send)

    limited_app = RateLimitMiddleware(app, "100/hour", settings=any_settings)
    assert 200 == (await request(limited_app, Ending(answer(b"{}"), 0)))[0]["status"]
