"""Rules: what they cover, what they become, and what they refuse to be."""

import asyncio
import itertools
import logging
from typing import Any, cast

import pytest
from starlette.requests import HTTPConnection
from starlette.types import Scope

from redis_asgi import ConfigurationError, Rule, Settings, by_header
from redis_asgi.asgi.paths import spellings
from redis_asgi.asgi.scope import Addressing
from redis_asgi.ratelimit.limits.policy import PolicySet
from redis_asgi.ratelimit.rules.checks import check_cost
from redis_asgi.ratelimit.rules.compiled import CompiledRule, compile_rules
from redis_asgi.ratelimit.rules.plan import PlanCache, charges_kept
from redis_asgi.ratelimit.rules.policies import make_policies
from redis_asgi.settings import StrategyName

SETTINGS = Settings(REDIS_URL="memory://")


def compiled(rule: Rule, settings: Settings = SETTINGS, **changes: Any) -> CompiledRule:
    """*rule* as a middleware has it."""
    options: dict[str, Any] = {"strategy": "fixed-window", "on_redis_error": "local"}
    return CompiledRule(rule, settings, Addressing(settings), **(options | changes))


def compile_all(limits: Any = None, rules: Any = None, settings: Settings = SETTINGS, **changes: Any) -> Any:
    """The rules of a middleware with these arguments."""
    options: dict[str, Any] = {"strategy": None, "on_redis_error": None, "partition_by": None}
    return compile_rules(limits, rules, settings, Addressing(settings), **(options | changes))


def request(method: str = "GET", path: str = "/", *, root: str = "", headers: Any = ()) -> Scope:
    """An ASGI scope; the method ``WEBSOCKET`` makes it a handshake."""
    scope: Scope = {"type": "http", "method": method, "path": root + path, "root_path": root, "headers": list(headers)}
    if method == "WEBSOCKET":
        scope["type"] = "websocket"
        del scope["method"]
    return scope


async def policies_of(rule: CompiledRule, scope: Scope) -> PolicySet | None:
    """Which policies a request is put to."""
    charges = await PlanCache(Addressing(SETTINGS), charges_kept(SETTINGS)).of((rule,)).charges(scope)
    return charges[0].policies if charges else None


def covers(rule: Rule, scope: Scope) -> bool:
    """Whether *rule* is asked about that request."""
    return compiled(rule).covers(scope, spellings(scope["path"], (scope["root_path"],) if scope["root_path"] else ()))


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("/api", "/api", True),
        ("/api", "/api/", True),
        ("/api/", "/api", True),
        ("/api", "/api/x", False),
        ("/api", "/API", False),
        ("/api", "/apis", False),
        ("/api/*", "/api", True),
        ("/api/*", "/api/", True),
        ("/api/*", "/api/a/b", True),
        ("/api/*", "/apis", False),
        ("/api*", "/apis/x", True),
        ("/*/items", "/v1/items", True),
        ("/*/items", "/v1/deep/items", True),
        ("/*/items", "/items", False),
        ("*", "/", True),
        ("*.png", "/a/b.png", True),
        ("*.png", "/a/b.pngx", False),
        ("/a*b*c", "/a-b-b-c", True),
        ("/a*b*c", "/a-c-b", False),
        ("/", "/", True),
        ("/", "/a", False),
        ("/[a-z]", "/b", False),
        ("/[a-z]", "/[a-z]", True),
        ("/a.c", "/abc", False),
        ("/a?", "/ab", False),
        ("/größe", "/größe", True),
    ],
)
def test_pattern_covers_paths(pattern: str, path: str, expected: bool) -> None:
    """``*`` is any run of characters, ``/`` included; nothing else is special,
    case counts, a last slash does not.
    """
    assert expected == covers(Rule("5/minute", paths=pattern), request(path=path))


