"""`assert_limited`: what it proves, what it finds, and what it says of it."""

from typing import Any, get_args

import httpx
import pytest
import redis
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from redis_asgi import RateLimitMiddleware, RedisManager, Rule, by_header
from redis_asgi.settings import StrategyName
from redis_asgi.testing import RateLimitClock, assert_limited, limits_off

from ..ratelimit.harness import Spy, client_of
from .clients import TestClient
from .conftest import MakeApp

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("strategy", get_args(StrategyName))
@pytest.mark.parametrize("limits", ["1/second", "5/minute", "7/hour; 5/10 seconds", "3/day"])
async def test_limit_of_each_kind_holds(make_app: MakeApp, strategy: StrategyName, limits: str) -> None:
    """Every strategy keeps its quota and tells the time, in Redis as in memory."""
    quota = min(int(each.partition("/")[0]) for each in limits.split(";"))
    async with client_of(make_app(limits, strategy=strategy)) as client:
        refused = await assert_limited(client, "GET", "/", after=quota)

    assert refused.status_code == 429


async def test_options_are_those_of_the_client(rate_limit_clock: RateLimitClock, make_app: MakeApp) -> None:
    """What a request needs goes with each: here the header that it is counted by."""
    app = make_app("2/minute", partition_by=by_header("x-api-key"))
    async with client_of(app) as client:
        began = rate_limit_clock.now
        await assert_limited(client, "POST", "/", after=2, headers={"x-api-key": "ada"}, json={"a": 1})
        assert 60 == pytest.approx(rate_limit_clock.now - began)
        assert (await client.get("/", headers={"x-api-key": "bob"})).json() == {"default": 1}


def test_sync_client_is_not_awaited(make_app: MakeApp, manager: RedisManager) -> None:
    """With Starlette's client it is a plain call,
    whether that has one loop or one for each request.
    """
    app = make_app("5/minute")
    refused = assert_limited(TestClient(app), "GET", "/", after=5)

    with TestClient(make_app("3/minute", rules=None)) as client:
        assert_limited(client, "GET", "/", after=3)
    assert refused.headers["retry-after"] == "60"


async def test_nothing_is_left_without_a_fixture(
    redis_url: str, redis_client: redis.Redis, make_app: MakeApp, manager: RedisManager
) -> None:
    """Without a clock of the test's it holds one for itself, and removes what it has counted."""
    async with client_of(make_app("2/minute")) as client:
        for _ in range(2):
            await assert_limited(client, "GET", "/", after=2)

    assert [] == redis_client.keys()


async def test_login_that_fails_is_admitted() -> None:
    """What the app answers is its own business: a wrong password is no refusal of the limit."""
    app = RateLimitMiddleware(
        Spy(status=401), rules=[Rule("3/minute", paths="/login", methods="POST")], redis="memory://"
    )
    async with client_of(app) as client:
        await assert_limited(client, "POST", "/login", after=3)


# What it finds.


class _Answers:
    """An app that answers in turn with these statuses and values of ``Retry-After``."""

    def __init__(self, *answers: "int | tuple[int, str]") -> None:
        self._answers = iter(answers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = next(self._answers)
        status, wait = answer if isinstance(answer, tuple) else (answer, "")
        headers = {"retry-after": wait, "ratelimit": '"default";r=0;t=7'} if wait else {}
        await PlainTextResponse("as it is", status, headers)(scope, receive, send)


FINDINGS = [
    pytest.param(
        (429,),
        1,
        "request 1 of 1 was answered with 429, not admitted. It says: as it is (Counted before? ",
        id="too early",
    ),
    pytest.param((200, 503), 2, "request 2 of 2 was answered with 503, not admitted", id="cannot be decided"),
    pytest.param(
        (200, 200),
        1,
        "request 2, the first over the limit, was answered with 200, not refused with 429. It has no fields of a limit",
        id="not limited",
    ),
    pytest.param((429,), 0, "the refusal has no Retry-After: its cost exceeds the quota", id="no wait"),
    pytest.param(((429, "soon"),), 0, "Retry-After 'soon' is not a whole number", id="no number"),
    pytest.param(((429, "0"),), 0, "Retry-After '0' is not a whole number", id="nought"),
    pytest.param(
        ((429, "30"), (200, "30")),
        0,
        "a second before its Retry-After of 30 s a request was answered with 200, not refused with 429. "
        'It says ratelimit: "default";r=0;t=7.',
        id="wait told too long",
    ),
    pytest.param(
        ((429, "30"), (429, "1"), (429, "1")),
        0,
        "after its Retry-After of 30 s a request was answered with 429, not admitted",
        id="wait told too short",
    ),
]


@pytest.mark.parametrize(("answers", "after", "expected"), FINDINGS)
async def test_what_is_not_so_is_told(answers: Any, after: int, expected: str) -> None:
    """Which request was answered how, and what that says of the limit;
    the same of both kinds of clients.
    """
    async with client_of(_Answers(*answers)) as client:
        with pytest.raises(AssertionError) as found:
            await assert_limited(client, "GET", "/x", after=after)
    with pytest.raises(AssertionError) as found_here:
        assert_limited(TestClient(_Answers(*answers)), "GET", "/x", after=after)

    assert str(found.value).startswith("GET /x: ")
    assert expected in str(found.value)
    assert str(found.value) == str(found_here.value)


async def test_limits_that_are_off_are_found(make_app: MakeApp) -> None:
    """A test that has no limits does not pass for one that has."""
    async with client_of(make_app("2/minute")) as client:
        with limits_off(), pytest.raises(AssertionError, match="request 3, the first over the limit, was"):
            await assert_limited(client, "GET", "/", after=2)


@pytest.mark.parametrize("after", [-1, 1.5, True, "5"])
def test_number_of_requests_is_one(after: Any) -> None:
    """What is no number of requests is refused at the call, before anything is awaited."""
    client = httpx.AsyncClient(transport=httpx.ASGITransport(Spy()))
    with pytest.raises(ValueError, match=r"Try after=5\."):
        _ = assert_limited(client, "GET", "/", after=after)


@pytest.mark.parametrize("client", [Spy(), None], ids=["the app itself", "nothing"])
def test_what_is_no_client_is_told(client: Any) -> None:
    """With what makes one of an app."""
    with pytest.raises(TypeError, match=r"is no client\. Try TestClient\(app\)"):
        assert_limited(client, "GET", "/", after=5)
