"""The README is true: its commands are those that run, its answers come back,
and it ends before a reader does.
"""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import HTTPException
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, SimpleUser
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from redis_asgi import EmbeddingCacheMiddleware, RateLimitMiddleware, Settings, by_user
from redis_asgi.testing import RateLimitClock

from .benchmarks.chart import on_page, text_of
from .kit.documents import GUIDES, README, ROOT, section, table
from .test_examples import serving


def columns() -> list[list[str]]:
    """The two answers that stand side by side on the first screen, as lines."""
    (block,) = README.blocks("console")
    lines = block.splitlines()
    middle = lines[0].rindex("$ curl")
    return [[line[:middle].rstrip() for line in lines], [line[middle:].rstrip() for line in lines]]


def without_seconds(text: str) -> str:
    """*text* with the seconds that depend on when one asks left open."""
    return re.sub(r"(;t=|retry-after: |Retry in )\d+", r"\1N", text)


def test_answers_are_what_the_quickstart_sends() -> None:
    """The first and the sixth answer have that status line and those fields, in that order, and
    that body.
    """
    (problem,) = README.blocks("json")
    with serving("quickstart") as example:
        answers = [example.get("/") for _ in range(6)]
    for shown, answer in zip(columns(), (answers[0], answers[5]), strict=True):
        assert shown[0].startswith("$ curl -i http://127.0.0.1:8000/")
        really = [f"HTTP/1.1 {answer.status_code} {answer.reason_phrase}"]
        really += [f"{name}: {value}" for name, value in answer.headers.items()]
        names = {line.partition(": ")[0] for line in shown[2:]}
        kept = really[:1] + [line for line in really[1:] if line.partition(": ")[0] in names]

        assert list(map(without_seconds, filter(None, shown[1:]))) == list(map(without_seconds, kept))
        assert {line.partition(": ")[0] for line in really[1:]} - names <= {
            "date",
            "server",
            "content-length",
        }
    assert json.loads(without_seconds(problem)) == json.loads(without_seconds(answers[5].text))


def test_commands_are_those_that_run() -> None:
    """The test command is the one that continuous integration runs; the other one's script exists."""
    serve, test = README.blocks("sh")

    assert serve == "python -m pip install -e '.[examples]' && python examples/quickstart.py\n"
    assert test == "python -m pip install -e '.[test]' && python -m pytest\n"
    assert test in (ROOT / ".ci" / "test").read_text("utf-8")
    assert (ROOT / serve.split()[-1]).exists()


def test_it_ends_before_a_reader_does() -> None:
    """What a reader sees first ends within 45 lines, and the whole within 350."""
    assert README.text[: README.text.index("\n## ")].count("\n") <= 45
    assert README.text.count("\n") <= 350


def test_contents_are_complete() -> None:
    """Every chapter is in the list of contents, in order."""
    (contents,) = re.findall(r"^\*\*Contents\*\*: (.*)$", README.text, re.MULTILINE)

    assert re.findall(r"\(#([^)]+)\)", contents) == [
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for level, title in README.headings() if level == 2
    ]


def test_it_leads_to_every_guide() -> None:
    """Each is named by its path: where an index shows the page, a relative link would lead nowhere."""
    assert [] == [guide.name for guide in GUIDES.values() if f"`{guide.name}`" not in README.text]
    assert [] == [link for link in README.links() if not link.startswith(("https://", "#"))]


def test_settings_are_told_with_their_defaults() -> None:
    """The settings that people set exist, and have those defaults."""
    (text,) = README.sections("## Ten settings")
    told = {row[0]: row[1] for row in table(text)}
    defaults = {row[0]: row[2] for row in table(section("## Every setting"))}

    assert told == {name: defaults[name] for name in told}
    assert len(told) == 10


def test_chart_is_of_the_figures_kept() -> None:
    """The chart in the README, and the picture in the benchmarks' guide, show what was measured
    last.
    """
    figures = json.loads((ROOT / "tests/benchmarks/measured.json").read_text("utf-8"))["k"]
    lines = text_of(figures)
    picture = Path(ROOT, "tests/benchmarks/chart.svg").read_text("utf-8")

    assert on_page(README.text, lines) == README.text
    for bar in lines:
        name, _, value = bar.strip().rpartition(" ")
        assert not value.isdigit() or f">{value}</text>" in picture, name


# six usual jobs