@pytest.mark.parametrize(
    ("methods", "asked"),
    [
        pytest.param(None, {"GET", "HEAD", "POST", "OPTIONS", "WEBSOCKET"}, id="none named"),
        pytest.param(["GET"], {"GET", "HEAD"}, id="get covers head"),
        pytest.param(["HEAD"], {"HEAD"}, id="head is head"),
        pytest.param("post", {"POST"}, id="lower case, alone"),
        pytest.param(["POST", "GET"], {"GET", "HEAD", "POST"}, id="two"),
        pytest.param(["OPTIONS"], {"OPTIONS", "PREFLIGHT"}, id="options covers preflights"),
        pytest.param(["WEBSOCKET"], {"WEBSOCKET"}, id="handshakes"),
    ],
)
@pytest.mark.parametrize("paths", [None, "/api/*"])
def test_methods_covered(methods: Any, asked: set[str], paths: str | None) -> None:
    """GET covers HEAD, a preflight is counted only where OPTIONS is named,
    a handshake is its own method.
    """
    preflight = [(b"origin", b"https://a.example"), (b"access-control-request-method", b"POST")]
    scopes = {method: request(method, "/api/x") for method in ("GET", "HEAD", "POST", "OPTIONS", "WEBSOCKET")}
    scopes["PREFLIGHT"] = request("OPTIONS", "/api/x", headers=preflight)

    rule = Rule("5/minute", methods=methods, paths=paths)
    assert asked == {name for name, scope in scopes.items() if covers(rule, scope)}


@pytest.mark.parametrize(
    "path", ["/login\n", "//login", "/login//", "/login#x", "/x/../login", "http://x/login", "http:login", "*"]
)
def test_every_spelling_is_covered(path: str) -> None:
    """What some router takes for the rule's path."""
    assert covers(Rule("5/minute", paths="/login", methods="GET"), request(path=path))
    assert not covers(Rule("5/minute", paths="/login", methods="POST"), request(path=path))


def test_case_is_folded_when_told() -> None:
    """For frameworks whose routers do not tell it."""
    assert covers(Rule("5/minute", paths=["/Login", "/x"], case_sensitive=False), request(path="/LOGIN/"))
    assert not covers(Rule("5/minute", paths=["/Login", "/x"]), request(path="/LOGIN/"))


@pytest.mark.parametrize("method", ["post", "Post", "POST"])
def test_methods_are_covered_in_any_case(method: str) -> None:
    """Some servers pass them on as they are written, and some frameworks do not care."""
    assert covers(Rule("5/minute", methods="POST"), request(method))
    assert covers(Rule("5/minute", methods="POST", paths="/"), request(method))
    assert not covers(Rule("5/minute", methods="GET"), request(method))
    assert covers(Rule("5/minute", methods="GET"), request("head"))


@pytest.mark.parametrize(
    ("root", "path", "expected"),
    [("/service", "/api", True), ("", "/api", True), ("/service", "/other", False), ("", "/service/api", False)],
)
def test_patterns_are_below_root_path(root: str, path: str, expected: bool) -> None:
    """Mounted or behind a prefix, a rule means the app's own paths."""
    assert expected == covers(Rule("5/minute", paths="/api"), request(path=path, root=root))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"limits": ""}, "limits=''"),
        ({"limits": None}, "neither notation nor a callable"),
        ({"limits": 5}, "limits=5"),
        ({"limits": "5/minute; 9/60 seconds"}, "same window"),
        ({"name": "a b"}, "name='a b'"),
        ({"name": "x" * 41}, "1 to 40"),
        ({"name": 'x"'}, "name="),
        ({"paths": "api"}, "paths='api'"),
        ({"paths": ["/a", "b"]}, "paths='b'"),
        ({"paths": ()}, "covers nothing"),
        ({"paths": 5}, "paths=5"),
        ({"paths": "/items/{id}"}, r"paths='/items/\{id\}' .*: write /items/\*$"),
        ({"case_sensitive": "no"}, "case_sensitive='no'"),
        ({"methods": "GET POST"}, "methods='GET POST'"),
        ({"methods": []}, "covers nothing"),
        ({"methods": 5}, "methods=5"),
        ({"cost": -1}, "cost=-1"),
        ({"cost": "1"}, "cost='1'"),
        ({"cost": True}, "cost=True"),
        ({"cost": 1.5}, "cost=1.5"),
        ({"cost": 6}, "cost=6 is more than the quota of 5"),
        ({"limits": "100/hour; 5/minute", "cost": 50}, "more than the quota of 5"),
        ({"limits": "0/minute"}, "quota 0 is not between 1"),
        ({"strategy": "fast"}, "strategy='fast'"),
        ({"on_redis_error": "ignore"}, "on_redis_error='ignore'"),
        ({"partition_by": "ip"}, "partition_by='ip'"),
        ({"count_if": 200}, "count_if=200"),
    ],
)
def test_rule_that_cannot_work_is_refused(arguments: dict[str, Any], text: str) -> None:
    """While it is built, with the argument and its value."""
    with pytest.raises(ConfigurationError, match=text):
        Rule(**({"limits": "5/minute"} | arguments))


def test_rule_takes_its_options_by_name_only() -> None:
    """A list of ten positional arguments says nothing."""
    with pytest.raises(TypeError):
        cast(Any, Rule)("5/minute", "name")


