"""The command line with ``--app``: what limits an app,
and what is said of one that cannot be looked at.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from typer.testing import CliRunner, Result

from redis_asgi import RateLimiter, RedisManager, Settings
from redis_asgi.cli.commands import app as command_line
from redis_asgi.inspection.quotas import partition_of
from redis_asgi.keys import embedding_epoch_key

from ..conftest import StartServer
from ..kit.servers import ExternalServer

PASSWORD = "s3cr3t-of-a-test"
Invoke = Callable[..., Result]

SHOP = """
from fastapi import Depends, FastAPI
from redis_asgi import RateLimit, RateLimitMiddleware, Rule, by_header

print("imported")
app = FastAPI()
app.add_middleware(
    RateLimitMiddleware,
    limits="100/minute",
    rules=[
        Rule("5/minute", name="login", paths="/login", methods="POST"),
        Rule("10/second; 50/minute", name="keys", paths="/api/*", partition_by=by_header("X-API-Key")),
        Rule(lambda conn: "3/minute", name="plan", paths="/plan", shadow=True),
    ],
    exempt="/static/*",
)

@app.get("/story", dependencies=[Depends(RateLimit("2/minute"))])
async def story(): ...

def make():
    return app
"""


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Invoke:
    """The command line in a directory with an app in ``shop.py``:
    ``invoke("rules", "--app", "shop:app")``.
    """
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: str, text: str | None = None, **env: str) -> Result:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        known = set(sys.modules)
        try:
            result = CliRunner().invoke(command_line, list(arguments), input=text)
        finally:
            # What is in this directory is another module in the next test.
            for name in set(sys.modules) - known:
                if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
                    del sys.modules[name]
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


def count(settings: Settings, client: str, by: str, limits: str, name: str, cost: int = 1) -> None:
    """Count a request of *client* as a middleware of these settings does."""

    async def consume() -> None:
        manager = RedisManager(settings)
        decision = await RateLimiter(manager).consume(
            await partition_of(client, by, settings), limits, name=name, cost=cost
        )
        await manager.close()
        assert decision.source == "redis"

    anyio.run(consume)


# rules


def test_rules(invoke: Invoke) -> None:
    """Every rule and every route's limit has a line; what the app prints is no part of the result."""
    result = invoke("rules", "--app", "shop:app", REDIS_URL="redis://127.0.0.1:1")
    lines = [line.split() for line in result.stdout.splitlines()]

    assert 0 == result.exit_code
    assert ["rule", "default", "login", "keys", "plan", "shop.story"] == [line[0] for line in lines]
    assert "login 5/minute ip fixed-window 1 POST /login local" == " ".join(lines[2])
    assert "plan ? ip fixed-window 1 all /plan local only watches" == " ".join(lines[4])
    assert "shop.story 2/minute ip fixed-window 1 GET /story local" == " ".join(lines[5])
    assert ["imported", "Where the limits are ?, a callable says them for each request."] == result.stderr.splitlines()


@pytest.mark.parametrize(
    ("arguments", "names", "exempt"),
    [
        (("--path", "/login"), ["default"], False),
        (("--path", "/login", "--method", "post"), ["default", "login"], False),
        (("--path", "/api/x"), ["default", "keys"], False),
        (("--path", "//api//x/"), ["default", "keys"], False),
        (("--path", "/story"), ["default", "shop.story"], False),
        (("--path", "/story", "--method", "POST"), ["default"], False),
        (("--path", "/static/x"), [], True),
        (("--method", "post"), ["default", "login", "keys", "plan"], False),
        (("--method", "HEAD"), ["default", "keys", "plan", "shop.story"], False),
    ],
)
def test_rules_of_a_path(arguments: tuple[str, ...], names: list[str], exempt: bool, invoke: Invoke) -> None:
    """What applies to a request, in machines' words."""
    result = invoke("rules", "--app", "shop:app", *arguments, "--json", REDIS_URL="redis://127.0.0.1:1")
    told = json.loads(result.stdout)

    assert (names, exempt) == ([rule["name"] for rule in told["rules"]], told["exempt"])
    assert all(rule["redis"] == "'redis://127.0.0.1:1'" for rule in told["rules"])


