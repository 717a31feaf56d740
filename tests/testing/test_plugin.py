"""The plugin as a user has it: in a project of its own, whose tests import none of its fixtures."""

import re

import httpx
import pytest
from _pytest.pytester import Pytester

import redis_asgi.testing.calls

from ..kit.documents import README, section
from ..kit.processes import run_python
from .clients import TestClient

# What a project imports stays imported from one to the next: numpy cannot be loaded twice.
_PRELOADED = (httpx, redis_asgi.testing.calls, TestClient)

pytest_plugins = ["pytester"]

# An app that is built at import, as most are, and what its team tests of it.
APP = """
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from redis_asgi import EmbeddingCacheMiddleware, RateLimitMiddleware, Rule

async def login(request):
    return JSONResponse({"error": "wrong password"}, status_code=401)

async def embed(request):
    given = (await request.json())["input"]
    data = [{"index": i, "embedding": [0.5, float(i)]} for i in range(len(given))]
    return JSONResponse({"object": "list", "data": data, "model": "m"})

app = Starlette(routes=[
    Route("/login", login, methods=["POST"]), Route("/v1/embeddings", embed, methods=["POST"]),
])
app.add_middleware(EmbeddingCacheMiddleware, namespace="test")
app.add_middleware(RateLimitMiddleware, rules=[Rule("5/minute", name="login", paths="/login", methods="POST")])
"""
TESTS = """
import httpx
import pytest
from starlette.testclient import TestClient
from redis_asgi.testing import assert_limited
from service import app

pytestmark = pytest.mark.anyio

@pytest.fixture
def anyio_backend():
    return "asyncio"

@pytest.fixture
async def client():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client

async def test_login_is_limited(client):
    refused = await assert_limited(client, "POST", "/login", after=5)
    assert refused.json()["violated-policies"] == ["login"]

def test_login_is_limited_here():
    assert_limited(TestClient(app), "POST", "/login", after=5)

async def test_a_minute_later(client, rate_limit_clock):
    statuses = [(await client.post("/login")).status_code for _ in range(6)]
    rate_limit_clock.advance(61)
    assert statuses + [(await client.post("/login")).status_code] == [401] * 5 + [429, 401]

@pytest.mark.usefixtures("rate_limits_off")
async def test_everything_else(client):
    assert [(await client.post("/login")).status_code for _ in range(9)] == [401] * 9

async def test_what_is_computed(client, embedding_calls):
    for given in (["a", "b"], ["b", "c"]):
        await client.post("/v1/embeddings", json={"model": "m", "input": given})
    assert embedding_calls == [["a", "b"], ["c"]]
"""
INI = """
[pytest]
filterwarnings =
    error
    ignore:Using .httpx. with .starlette.testclient. is deprecated
addopts = --strict-markers --strict-config -p no:cacheprovider -p no:hypothesispytest
"""
# Two that use up the same quota, with no clock at hand.
ALIKE = """
import pytest
from starlette.testclient import TestClient
from service import app

@pytest.mark.parametrize("time", [1, 2])
def test_quota(time):
    client = TestClient(app)
    assert [client.post("/login").status_code for _ in range(6)] == [401] * 5 + [429]
"""


@pytest.fixture
def project(pytester: Pytester) -> Pytester:
    """A project with that app and strict settings."""
    pytester.makepyfile(service=APP)
    pytester.makeini(INI)
    return pytester


@pytest.mark.parametrize("store", ["memory://", "redis"])
def test_tests_of_a_team(
    project: Pytester, store: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it works on either store, twice in a row, with warnings for errors."""
    url = store if store == "memory://" else request.getfixturevalue("redis_url")
    monkeypatch.setenv("REDIS_URL", url)
    for name in ("RATE_LIMIT_TIMEOUT", "EMBEDDING_CACHE_TIMEOUT"):
        monkeypatch.setenv(name, "20")
    project.makepyfile(test_service=TESTS)
    for _ in range(2):
        result = project.runpytest()
        result.assert_outcomes(passed=5)
        if store != "memory://":
            # Vectors are the app's, and stay: a team flushes the database of its tests.
            request.getfixturevalue("redis_client").flushdb()


def test_pages_show_what_a_team_may_write(project: Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests that the README and the guide show pass as pasted."""
    monkeypatch.setenv("REDIS_URL", "memory://")
    found = (section("## Test your app"), *README.sections("## Test your app"))
    for name, text in zip(("test_guide", "test_readme"), found, strict=True):
        [code] = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        project.makepyfile(**{name: code})

    project.runpytest().assert_outcomes(passed=3)


def test_counters_start_anew(project: Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """On ``memory://`` each test finds the whole quota, though the app is the same."""
    monkeypatch.setenv("REDIS_URL", "memory://")
    project.makepyfile(test_service=ALIKE)

    project.runpytest().assert_outcomes(passed=2)


def test_plugin_can_be_left_out(project: Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it counters go on from test to test, and its fixtures are not there."""
    monkeypatch.setenv("REDIS_URL", "memory://")
    project.makepyfile(test_service=ALIKE, test_fixture="def test(rate_limit_clock): pass")

    result = project.runpytest("-p", "no:redis_asgi")

    result.assert_outcomes(passed=1, failed=1, errors=1)
    result.stdout.fnmatch_lines(["*fixture 'rate_limit_clock' not found"])


def test_plugin_is_light_where_it_is_not_used(pytester: Pytester) -> None:
    """A project without the package does not import it, nor what it stands on."""
    pytester.makepyfile(
        """
        import sys

        def test_nothing_is_imported():
            assert "_redis_asgi_pytest" in sys.modules
            assert not {"redis_asgi", "redis", "starlette", "numpy"} & set(sys.modules)
        """
    )

    pytester.runpytest_subprocess("-W", "error", "-p", "no:hypothesispytest").assert_outcomes(passed=1)


def test_finding_points_at_the_test(project: Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that is not there fails the line that asserts it, with what was answered."""
    monkeypatch.setenv("REDIS_URL", "memory://")
    project.makepyfile(
        """
        from starlette.testclient import TestClient
        from redis_asgi.testing import assert_limited
        from service import app

        def test_limit():
            assert_limited(TestClient(app), "POST", "/login", after=9)
        """
    )

    result = project.runpytest()

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["E *AssertionError: POST /login: request 6 of 9 was answered with 429, not admitted.*"]
    )
    result.stdout.no_fnmatch_line("*limited.py*")


def test_testing_without_pytest() -> None:
    """The functions need neither pytest nor, for limits, numpy."""
    done = run_python(
        "import sys, redis_asgi.testing as t\n"
        "with t.held_clock() as clock: clock.advance(61)\n"
        "print(sorted({'numpy', 'pytest', 'httpx'} & set(sys.modules)))"
    )

    assert ("[]\n", "") == (done.stdout, done.stderr)