def test_rule_is_frozen_and_comparable() -> None:
    """Rules are values, and one path is a tuple of one."""
    rule = Rule("5/minute", paths="/a", methods="get")

    assert rule == Rule("5/minute", paths=["/a"], methods=["GET"])
    assert (("/a",), ("GET",)) == (rule.paths, rule.methods)
    with pytest.raises(AttributeError):
        rule.limits = "6/minute"  # type: ignore[misc]  # what is tested


@pytest.mark.parametrize("cost", [0, 1, 10**12])
def test_whole_numbers_are_costs(cost: int) -> None:
    """Nothing and a great deal included."""
    assert cost == check_cost(cost)


@pytest.mark.parametrize(
    ("notation", "expected"),
    [
        ("5/minute", [("api", 5, 60)]),
        ("5/minute; 9/hour", [("api-60s", 5, 60), ("api-3600s", 9, 3600)]),
        ("9/hour; 5/minute", [("api-3600s", 9, 3600), ("api-60s", 5, 60)]),
    ],
)
def test_one_limit_has_the_rules_name_and_several_their_window_too(notation: str, expected: Any) -> None:
    """In the order written."""
    made = make_policies("api", notation, "gcra")

    assert expected == [(p.name, p.quota, p.window) for p in made]
    assert {"gcra"} == {p.strategy for p in made}


def test_policies_are_parsed_once() -> None:
    """Limits that depend on the request come from a bounded cache."""
    assert make_policies("api", "5/minute", "gcra") is make_policies("api", "5/minute", "gcra")
    assert make_policies.cache_info().maxsize == 4096


@pytest.mark.parametrize(
    ("strategy", "fits"), [("moving-window", False), ("gcra", True), ("sliding-window-counter", True)]
)
def test_moving_window_is_bounded(strategy: StrategyName, fits: bool) -> None:
    """One stamp per unit: ten thousand, and a hint what to use beyond."""
    assert 10_000 == make_policies("api", "10000/minute", strategy).policies[0].quota
    if fits:
        assert 10_001 == make_policies("api", "10001/minute", strategy).policies[0].quota
        return
    with pytest.raises(ConfigurationError, match="sliding-window-counter"):
        make_policies("api", "10001/minute", strategy)


def test_rule_wins_over_the_middleware() -> None:
    """What a rule leaves out is the middleware's."""
    plain = compiled(Rule("5/minute"), strategy="gcra", on_redis_error="open")
    own = compiled(
        Rule("5/minute", name="own", strategy="moving-window", on_redis_error="closed"),
        strategy="gcra",
        on_redis_error="open",
    )

    assert plain.policies is not None
    assert own.policies is not None
    assert ("default", "open", "gcra") == (plain.name, plain.on_redis_error, plain.policies.policies[0].strategy)
    assert ("own", "closed", "moving-window") == (own.name, own.on_redis_error, own.policies.policies[0].strategy)


@pytest.mark.parametrize(("shadow", "dry_run"), [(True, False), (False, True), (True, True)])
def test_dry_run_makes_every_policy_a_shadow(shadow: bool, dry_run: bool) -> None:
    """``RATE_LIMIT_DRY_RUN`` is ``shadow=True`` for all rules, dynamic ones included."""
    settings = Settings(REDIS_URL="memory://", RATE_LIMIT_DRY_RUN=dry_run)
    rule = compiled(Rule("5/minute; 9/hour", shadow=shadow), settings)

    assert rule.policies is not None
    assert [True, True] == [p.shadow for p in rule.policies]
    dynamic = compiled(Rule(lambda conn: "7/minute", shadow=shadow), settings)
    found = asyncio.run(policies_of(dynamic, request()))
    assert found is not None
    assert [True] == [p.shadow for p in found]


@pytest.mark.anyio
@pytest.mark.parametrize("is_async", [False, True])
async def test_limits_may_depend_on_the_request(*, is_async: bool) -> None:
    """A callable, sync or async, is asked each time;
    what it says is read under the rule's name and strategy.
    """

    async def later(conn: HTTPConnection) -> str | None:
        return limits(conn)

    def limits(conn: HTTPConnection) -> str | None:
        return {"gold": "1000/minute", "free": "5/minute; 20/hour"}.get(conn.headers.get("x-plan", ""))

    rule = compiled(Rule(later if is_async else limits, name="plan", strategy="gcra"))
    gold, free, none = [
        await policies_of(rule, request(headers=[(b"x-plan", plan)])) for plan in (b"gold", b"free", b"none")
    ]

    assert rule.policies is None
    assert gold is not None
    assert free is not None
    assert [("plan", 1000)] == [(p.name, p.quota) for p in gold]
    assert [("plan-60s", 5), ("plan-3600s", 20)] == [(p.name, p.quota) for p in free]
    assert none is None