def test_rules_of_nothing(invoke: Invoke) -> None:
    """A path that nothing limits is told as one, and so is one that is exempt."""
    result = invoke("rules", "--app", "shop:make()", "--path", "/static/x")

    assert (0, "Nothing limits GET /static/x.\n") == (result.exit_code, result.stdout)
    assert "exempt" in result.stderr
    assert "--path='x' does not begin with a slash" in invoke("rules", "--app", "shop:app", "--path", "x").stderr
    misspelt = invoke("rules", "--app", "shop:app", "--method", "GTE")
    assert (2, True) == (misspelt.exit_code, "--method='GTE' is not an HTTP method. Did you mean" in misspelt.stderr)


SPEAKING = """
from fastapi import Depends, FastAPI
from redis_asgi import RateLimit, RateLimitMiddleware
from starlette.routing import Mount

inner = RateLimitMiddleware(FastAPI(), limits="7/minute", dialect="anthropic")
app = FastAPI(routes=[Mount("/models", inner)])
app.add_middleware(RateLimitMiddleware, limits="100/minute", dialect={"/v1/tools": "mcp", "/v1/*": "openai"})

@app.get("/v1/tools", dependencies=[Depends(RateLimit("2/minute", name="tools"))])
async def tools(): ...

@app.get("/plain", dependencies=[Depends(RateLimit("2/minute", name="plain"))])
async def plain(): ...
"""


def test_rules_show_their_dialect(invoke: Invoke) -> None:
    """By the paths it holds on, for each middleware as seen from outside,
    and for a route's limit that of its path.
    """
    Path("speaking.py").write_text(SPEAKING)
    told = json.loads(invoke("rules", "--app", "speaking:app", "--json").stdout)["rules"]
    shown = invoke("rules", "--app", "speaking:app").stdout.splitlines()
    of_path = json.loads(invoke("rules", "--app", "speaking:app", "--path", "/v1/chat", "--json").stdout)["rules"]

    assert [
        ("default", {"/v1/tools": "mcp", "/v1/*": "openai"}),
        ("default", {"/models/*": "anthropic"}),
        ("tools", {"/v1/tools": "mcp"}),
        ("plain", {}),
    ] == [(rule["name"], rule["dialects"]) for rule in told]
    assert ["dialect"] == shown[0].split()[-1:]
    assert "/v1/tools: mcp, /v1/*: openai" in shown[1]
    assert [{"/v1/*": "openai"}] == [rule["dialects"] for rule in of_path]


# an app that cannot be looked at

MISTAKES = [
    pytest.param("shop", "", "is not module:attribute. Try --app main:app", id="no attribute"),
    pytest.param("shop:", "", "is not module:attribute", id="an empty attribute"),
    pytest.param("shop.py:app", "", "There is no module 'shop.py'", id="a file"),
    pytest.param("shopp:app", "", "There is no module 'shopp' in ", id="no such module"),
    pytest.param("shopp.main:app", "", "There is no module 'shopp' in ", id="no such package"),
    pytest.param("shop:ap", "", "'shop' has no 'ap'. Did you mean app?", id="no such attribute"),
    pytest.param("shop:FastAPI", "", "is no ASGI app but type", id="a class"),
    pytest.param("shop:make", "", "takes no request. If it makes the app: --app 'shop:make()'", id="a factory"),
    pytest.param("bad:app", "app = 7", "is no ASGI app but int", id="a number"),
    pytest.param("bad:app()", "app = 7", "is no ASGI app but int", id="a number that is called"),
    pytest.param("bad:app", "import absent_of_all", "failed at bad.py:1: ModuleNotFoundError: ", id="what it imports"),
    pytest.param("bad:app", "app = (", "bad.py:1: SyntaxError", id="a syntax error"),
    pytest.param("bad:app", "raise SystemExit(3)", "failed at bad.py:1: SystemExit: 3", id="an exit"),
    pytest.param("bad:app", "x = 1\n{}['DATABASE']", "failed at bad.py:2: KeyError: 'DATABASE'", id="a missing key"),
    pytest.param(
        "bad:app",
        f"raise OSError('postgres://app:{PASSWORD}@db is down')",
        "failed at bad.py:1: OSError: postgres://***@db is down",
        id="a password in what it says",
    ),
    pytest.param(
        "bad:app",
        "from redis_asgi import Settings\nSettings(REDIS_PORT='x', REDIS_DB='y')",
        "Error: importing 'bad' failed at bad.py:2: ConfigurationError: REDIS_DB='y'",
        id="its settings",
    ),
    pytest.param(
        "bad:app()",
        "def app():\n    raise RuntimeError('no')",
        "calling app() failed at bad.py:2: RuntimeError: no",
        id="a factory that fails",
    ),
    pytest.param(
        "bad:app",
        "from starlette.applications import Starlette\nfrom redis_asgi import RateLimitMiddleware\n"
        "app = Starlette()\napp.add_middleware(RateLimitMiddleware, limits='often')",
        "building the app's middlewares failed: ConfigurationError: limits='often'",
        id="a limit",
    ),
    pytest.param(
        "bad:app",
        "from starlette.applications import Starlette\napp = Starlette()",
        "Nothing limits this app. It has no RateLimitMiddleware",
        id="no limits",
    ),
]


