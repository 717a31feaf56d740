"""Limits stacked on an app, its routers, a route and its parameters:
each counts for itself, and they agree.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Security, WebSocket
from fastapi import HTTPException as FastAPIHTTPException
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from redis_asgi import ConfigurationError, RateLimit, RateLimitMiddleware, RedisManager, Settings, rate_limit
from redis_asgi.ratelimit.rules.policies import fit_name
from redis_asgi.telemetry import fresh_telemetry

from .harness import client_of, drive, memory, own_prefix, statuses, websocket_scope

pytestmark = pytest.mark.anyio


async def test_app_router_and_route_count_each_for_itself(memory_settings: Settings) -> None:
    """A hundred for everything and five for one route:
    five of twelve are admitted, and the hundred lost five.
    """
    app = FastAPI(dependencies=[Depends(RateLimit("100/minute", settings=memory_settings))])
    router = APIRouter(dependencies=[Depends(RateLimit("50/minute", settings=memory_settings))])
    outer = APIRouter()

    @router.get("/tight", dependencies=[Depends(RateLimit("5/minute", settings=memory_settings))])
    async def tight(_: Annotated[None, Depends(RateLimit("1000/hour", settings=memory_settings))]) -> str:
        return "x"

    outer.include_router(router, dependencies=[Depends(RateLimit("70/minute", settings=memory_settings))])
    app.include_router(outer, prefix="/v1")

    async with client_of(app) as client:
        responses = [await client.get("/v1/tight") for _ in range(12)]

    assert [200] * 5 + [429] * 7 == [response.status_code for response in responses]
    said = responses[-1].headers["ratelimit"].split(", ")
    quotas = ["-100-60s", "-70-60s", "-50-60s", "-5-60s", "-1000-3600s"]
    assert all(quota in member for quota, member in zip(quotas, said, strict=True))
    assert ["r=95", "r=65", "r=45", "r=0", "r=995"] == [member.split(";")[1] for member in said]


def test_names_are_the_same_in_every_worker() -> None:
    """They are made of the endpoint and the limit alone:
    another process finds the very same counter.
    """
    code = (
        "from redis_asgi.ratelimit.rules.endpoints import endpoint_name as name\n"
        "from redis_asgi.ratelimit.rules.policies import make_policies\n"
        "from redis_asgi import EmbeddingCacheMiddleware as a, RateLimit as b\n"
        "limits, ending = '5/minute; 1000000/366 days', '-{quota}-{window}s'\n"
        "made = [make_policies(name(one), limits, 'gcra', ending=ending) for one in (a, b)]\n"
        "print([policy.name for policies in made for policy in policies])"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]

    assert said[0] == said[1]
    assert "redis_asgi.ratelimit.route.RateLi" not in said[0]  # 40 letters are not enough for that and the numbers
    assert said[0].count("-5-60s") == said[0].count("-1000000-31622400s") == 2


def test_names_with_an_ending_fit_and_stay_apart() -> None:
    """The ending stays whole, and what had to be cut off the name stands in a digest."""
    ending = "-1000000000-31622400s"
    names = [
        fit_name(name, ending) for name in ("app.a", "app.view_of_everything_a", "app.view_of_everything_b", "x" * 99)
    ]

    assert names[0] == "app.a" + ending
    assert len(set(names)) == 4
    assert all(len(name) <= 40 and name.endswith(ending) for name in names)


async def test_neighbours_are_decided_together(memory_settings: Settings) -> None:
    """Whichever refuses, none is charged;
    the first in order is not used up by what the last one refuses.
    """
    app = FastAPI(dependencies=[Depends(RateLimit("10/minute", settings=memory_settings))])
    app.get("/", dependencies=[Depends(RateLimit("2/minute", settings=memory_settings))])(lambda: "x")

    async with client_of(app) as client:
        responses = [await client.get("/") for _ in range(6)]

    assert [200, 200, 429, 429, 429, 429] == [response.status_code for response in responses]
    assert ["r=8", "r=0"] == [member.split(";")[1] for member in responses[-1].headers["ratelimit"].split(", ")]


async def test_neighbours_share_one_trip(redis_url: str) -> None:
    """Three limits of a route are one question to Redis, and the request is counted once."""
    settings = Settings(REDIS_URL=redis_url)
    manager = RedisManager(settings)
    limits = [Depends(RateLimit(text, redis=manager)) for text in ("10/minute", "20/hour", "30/day")]
    app = FastAPI(dependencies=limits[:1])
    app.get("/", dependencies=limits[1:])(lambda: "x")
    with fresh_telemetry() as counted:
        assert [200] * 3 == await statuses(app, 3)
        counted.buffer.flush()
    samples = {
        sample.name: sample.value
        for metric in counted.redis_batch_size.collect()
        for sample in metric.samples
        if sample.name.endswith(("_count", "_sum"))
    }
    await manager.close()

    assert {3.0} == set(samples.values())


async def test_limit_behind_another_dependency_waits_for_it(memory_settings: Settings) -> None:
    """Who the user is is known only after the login dependency;
    what stands before it is charged by then.
    """

    def user(conn: HTTPConnection) -> str | None:
        return getattr(conn.state, "user", None)

    async def login(request: Request) -> None:
        if "user" not in request.query_params:
            raise FastAPIHTTPException(401)
        request.state.user = request.query_params["user"]

    app = FastAPI(dependencies=[Depends(RateLimit("9/minute", settings=memory_settings)), Security(login)])
    app.get("/", dependencies=[Depends(RateLimit("1/minute", partition_by=user, settings=memory_settings))])(
        lambda: "x"
    )

    async with client_of(app) as client:
        responses = [
            await client.get("/", params=params) for params in ({}, {"user": "a"}, {"user": "a"}, {"user": "b"})
        ]

    assert [401, 200, 429, 200] == [response.status_code for response in responses]
    assert ["r=5", "r=0"] == [member.split(";")[1] for member in responses[-1].headers["ratelimit"].split(", ")]


async def test_overridden_dependency_is_left_out(memory_settings: Settings) -> None:
    """A test that puts nothing in the place of a limit is not limited by it, wherever it stands."""
    wide, tight = RateLimit("9/minute", settings=memory_settings), RateLimit("1/minute", settings=memory_settings)
    app = FastAPI(dependencies=[Depends(wide)])
    app.get("/", dependencies=[Depends(tight)])(lambda: "x")

    app.dependency_overrides[tight] = lambda: None
    assert [200] * 4 == await statuses(app, 4)
    app.dependency_overrides.clear()
    assert [200, 429] == await statuses(app, 2)
    app.dependency_overrides[wide] = lambda: None
    assert [429] == await statuses(app, 1)


async def test_overridden_neighbour_takes_its_own_limits_along(memory_settings: Settings) -> None:
    """What stands in for a dependency has not the limits of that one;
    an override elsewhere changes nothing.
    """

    def login(_: Annotated[None, Depends(RateLimit("1/minute", settings=memory_settings))]) -> None:
        """Limited by itself."""

    app = FastAPI(dependencies=[Depends(RateLimit("3/minute", settings=memory_settings))])
    app.get("/", dependencies=[Depends(login)])(lambda: "x")
    app.dependency_overrides[login] = lambda: None
    assert [200, 200] == await statuses(app, 2)

    app.dependency_overrides = {statuses: lambda: None}
    assert [200, 429, 429] == await statuses(app, 3)
    app.dependency_overrides = {login: lambda: None}
    # What was refused was charged to neither.
    assert [429] == await statuses(app, 1)


class _ForGuests(RateLimit):
    """A limit of somebody's that makes exceptions."""

    async def __call__(self, conn: HTTPConnection, response: Response) -> None:
        if "member" not in conn.query_params:
            await super().__call__(conn, response)


