"""A flood of refused requests: one answer, said again for as long as it is true,
and to each as if it were its own.
"""

import asyncio
import gc

import pytest
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from redis_asgi import Decision, RateLimitMiddleware, RedisManager, Rule, Settings, by_header
from redis_asgi.ratelimit.answers.dialects import AnswerStyle
from redis_asgi.ratelimit.answers.request_decision import decision_of
from redis_asgi.ratelimit.counting.engine import Engine
from redis_asgi.ratelimit.counting.verdict import Verdict
from redis_asgi.ratelimit.limits.refusal_memory import Known, Said
from redis_asgi.settings import StrategyName

from .harness import Spy, all_answered, drive, header, http_scope, websocket_scope

pytestmark = pytest.mark.anyio


async def flood(app: RateLimitMiddleware, count: int = 4, **changes: object) -> list[list[Message]]:
    """What each of *count* requests is sent."""
    return [await drive(app, http_scope(**changes)) for _ in range(count)]


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


async def test_each_answer_is_its_own(settings: Settings) -> None:
    """A middleware outside may change the fields of one, and no other one has them then."""
    app = RateLimitMiddleware(Spy(), "1/minute", settings=settings)
    await flood(app)
    (changed, _), (after, _) = await flood(app, 2)
    fields = list(after["headers"])
    changed["headers"].append((b"x-more", b"1"))
    (later, _), *_ = await flood(app, 1)

    assert (429, fields) == (later["status"], later["headers"])


async def test_a_handshake_is_refused_as_one(settings: Settings) -> None:
    """The answer that a flood of requests is given is none to a WebSocket of the same client."""
    app = RateLimitMiddleware(Spy(), "1/minute", settings=settings)
    await flood(app)

    assert [{"type": "websocket.close", "code": 1008, "reason": ""}] == await drive(app, websocket_scope())


async def test_a_head_request_has_no_body(settings: Settings) -> None:
    """Whatever the request before was answered."""
    app = RateLimitMiddleware(Spy(), "1/minute", settings=settings)
    await flood(app)
    (start, body), (_, after) = (await flood(app, 1, method="HEAD"))[0], (await flood(app, 1))[0]

    assert b"" == body["body"]
    assert header(start, b"content-length") == b"%d" % len(after["body"])


async def test_each_is_asked_of_the_user_who_answers(settings: Settings) -> None:
    """``on_exceeded`` is called for each."""
    asked: list[str] = []

    def answer(conn: HTTPConnection, decision: Decision) -> Response:
        asked.append(conn.url.path)
        return PlainTextResponse("later", 429)

    app = RateLimitMiddleware(Spy(), "1/minute", on_exceeded=answer, settings=settings)
    await flood(app, 5)

    assert ["/"] * 4 == asked


async def test_ends_with_a_reset(settings: Settings) -> None:
    """What is given back is had at once, however often the client was refused before."""
    app = RateLimitMiddleware(Spy(), "1/minute", partition_by=by_header("x-key"), settings=settings)
    headers = [(b"x-key", b"k")]
    await flood(app, headers=headers)
    await app._engine.reset(app._rules[0].partition.of("k"), None)

    assert [200, 429] == [sent[0]["status"] for sent in await flood(app, 2, headers=headers)]


@pytest.mark.parametrize("strategy", ["gcra", "sliding-window-counter"])
async def test_what_is_charged_later_is_waited_for(settings: Settings, strategy: StrategyName) -> None:
    """A client is never told to come back earlier than it is admitted."""
    begun, ends = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            begun.set()
            await ends.wait()
            scope["state"]["rate_limit"].charge(6)
        await PlainTextResponse("ok")(scope, receive, send)

    manager = RedisManager(settings)
    limited = RateLimitMiddleware(app, "2/hour", strategy=strategy, redis=manager)
    slow = asyncio.create_task(drive(limited, http_scope(path="/slow")))
    await begun.wait()
    *_, refused = await flood(limited, 4)
    ends.set()
    await slow
    await all_answered(manager)
    (later,) = await flood(limited, 1)
    waits = [int(header(start, b"retry-after") or 0) for start, _ in (refused, later)]
    await manager.close()

    assert 0 < waits[0] < waits[1]


async def test_another_rule_beside_it_is_asked(settings: Settings) -> None:
    """Only one policy's refusal that no other limit may outlast is repeated."""
    rules = [Rule("1/minute", name="short"), Rule("2/hour", name="long")]
    app = RateLimitMiddleware(Spy(), rules=rules, settings=settings)
    sent = await flood(app, 6)

    assert [200] + [429] * 5 == [each[0]["status"] for each in sent]
    assert {b'"short";q=1;w=60, "long";q=2;w=3600'} == {header(each[0], b"ratelimit-policy") for each in sent[:2]}


async def test_what_is_said_to_many_can_be_changed_by_none(settings: Settings) -> None:
    """Who stands outside finds the decision; it is over."""
    app = RateLimitMiddleware(Spy(), "1/minute", settings=settings)
    await flood(app)
    scopes: list[Scope] = [http_scope(), http_scope()]
    for scope in scopes:
        await drive(app, scope)
    decisions = [scope["state"]["rate_limit"] for scope in scopes]

    assert [False, False] == [decision.allowed for decision in decisions]
    with pytest.raises(RuntimeError):
        decisions[1].charge(1)


async def test_is_one_answer_whatever_another_thread_finds_meanwhile(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loops in several threads may share a middleware: what is said is not looked for twice."""
    app = RateLimitMiddleware(Spy(), "1/minute", settings=settings)
    (expected, _) = (await flood(app))[-1]
    find = Engine.again

    def interrupted(engine: Engine, known: Known, style: AnswerStyle) -> Said | None:
        said = find(engine, known, style)
        for charges in engine.plans.charges.young.values():
            charges.known = None
        known.said = None
        return said

    monkeypatch.setattr(Engine, "again", interrupted)
    scope = http_scope()
    start, _ = await drive(app, scope)

    assert expected == start
    assert scope["state"]["rate_limit"].violated == ("default",)


async def test_a_decision_that_is_said_again_is_over_from_the_first(settings: Settings) -> None:
    """Also while the answer that it is made for is still on its way: it is not the next one's to
    change.
    """
    app = RateLimitMiddleware(Spy(), "1/minute", settings=settings)
    await flood(app, 2)
    scopes: list[Scope] = [http_scope(), http_scope()]
    over: list[bool] = []

    async def send(_message: Message) -> None:
        if len(scopes) > 1:
            await drive(app, scopes.pop())
        over.extend(decision_of(scope) is None for scope in (first, second))

    first, second = scopes
    await app(first, _nothing, send)

    assert first["state"]["rate_limit"] is second["state"]["rate_limit"]
    assert [True] * 4 == over


async def test_nothing_of_it_waits_for_the_collector(settings: Settings) -> None:
    """A refused request is gone when it has been answered,
    and so is a decision that was said again.
    """
    app = RateLimitMiddleware(PlainTextResponse("ok"), "1/minute", settings=settings)
    await flood(app)
    gc.collect()
    before = sum(isinstance(each, Verdict) for each in gc.get_objects())
    gc.disable()
    try:
        for _ in range(20):
            app._engine.refusals.clear()
            await flood(app, 3)
        left = sum(isinstance(each, Verdict) for each in gc.get_objects())
    finally:
        gc.enable()

    assert left <= before + 1