@pytest.mark.parametrize(("name", "code", "says"), MISTAKES)
def test_an_app_that_cannot_be_looked_at(name: str, code: str, says: str, invoke: Invoke, tmp_path: Path) -> None:
    """What is wrong and where, in lines and not as a traceback, with exit code 2."""
    (tmp_path / "bad.py").write_text(code)
    for command in (["rules"], ["peek", "1.2.3.4"], ["reset", "1.2.3.4"]):
        result = invoke(*command, "--app", name, REDIS_URL="redis://127.0.0.1:1")

        assert (2, "") == (result.exit_code, result.stdout), result.output
        assert says in result.stderr
        assert "Traceback" not in result.stderr
        assert PASSWORD not in result.stderr


def test_check_of_an_app_that_cannot_be_looked_at(invoke: Invoke, tmp_path: Path) -> None:
    """For a gate it is a finding as any other."""
    (tmp_path / "bad.py").write_text("raise OSError('no')")
    result = invoke("check", "--app", "bad:app", "--json")
    (finding,) = json.loads(result.stdout)["findings"]

    assert (1, "app", "fail") == (result.exit_code, finding["check"], finding["level"])
    assert "importing 'bad' failed at bad.py:1: OSError: no" == finding["text"]


# peek and reset


def test_peek_knows_all_quotas(redis_server: ExternalServer, invoke: Invoke) -> None:
    """Of what is stored and of what is not, with what is counted by something else told."""
    settings = Settings(REDIS_URL=redis_server.url)
    count(settings, "192.0.2.1", "ip", "5/minute", "login", cost=3)
    count(settings, "192.0.2.1", "ip", "9/minute", "gone")
    result = invoke("peek", "192.0.2.1", "--app", "shop:app", "--json", REDIS_URL=redis_server.url)
    rows = {row["policy"]: (row["used"], row["quota"]) for row in json.loads(result.stdout)["policies"]}
    shown = invoke("peek", "192.0.2.1", "--app", "shop:app").stderr
    one = json.loads(invoke("peek", "192.0.2.1", "--app", "shop:app", "--name", "login", "--json").stdout)

    assert {"default": (0, 100), "login": (3, 5), "gone": (1, None), "shop.story-2-60s": (0, 2)} == rows
    assert "Other rules count by header:x-api-key: see --by." in shown
    assert "it is no limit of the app any more, or a callable says it" in shown
    assert ["login"] == [row["policy"] for row in one["policies"]]


@pytest.mark.parametrize("name", ["shop.story", "shop.story-2-60s"])
def test_a_routes_limit_has_the_name_that_rules_shows(name: str, redis_server: ExternalServer, invoke: Invoke) -> None:
    """And those of its counters, in which its quota is."""
    count(Settings(REDIS_URL=redis_server.url), "192.0.2.1", "ip", "2/minute", "shop.story-2-60s")
    count(Settings(REDIS_URL=redis_server.url), "192.0.2.1", "ip", "5/minute", "login")
    arguments = ("192.0.2.1", "--app", "shop:app", "--name", name)
    seen = json.loads(invoke("peek", *arguments, "--json", REDIS_URL=redis_server.url).stdout)["policies"]
    was_reset = invoke("reset", *arguments)
    left = json.loads(invoke("peek", "192.0.2.1", "--json").stdout)["policies"]

    assert [("shop.story-2-60s", 1, 2)] == [(row["policy"], row["used"], row["quota"]) for row in seen]
    assert "has its full quota again" in was_reset.stdout
    assert ["login"] == [row["policy"] for row in left]