async def test_subclass_says_itself_whom_it_limits(memory_settings: Settings) -> None:
    """Its neighbours do not ask it before its turn has come."""
    guests = _ForGuests("1/minute", settings=memory_settings)
    app = FastAPI(dependencies=[Depends(RateLimit("9/minute", settings=memory_settings)), Depends(guests)])
    app.get("/", dependencies=[Depends(RateLimit("8/minute", settings=memory_settings))])(lambda: "x")

    assert [200] * 3 == await statuses(app, 3, "/?member")
    assert [200, 429] == await statuses(app, 2)


async def test_very_same_limit_is_charged_once(memory_settings: Settings) -> None:
    """One object twice, in or out of FastAPI's cache,
    and two objects that say the same: one counter, one unit.
    """
    one, other = RateLimit("3/minute", settings=memory_settings), RateLimit("3/minute", settings=memory_settings)
    app = FastAPI(dependencies=[Depends(one), Depends(one, use_cache=False)])
    app.get("/", dependencies=[Depends(other), Depends(one)])(lambda: "x")

    async with client_of(app) as client:
        responses = [await client.get("/") for _ in range(4)]

    assert [200, 200, 200, 429] == [response.status_code for response in responses]
    assert 1 == responses[0].headers["ratelimit"].count('"') // 2