def plans(*said: Any, **options: Any) -> CompiledRule:
    """A rule whose callable says one thing after the other; whose plan it is stands in a header."""
    saying = iter(said)
    return compiled(Rule(lambda _conn: next(saying), name="plan", partition_by=by_header("x-key"), **options))


async def quotas_of(rule: CompiledRule, keys: str) -> "list[list[int] | None]":
    """The quotas that each client in turn is held to."""
    found = [await policies_of(rule, request(headers=[(b"x-key", key.encode())])) for key in keys]
    return [[policy.quota for policy in one] if one is not None else None for one in found]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "said",
    ["often", "", "5/minute; 9/60 seconds", "5/0 minutes", "-1/minute", "9" * 5000, 5, ["5/minute"], b"5/minute", True],
)
async def test_limits_that_nobody_can_read_are_the_last_readable_ones(
    said: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The client's own, else the default ones, never another client's;
    said once, with the rule and why.
    """
    rule = plans("7/minute", said, said, "8/minute; 9/hour", said, None, said, "0/minute", said)
    with caplog.at_level(logging.WARNING, "redis_asgi"):
        quotas = await quotas_of(rule, "aabaaaaaa")

    assert [[7], [7], [100], [8, 9], [8, 9], None, [8, 9], [0], [0]] == quotas
    assert [("limits_unreadable", "plan")] == [(r.__dict__["code"], r.__dict__["rule"]) for r in caplog.records]
    assert len(caplog.records[0].__dict__["fix"]) < 500


@pytest.mark.anyio
async def test_readable_limits_of_many_clients_are_not_all_remembered() -> None:
    """Ten thousand are; who changed them longest ago is forgotten, and then has the default ones."""
    said = itertools.chain(itertools.repeat("7/minute", 10_001), itertools.repeat("", 2))
    rule = compiled(Rule(lambda _conn: next(said), partition_by=by_header("x-key")))
    keys = [str(i) for i in range(10_001)]
    found = [await policies_of(rule, request(headers=[(b"x-key", key.encode())])) for key in (*keys, "0", "1")]

    assert [100, 7] == [policies.policies[0].quota for policies in found[-2:] if policies]


@pytest.mark.anyio
@pytest.mark.parametrize("size", [8, 300, 30_000, 60_000])
async def test_what_is_kept_of_made_up_identities_is_bounded(size: int) -> None:
    """However long they are, and whether or not the cost is asked for each time: at most two
    generations.
    """
    rule = compiled(Rule("5/minute", partition_by=by_header("x-key"), cost=lambda _: 1))
    cache = PlanCache(Addressing(SETTINGS), charges_kept(SETTINGS))
    plan = cache.of((rule,))

    for i in range(1200):
        charges = await plan.charges(request(headers=[(b"x-key", (b"%d" % i).zfill(size))]))
        cache.priced(charges, [1])

    kept = [*cache.charges.young.values(), *cache.charges._old.values()]
    values = {id(charge.partition.value): charge.partition.value for charges in kept for charge in charges}
    assert sum(map(len, values.values())) <= 2 * 16_000_000 / 4
    assert size > 30_000 or values


@pytest.mark.anyio
async def test_default_limits_fit_the_strategy() -> None:
    """A moving window keeps a stamp per unit,
    so that of a large default quota it has as much as it can.
    """
    settings = Settings(REDIS_URL="memory://", RATE_LIMITS="50000/minute; 9/hour")
    rule = compiled(Rule(lambda _conn: "", strategy="moving-window"), settings)

    assert [[10_000, 9]] == await quotas_of(rule, "a")


@pytest.mark.parametrize(
    ("limits", "rules", "names"),
    [
        pytest.param(None, None, ["default"], id="the environment's"),
        pytest.param("5/minute", None, ["default"], id="limits"),
        pytest.param(None, [Rule("5/minute")], ["default"], id="an only rule needs no name"),
        pytest.param(None, [Rule("5/minute", name="a"), Rule("5/minute", name="b")], ["a", "b"], id="rules"),
        pytest.param("5/minute", [Rule("5/minute", name="a")], ["default", "a"], id="limits and rules"),
        pytest.param("5/minute", [], ["default"], id="limits and no rules"),
    ],
)
def test_limits_and_rules_replace_the_environment(limits: Any, rules: Any, names: list[str]) -> None:
    """``limits`` is the rule ``default``, ``rules`` are added to it,
    and without both the settings decide.
    """
    assert names == [rule.name for rule in compile_all(limits, rules)]


def test_environment_decides_without_arguments() -> None:
    """``RATE_LIMITS``, ``RATE_LIMIT_STRATEGY``, ``RATE_LIMIT_ON_REDIS_ERROR``."""
    settings = Settings(
        REDIS_URL="memory://",
        RATE_LIMITS="7/minute; 9/hour",
        RATE_LIMIT_STRATEGY="gcra",
        RATE_LIMIT_ON_REDIS_ERROR="closed",
    )
    (rule,) = compile_all(settings=settings)

    assert [(7, "gcra"), (9, "gcra")] == [(p.quota, p.strategy) for p in rule.policies]
    assert "closed" == rule.on_redis_error


@pytest.mark.parametrize(
    ("limits", "rules", "text"),
    [
        pytest.param("5/minute", [Rule("5/minute")], "needs a name", id="two rules, one without a name"),
        pytest.param(None, [Rule("1/minute", name="a"), Rule("5/minute", name="a")], "name='a'", id="same name"),
        pytest.param("5/minute", [Rule("5/minute", name="default")], "name='default'", id="the name of limits"),
        pytest.param(
            None,
            [Rule("1/minute; 2/hour", name="a"), Rule("5/minute", name="a-60s")],
            "name='a-60s' is that of a policy of the rule 'a'",
            id="a policy's name",
        ),
        pytest.param(
            "1/minute",
            [Rule(concurrency=5, name="default-7s")],
            "would be reset with it",
            id="the name of a policy to come",
        ),
        pytest.param(
            None,
            [Rule(lambda _conn: "1/minute; 2/hour", name="a"), Rule("5/minute", name="a-60s")],
            "is that of a policy of the rule 'a'",
            id="what a callable may name",
        ),
        pytest.param(None, [], "limits nothing", id="no rules at all"),
        pytest.param(None, iter(()), "limits nothing", id="no rules in an iterator"),
        pytest.param(None, ["5/minute"], "no Rule", id="not a rule"),
        pytest.param("10001/minute", [], "at most 10000", id="moving window too wide"),
    ],
)
def test_rules_that_would_meet_are_refused(limits: Any, rules: Any, text: str) -> None:
    """Two rules never share a counter by accident."""
    with pytest.raises(ConfigurationError, match=text):
        compile_all(limits, rules, strategy="moving-window")


@pytest.mark.parametrize("changes", [{"strategy": "fast"}, {"on_redis_error": "ignore"}, {"partition_by": "ip"}])
def test_bad_default_is_named(changes: dict[str, Any]) -> None:
    """Arguments of the middleware are checked like a rule's."""
    with pytest.raises(ConfigurationError, match=next(iter(changes))):
        compile_all("5/minute", **changes)


@pytest.mark.parametrize(
    ("limits", "strategy", "warned"),
    [
        ("9/minute", "sliding-window-counter", ["default"]),
        ("10/minute", "sliding-window-counter", []),
        ("5/minute; 50/hour", "sliding-window-counter", ["default-60s"]),
        ("9/minute", "gcra", []),
    ],
)
def test_small_quotas_of_the_sliding_counter_are_warned_about(
    caplog: pytest.LogCaptureFixture, limits: str, strategy: str, warned: list[str]
) -> None:
    """Its clients wait noticeably longer than the window then;
    the line says how long and what to use.
    """
    with caplog.at_level(logging.WARNING, "redis_asgi"):
        compile_all(limits, strategy=strategy)

    assert warned == [record.__dict__["policy"] for record in caplog.records]
    assert all("gcra" in record.__dict__["fix"] for record in caplog.records)


@pytest.mark.anyio
async def test_small_quotas_of_dynamic_limits_are_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    """They are known from the first request on that gets one,
    and a line for each request would be a flood.
    """
    notations = iter(["10/minute", "9/minute", "8/minute"])
    rule = compiled(Rule(lambda conn: next(notations)), strategy="sliding-window-counter")
    with caplog.at_level(logging.WARNING, "redis_asgi"):
        for _ in range(3):
            await policies_of(rule, request())

    assert ["default"] == [record.__dict__["policy"] for record in caplog.records]
    assert "quota of 9 " in caplog.records[0].__dict__["fix"]