@pytest.mark.parametrize("command", ["peek", "reset"])
def test_a_rule_that_the_app_does_not_have(command: str, redis_server: ExternalServer, invoke: Invoke) -> None:
    """It is told, unless something is counted under its name still;
    one that nobody has used is fine.
    """
    arguments = (command, "192.0.2.1", "--app", "shop:app", "--name")
    unknown = invoke(*arguments, "lgoin", REDIS_URL=redis_server.url)
    count(Settings(REDIS_URL=redis_server.url), "192.0.2.1", "ip", "9/minute", "gone")

    assert (2, True) == (
        unknown.exit_code,
        "--name='lgoin' is no rule of this app, which has default, login, keys, plan, shop.story." in unknown.stderr,
    )
    assert [0, 0, 0] == [invoke(*arguments, name).exit_code for name in ("login", "plan-60s", "gone")]


STREAMS = """
from fastapi import FastAPI
from redis_asgi import RateLimitMiddleware, Rule

app = FastAPI()
rules = [Rule(concurrency=4, name="streams", paths="/chat"), Rule(concurrency=lambda conn: 2, name="plans")]
app.add_middleware(RateLimitMiddleware, rules=rules)
"""


def test_what_is_in_flight(redis_server: ExternalServer, invoke: Invoke, tmp_path: Path) -> None:
    """Rules say how many, `peek` how many there are,
    and `reset` forgets them until their workers say so again.
    """
    (tmp_path / "chat.py").write_text(STREAMS)
    result = invoke("rules", "--app", "chat:app", "--json", REDIS_URL=redis_server.url)
    told = [(rule["name"], rule["limits"], rule["strategy"]) for rule in json.loads(result.stdout)["rules"]]
    assert [("streams", "4 in flight", "concurrency"), ("plans", None, "concurrency")] == told
    assert "4 in flight" in invoke("rules", "--app", "chat:app").stdout

    async def hold() -> list[object]:
        settings = Settings(REDIS_URL=redis_server.url, RATE_LIMIT_TIMEOUT=5.0)
        limiter = RateLimiter(settings=settings, timeout=5)
        client = await partition_of("192.0.2.1", "ip", settings)
        held = limiter.slot(client, 4, name="streams"), limiter.slot(client, 2, name="plans")
        for slot in held:
            await slot.__aenter__()
        return list(held)

    loop = asyncio.new_event_loop()
    held = loop.run_until_complete(hold())
    rows = {
        row["policy"]: (row["used"], row["quota"], row["remaining"], row["reset"], row["window"])
        for row in json.loads(invoke("peek", "192.0.2.1", "--app", "chat:app", "--json").stdout)["policies"]
    }
    assert {"streams": (1, 4, 3, None, 0), "plans": (1, None, None, None, 0)} == rows
    assert "in flight" in invoke("peek", "192.0.2.1", "--app", "chat:app").stdout
    assert 0 == invoke("reset", "192.0.2.1", "--app", "chat:app", "--name", "streams").exit_code
    assert [b"rate_limit:{192.0.2.1}:plans:c0:1"] == redis_server.client().keys("*:c0:1")
    assert held
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def test_peek_and_reset_by_another_identity(redis_server: ExternalServer, invoke: Invoke) -> None:
    """Rules are those that count by that."""
    settings = Settings(REDIS_URL=redis_server.url)
    count(settings, "k-1", "header:x-api-key", "10/second; 50/minute", "keys", cost=4)
    arguments = ("k-1", "--app", "shop:app", "--by", "header:X-Api-Key")
    result = invoke("peek", *arguments, "--json", REDIS_URL=redis_server.url)
    rows = {row["policy"]: row["quota"] for row in json.loads(result.stdout)["policies"]}
    was_reset, again = invoke("reset", *arguments), invoke("reset", *arguments)

    assert {"keys-1s": 10, "keys-60s": 50} == rows
    assert ["has its full quota again", "nothing was counted"] == [
        done.stdout.strip().partition(": ")[2] for done in (was_reset, again)
    ]