@pytest.mark.parametrize("between", [False, True], ids=["neighbours", "apart"])
async def test_equal_names_with_different_quotas_are_one_too_many(memory_settings: Settings, between: bool) -> None:
    """At the first request, with both: neither would count what it says."""
    wide = RateLimit("9/minute", name="same", settings=memory_settings)
    tight = RateLimit("2/minute", name="same", settings=memory_settings)
    dependencies = [Depends(wide), *([Depends(lambda: None)] if between else []), Depends(tight)]
    app = FastAPI(dependencies=dependencies)
    app.get("/")(lambda: "x")

    with pytest.raises(ConfigurationError, match=r"name='same' stands for two limits.*9/60 s.*2/60 s"):
        await statuses(app, 1)


async def test_route_named_like_a_rule_of_the_middleware_is_one_too_many(memory_settings: Settings) -> None:
    """The middleware's `default` at another quota."""
    app = FastAPI()
    app.get("/", dependencies=[Depends(RateLimit("2/minute", name="default"))])(lambda: "x")

    with pytest.raises(ConfigurationError, match="name='default'"):
        await statuses(RateLimitMiddleware(app, "9/minute", settings=memory_settings), 1)


async def test_each_is_asked_once(memory_settings: Settings) -> None:
    """A callable of a limit that stands further down is asked once a request,
    also where it says "not limited".
    """
    asked: list[str] = []

    def plan(name: str, said: str | None) -> Callable[[HTTPConnection], str | None]:
        def limits(_: HTTPConnection) -> str | None:
            asked.append(name)
            return said

        return limits

    app = FastAPI(dependencies=[Depends(RateLimit(plan("a", None), settings=memory_settings))])
    app.get("/", dependencies=[Depends(RateLimit(plan("b", None), settings=memory_settings))])(lambda: "x")
    app.get("/two", dependencies=[Depends(RateLimit(plan("c", "5/minute"), settings=memory_settings))])(lambda: "x")

    await statuses(app, 1)
    await statuses(app, 2, "/two")

    assert ["a", "b", "a", "c", "a", "c"] == asked


async def test_quota_that_changes_keeps_its_counter(memory_settings: Settings) -> None:
    """A callable's quota may be another one each time: what was used stays used."""
    quotas = iter(range(12, 2, -1))
    app = FastAPI(dependencies=[Depends(RateLimit(lambda _conn: f"{next(quotas)}/minute", settings=memory_settings))])
    app.get("/")(lambda: "x")

    assert [200] * 6 + [429] * 4 == await statuses(app, 10)


async def test_plans_stacked_are_told_apart_by_their_place(memory_settings: Settings) -> None:
    """Callables have no numbers to be named by: each has a counter of its own,
    whatever they say, equal or not.
    """

    def plan(text: str) -> RateLimit:
        return RateLimit(lambda _conn: text, settings=memory_settings)

    app = FastAPI(dependencies=[Depends(plan("9/minute"))])
    app.get("/", dependencies=[Depends(plan("5/minute")), Security(lambda: None), Depends(plan("9/minute"))])(
        lambda: "x"
    )

    @rate_limit(lambda _conn: "9/minute", settings=memory_settings)
    @counting
    @rate_limit(lambda _conn: "9/minute", settings=memory_settings)
    @rate_limit(lambda _conn: "7/minute; 9/hour", settings=memory_settings)
    async def decorated(request: Request) -> Response:
        return PlainTextResponse("x")

    starlette = Starlette(routes=[Route("/", decorated)])
    found = []
    for one in (app, starlette):
        async with client_of(one) as client:
            found.append((await client.get("/")).headers["ratelimit"].split(", "))

    assert [["r=8", "r=4", "r=8"], ["r=8", "r=8", "r=6", "r=8"]] == [
        [member.split(";")[1] for member in members] for members in found
    ]
    assert [3, 4] == [len({member.split(";")[0] for member in members}) for members in found]