def job(number: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the block of one job has made, on counters of its own."""
    monkeypatch.setenv("REDIS_URL", "memory://")
    monkeypatch.setenv("REDIS_KEY_PREFIX", f"job-{number}:")
    (chapter,) = README.sections("## Six usual jobs")
    codes = re.findall(r"^```python\n(.*?)^```$", chapter, re.MULTILINE | re.DOTALL)
    module = types.ModuleType("job")
    # Endpoints' annotations are looked up where they were defined.
    monkeypatch.setitem(sys.modules, "job", module)
    exec(compile(codes[number - 1], "README.md", "exec"), module.__dict__)  # noqa: S102 - our own README
    return module.__dict__


async def log_in(request: Request) -> None:
    """Lets in whoever knows the password."""
    if request.headers["x-password"] != "right":
        raise HTTPException(401)


async def ask(app: Any, method: str, path: str, times: int, **headers: str) -> list[httpx.Response]:
    """The answers to so many equal requests, one after the other."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return [await client.request(method, path, headers=headers) for _ in range(times)]


@pytest.mark.anyio
async def test_jobs_are_done(monkeypatch: pytest.MonkeyPatch, rate_limit_clock: RateLimitClock) -> None:
    """Each of the six does what is said of it."""
    every = job(1, monkeypatch)["app"]
    assert [404] * 20 + [429] == [each.status_code for each in await ask(every, "GET", "/", 21)]
    assert [404] == [each.status_code for each in await ask(every, "GET", "/health/live", 1)]

    login = job(2, monkeypatch)["app"]
    login.add_api_route("/login", log_in, methods=["POST"])
    right = await ask(login, "POST", "/login", 9, **{"x-password": "right"})
    wrong = await ask(login, "POST", "/login", 6, **{"x-password": "wrong"})
    assert [200] * 9 + [401] * 5 + [429] == [each.status_code for each in right + wrong]

    plans = job(3, monkeypatch)["app"]
    bob, ada, eve = [
        await ask(plans, "GET", "/", 61, **{"x-api-key": f"key-of-{name}"}) for name in ("bob", "ada", "eve")
    ]
    assert [404, 429, 404, 404] == [each.status_code for each in (bob[59], bob[60], ada[60], eve[60])]

    route = job(4, monkeypatch)["app"]
    assert [200] * 5 + [429] == [each.status_code for each in await ask(route, "GET", "/report", 6)]

    late = await ask(job(5, monkeypatch)["app"], "GET", "/story", 2)
    assert ['"default";r=9999;t=60', '"default";r=9979;t=60'] == [each.headers["ratelimit"] for each in late]


def test_limiter_of_the_last_job_decides(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It has a decision, and says what to do."""
    assert job(6, monkeypatch)["decision"].allowed
    assert "go\n" == capsys.readouterr().out


# the order of middlewares


class Named(AuthenticationBackend):
    """Believes the name that a client says."""

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser]:
        return AuthCredentials(), SimpleUser(conn.headers["authorization"])


async def embeddings(request: Request) -> JSONResponse:
    """One vector, large enough for an answer to be compressed."""
    await request.json()
    data = [{"object": "embedding", "index": 0, "embedding": [0.5] * 1536}]
    return JSONResponse(
        {"object": "list", "data": data, "model": "m", "usage": {"prompt_tokens": 2, "total_tokens": 2}}
    )


@pytest.mark.anyio
async def test_order_of_middlewares_is_right(settings: Settings) -> None:
    """Added in that order: users are known,
    hits are counted and compressed, and a page may read the 429.
    """
    (text,) = README.sections("## The order of middlewares")
    options: dict[str, dict[str, Any]] = {
        "EmbeddingCacheMiddleware": {"namespace": "m", "settings": settings},
        "RateLimitMiddleware": {"limits": "2/minute", "partition_by": by_user, "settings": settings},
        "AuthenticationMiddleware": {"backend": Named()},
        "GZipMiddleware": {},
        "CORSMiddleware": {"allow_origins": ["*"], "expose_headers": ["RateLimit"]},
    }
    classes = {
        one.__name__: one
        for one in (
            EmbeddingCacheMiddleware,
            RateLimitMiddleware,
            AuthenticationMiddleware,
            GZipMiddleware,
            CORSMiddleware,
        )
    }
    names = [re.findall(r"\w+Middleware", row[1])[0] for row in table(text)]
    app = Starlette(routes=[Route("/v1/embeddings", embeddings, methods=["POST"])])
    for name in names:
        app.add_middleware(classes[name], **options[name])
    answers = []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for user in ("ada", "ada", "ada", "bob"):
            headers = {"authorization": user, "origin": "https://example.com"}
            body = {"model": "m", "input": "a text"}
            answers.append(await client.post("/v1/embeddings", json=body, headers=headers))

    assert list(options) == names
    assert [200, 200, 429, 200] == [answer.status_code for answer in answers]
    assert "; hit;" in answers[1].headers["cache-status"]
    assert "gzip" == answers[1].headers["content-encoding"]
    assert ["*", "RateLimit"] == [
        answers[2].headers[f"access-control-{name}"] for name in ("allow-origin", "expose-headers")
    ]