ELSEWHERE = """
import redis.asyncio
from starlette.applications import Starlette
from redis_asgi import RateLimitMiddleware, Rule, Settings

app = Starlette()
app.add_middleware(RateLimitMiddleware, rules=[Rule("5/minute", name="a")], settings=Settings(REDIS_URL="{url}"))
client = redis.asyncio.Redis.from_url("{other}")
app.add_middleware(RateLimitMiddleware, rules=[Rule("7/minute", name="b")], redis=client)
app.add_middleware(RateLimitMiddleware, rules=[Rule("9/minute", name="c")], redis="memory://")
"""


def test_an_app_that_names_its_servers(
    redis_server: ExternalServer, private_server: StartServer, invoke: Invoke, tmp_path: Path
) -> None:
    """What the environment says is not where its rules count: each is looked at where it does."""
    other = private_server()
    prefixed = redis_server.url
    (tmp_path / "bad.py").write_text(ELSEWHERE.format(url=prefixed, other=other.url))
    count(Settings(REDIS_URL=prefixed), "192.0.2.1", "ip", "5/minute", "a", cost=2)
    count(Settings(REDIS_URL=other.url), "192.0.2.1", "ip", "7/minute", "b", cost=3)
    peeked = invoke("peek", "192.0.2.1", "--app", "bad:app", "--json")
    checked = invoke("check", "--app", "bad:app", "--json")
    strict = invoke("check", "--app", "bad:app", "--strict")
    was_reset = invoke("reset", "192.0.2.1", "--app", "bad:app")
    findings = json.loads(checked.stdout)["findings"]
    rules = [finding["text"] for finding in findings if finding["check"] == "rules"]

    assert {"a": 2, "b": 3} == {row["policy"]: row["used"] for row in json.loads(peeked.stdout)["policies"]}
    assert [0, 3, 0] == [checked.exit_code, strict.exit_code, was_reset.exit_code], checked.stdout
    assert "c: counted in the app's process (memory://)" == rules[0]
    assert f"b: counted in {other.host}:{other.port}/0, which the app names itself" == rules[1]
    assert f"a: counted in {prefixed!r}, which the app names itself" == rules[2]
    assert {"rules-1", "rules-2"} == {f["server"] for f in findings if f["check"] == "connection"}
    assert [] == redis_server.client().keys() + other.client().keys()


def test_check_of_an_app_with_the_environments_server(redis_server: ExternalServer, invoke: Invoke) -> None:
    """Then it is one server, and which rules count there is said."""
    result = invoke("check", "--app", "shop:app", "--json", REDIS_URL=redis_server.url)
    findings = json.loads(result.stdout)["findings"]

    assert 0 == result.exit_code
    assert f"default, login, keys, plan, shop.story: counted in {redis_server.url!r}" == findings[0]["text"]
    assert {"redis"} == {finding["server"] for finding in findings}


def test_an_app_on_memory(invoke: Invoke) -> None:
    """What is in the app's process cannot be seen from here; a server that is named can."""
    result = invoke("peek", "192.0.2.1", "--app", "shop:app", REDIS_URL="memory://")

    assert (2, True) == (result.exit_code, "keeps everything in the app's process" in result.stderr)


def test_another_server_than_the_apps(redis_server: ExternalServer, invoke: Invoke) -> None:
    """``--url`` says where to look, with the app's names."""
    count(Settings(REDIS_URL=redis_server.url), "192.0.2.1", "ip", "5/minute", "login")
    arguments = ("192.0.2.1", "--app", "shop:app", "--url", redis_server.url)
    result = invoke("peek", *arguments, "--json", REDIS_URL="memory://")

    assert ("login", 1, 5) in [
        (row["policy"], row["used"], row["quota"]) for row in json.loads(result.stdout)["policies"]
    ]
    assert "has its full quota again" in invoke("reset", *arguments, REDIS_URL="memory://").stdout