async def test_limits_on_two_redis_are_decided_in_turn(memory_settings: Settings) -> None:
    """What one server has charged stays charged when the other refuses; nothing is atomic over two."""
    elsewhere = memory(REDIS_KEY_PREFIX=own_prefix())
    app = FastAPI(dependencies=[Depends(RateLimit("9/minute", settings=memory_settings))])
    tight = RateLimit("1/minute", settings=elsewhere, redis=RedisManager(elsewhere))
    app.get("/", dependencies=[Depends(tight)])(lambda: "x")

    async with client_of(app) as client:
        responses = [await client.get("/") for _ in range(3)]

    assert [200, 429, 429] == [response.status_code for response in responses]
    assert ["r=6", "r=0"] == [member.split(";")[1] for member in responses[-1].headers["ratelimit"].split(", ")]


async def test_websocket_routes_of_fastapi_are_stacked_too(memory_settings: Settings) -> None:
    """A handshake is put to all limits in front of its endpoint."""
    app = FastAPI(dependencies=[Depends(RateLimit("9/minute", settings=memory_settings))])

    @app.websocket("/", dependencies=[Depends(RateLimit("2/minute", settings=memory_settings))])
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    sent = [await drive(app, websocket_scope(), {"type": "websocket.connect"}) for _ in range(3)]

    assert ["websocket.accept"] * 2 + ["websocket.close"] == [messages[0]["type"] for messages in sent]


async def test_websocket_routes_of_included_routers_are_limited(memory_settings: Settings) -> None:
    """Whether or not its neighbours can be found there."""
    router = APIRouter(dependencies=[Depends(RateLimit("9/minute", settings=memory_settings))])

    @router.websocket("/", dependencies=[Depends(RateLimit("2/minute", settings=memory_settings))])
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    app = FastAPI(dependencies=[Depends(RateLimit("7/minute", settings=memory_settings))])
    app.include_router(router, prefix="/v1")
    sent = [await drive(app, websocket_scope(path="/v1/"), {"type": "websocket.connect"}) for _ in range(3)]

    assert ["websocket.accept"] * 2 + ["websocket.close"] == [messages[0]["type"] for messages in sent]


async def test_mounted_app_has_its_own_stack(memory_settings: Settings) -> None:
    """Dependencies of the outer app are not those of an app mounted in it."""
    inner = FastAPI(dependencies=[Depends(RateLimit("9/minute", settings=memory_settings))])
    inner.get("/", dependencies=[Depends(RateLimit("2/minute", settings=memory_settings))])(lambda: "x")
    app = FastAPI(dependencies=[Depends(RateLimit("1/minute", settings=memory_settings))])
    app.mount("/inner", inner)

    assert [200, 200, 429] == await statuses(app, 3, "/inner/")


def counting(endpoint: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    """A decorator of somebody's, which keeps the name and whatever else the endpoint has."""

    @functools.wraps(endpoint)
    async def counted(*args: Any, **kwargs: Any) -> Response:
        response = await endpoint(*args, **kwargs)
        response.headers["x-counted"] = "yes"
        return response

    return counted


async def test_stacked_decorators_are_decided_together(memory_settings: Settings) -> None:
    """Right on each other both are charged or none;
    through another decorator in turn, and that one still runs.
    """

    @rate_limit("9/minute", settings=memory_settings)
    @rate_limit("2/minute", settings=memory_settings)
    async def stacked(request: Request) -> Response:
        return PlainTextResponse("x")

    @rate_limit("9/minute", settings=memory_settings)
    @counting
    @rate_limit("2/minute", settings=memory_settings)
    async def apart(request: Request) -> Response:
        return PlainTextResponse("x")

    app = Starlette(routes=[Route("/stacked", stacked), Route("/apart", apart)])
    async with client_of(app) as client:
        found = {path: [await client.get(path) for _ in range(4)] for path in ("/stacked", "/apart")}

    remaining = {}
    for path, responses in found.items():
        assert [200, 200, 429, 429] == [response.status_code for response in responses]
        remaining[path] = [member.split(";")[1] for member in responses[-1].headers["ratelimit"].split(", ")]
    assert {"/stacked": ["r=7", "r=0"], "/apart": ["r=5", "r=0"]} == remaining
    assert "yes" == found["/apart"][0].headers["x-counted"]


async def test_all_of_a_group_fail_closed_if_one_does() -> None:
    """Redis is gone: what is decided together is answered together."""
    settings = Settings(REDIS_URL="redis://127.0.0.1:9", RATE_LIMIT_TIMEOUT=0.2)
    app = FastAPI(dependencies=[Depends(RateLimit("9/minute", settings=settings))])
    app.get("/", dependencies=[Depends(RateLimit("9/minute", on_redis_error="closed", settings=settings, name="c"))])(
        lambda: "x"
    )

    assert [503, 503] == await statuses(app, 2)