def test_a_quota_that_nothing_says_is_not_shown(redis_server: ExternalServer, invoke: Invoke) -> None:
    """Without an app, the environment's limits are known only where it sets some."""
    url = redis_server.url
    count(Settings(REDIS_URL=url), "192.0.2.1", "ip", "5/minute", "default")
    unknown = json.loads(invoke("peek", "192.0.2.1", "--json", REDIS_URL=url).stdout)["policies"]
    nothing = json.loads(invoke("peek", "192.0.2.2", "--json", REDIS_URL=url).stdout)["policies"]
    both = invoke("peek", "192.0.2.1", "--app", "shop:app", "--limits", "5/minute")
    known = json.loads(invoke("peek", "192.0.2.1", "--json", REDIS_URL=url, RATE_LIMITS="5/minute").stdout)["policies"]

    assert ([("default", None)], []) == ([(row["policy"], row["quota"]) for row in unknown], nothing)
    assert [("default", 5)] == [(row["policy"], row["quota"]) for row in known]
    assert (2, True) == (both.exit_code, "leave out --limits" in both.stderr)


CACHED = """
from starlette.applications import Starlette
from redis_asgi import EmbeddingCacheMiddleware, RateLimitMiddleware

app = Starlette()
app.add_middleware(EmbeddingCacheMiddleware, redis="{url}", namespace="bge")
limited = Starlette()
limited.add_middleware(EmbeddingCacheMiddleware, redis="{url}", namespace="bge")
limited.add_middleware(RateLimitMiddleware, "5/minute", redis="{url}")
in_memory = Starlette()
in_memory.add_middleware(EmbeddingCacheMiddleware, redis="memory://")
"""


def test_an_app_that_names_its_caches_server(redis_server: ExternalServer, invoke: Invoke, tmp_path: Path) -> None:
    """A server that only `EmbeddingCacheMiddleware` was given is looked at,
    and flushed in the app's namespace.
    """
    url = redis_server.url
    (tmp_path / "cached.py").write_text(CACHED.format(url=url))
    checked = json.loads(invoke("check", "--app", "cached:app", "--json").stdout)
    both = json.loads(invoke("check", "--app", "cached:limited", "--json").stdout)
    nothing = invoke("flush", "bge-m3", "--app", "cached:app")
    forced = invoke("flush", "bge-m3", "--app", "cached:app", "--force")
    again = invoke("flush", "bge-m3", "--app", "cached:limited", "--url", url, REDIS_URL="memory://")
    epoch = embedding_epoch_key("", "bge", "bge-m3", secret=None)

    assert f"vectors: kept in {url!r}, which the app names itself" == checked["findings"][0]["text"]
    assert {"cache"} == {finding["server"] for finding in checked["findings"]}
    assert ["rules", "cache"] == [finding["check"] for finding in both["findings"][:2]]
    assert {"rules"} == {finding["server"] for finding in both["findings"]}
    assert [True, True] == [checked["ok"], both["ok"]]
    assert (1, True) == (nothing.exit_code, "in namespace 'bge'" in nothing.stderr)
    assert [0, 0] == [forced.exit_code, again.exit_code]
    assert [epoch] == redis_server.client().keys("embedding_epoch*")


def test_flush_of_an_app_that_caches_nothing_outside(invoke: Invoke, tmp_path: Path) -> None:
    """It has no cache, or one in its own process: both are said."""
    (tmp_path / "cached.py").write_text(CACHED.format(url="redis://127.0.0.1:1"))
    without = invoke("flush", "bge-m3", "--app", "shop:app")
    within = invoke("flush", "bge-m3", "--app", "cached:in_memory")
    (checked,) = json.loads(invoke("check", "--app", "cached:in_memory", "--json").stdout)["findings"]

    assert (2, True) == (without.exit_code, "has no EmbeddingCacheMiddleware" in without.stderr)
    assert (2, True) == (within.exit_code, "keeps everything in the app's process" in within.stderr)
    assert ("warn", "vectors: kept in the app's process (memory://)") == (checked["level"], checked["text"])
