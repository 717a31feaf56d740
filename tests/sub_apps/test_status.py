"""The status page: true, safe, readable, and quiet;
in a real browser where what a browser does is promised.
"""

import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import redis.asyncio as aioredis
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp

from redis_asgi import ConfigurationError, RateLimiter, RedisManager, Settings, status_app
from redis_asgi.asgi.sub_app import SubApp
from redis_asgi.sub_apps.status import charts
from redis_asgi.sub_apps.status.markup import Markup, joined, markup
from redis_asgi.sub_apps.status.page import _percent, _rate
from redis_asgi.telemetry import SAMPLE_SECONDS, Sample, Telemetry, fresh_telemetry

from ..kit.browser import Browser, find_chromium, served
from ..kit.fair_time import fair_time
from ..kit.servers import Cluster, wait_until
from .probes import DEADLINE

NOWHERE = "redis://someuser:somesecret@127.0.0.1:1"
NASTY = """x.<locals>.y"'&{status}<script>document.title='owned'</script>"""


@pytest.fixture
def counted() -> Iterator[Telemetry]:
    """Counters of this test's own; what is counted now has been counted when the page is asked for."""
    with fresh_telemetry(now=time.monotonic() - 6) as mine:
        yield mine


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A real browser."""
    binary = find_chromium()
    if binary is None:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail("no chromium found: required because CI is set", pytrace=False)
        pytest.skip("no chromium found: NOT TESTED in a browser. Install chromium.")
    with Browser(binary) as running:
        yield running


def page_on(url: str = "memory://", *, authorize: Any = None, prefix: str = "/ops/status", **settings: Any) -> ASGIApp:
    """An app with the page below *prefix*."""
    app = FastAPI()
    app.mount(prefix, status_app(redis=RedisManager(Settings(REDIS_URL=url, **settings)), authorize=authorize))
    return app


@asynccontextmanager
async def client_of(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client in front of *app*."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def text_of(app: ASGIApp, path: str = "/ops/status/") -> str:
    """The page's source."""
    async with client_of(app) as client:
        response = await client.get(path)
    assert 200 == response.status_code
    return response.text


def count(telemetry: Telemetry) -> None:
    """What an app might have counted."""
    for outcome, number in (("allowed", 1234), ("refused", 66), ("unavailable", 100), ("exempt", 7)):
        telemetry.ratelimit_requests.labels(outcome, "redis").inc(number)
    for policy, admitted, refused in (("default-60s", 1000, 60), (NASTY, 40, 6), ("quiet", 1, 0)):
        telemetry.ratelimit_policy.labels(policy, "allowed").inc(admitted)
        telemetry.ratelimit_policy.labels(policy, "refused").inc(refused)
    telemetry.ratelimit_fallback.labels("local", "timeout").inc(12)
    telemetry.cache_items.labels("hit").inc(750)
    telemetry.cache_items.labels("miss").inc(250)


# in a browser


def test_page_shows_what_was_counted(browser: Browser, counted: Telemetry, redis_url: str) -> None:
    """Below a mount, under its own strict policy: nothing on the console,
    styled, and with telemetry's numbers.
    """
    count(counted)
    with served(page_on(redis_url)) as address:
        browser.visit(f"{address}/ops/status/")

        # The icon may come after everything else.
        wait_until(lambda: browser.run("1") and len(browser.requests) > 2, "the icon is asked for")
        assert [] == browser.console
        assert [
            (f"{address}/ops/status/", 200),
            (f"{address}/ops/status/healthy.svg", 200),
            (f"{address}/ops/status/status.css", 200),
        ] == sorted(set(browser.requests))  # it may ask for the icon twice
    assert "Healthy · redis-asgi" == browser.run("document.title")
    assert "grid" == browser.run("getComputedStyle(document.querySelector('.figures')).display")
    figures = browser.run("[...document.querySelectorAll('.figure')].map(f => f.innerText.split('\\n'))")
    assert ["Requests now", "280/s", "mean of the last minute; 1,400 in ten"] == figures[0]
    assert ["Refused", "4.7 %", "66 of 1,400"] == figures[1]
    assert ["Cache hits", "75 %", "750 of 1,000 inputs"] == figures[2]
    assert re.fullmatch(r"\d+\.\d+ ms", figures[3][1])
    rows = browser.run("[...document.querySelectorAll('tbody tr')].map(r => [...r.cells].map(c => c.textContent))")
    assert [
        ["default-60s", "1,000", "60", "5.7 %"],
        [NASTY, "40", "6", "13 %"],
        ["quiet", "1", "0", "0 %"],
    ] == rows
    notes = browser.run("[...document.querySelectorAll('.keys, .note')].map(e => e.textContent)")
    assert "1,234 admitted66 refused100 unavailable" in notes
    assert "12 decided without Redis, 7 exempt" in notes
    assert "750 hits, 250 misses" in notes
    hover = browser.run("document.querySelector('.slot title').textContent")
    assert hover.endswith("UTC: 1,234 admitted, 66 refused, 100 unavailable in 5 s")


def test_areas_are_as_high_as_what_they_show(browser: Browser, counted: Telemetry) -> None:
    """The newest slot ends at the right edge;
    its admitted part is 247 of 500 requests a second, and so on up.
    """
    count(counted)
    with served(page_on()) as address:
        browser.visit(f"{address}/ops/status/")
    boxes = browser.run(
        "Object.fromEntries([...document.querySelectorAll('.area')].map(a => [a.classList[1], a.getBBox()]"
        ").map(([n, b]) => [n, [b.x, b.y, b.width, b.height].map(v => Math.round(v * 100) / 100)]))"
    )

    assert [595, 50.64, 5, 49.36] == boxes["admitted"]
    assert [595, 48, 5, 2.64] == boxes["refused"]
    assert [595, 44, 5, 4] == boxes["unavailable"]
    assert [595, 25, 5, 75] == boxes["hit"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_page_fits_and_can_be_read(browser: Browser, counted: Telemetry, width: int, scheme: str) -> None:
    """Nothing sticks out at any width; text has a contrast of 4.5,
    what is drawn of 3 (WCAG 2.1 AA).
    """
    count(counted)
    browser.resize(width, 800)
    browser.prefer(scheme)
    with served(page_on(NOWHERE)) as address:
        browser.visit(f"{address}/ops/status/")

    assert width == browser.run("document.documentElement.scrollWidth")
    colours = browser.run(
        "Object.fromEntries(['page', 'card', 'notice', 'text', 'soft', 'link', 'healthy', 'degraded', 'unhealthy', "
        "'admitted', 'refused', 'unavailable', 'hit'].map(n => "
        "[n, getComputedStyle(document.documentElement).getPropertyValue('--' + n)]))"
    )
    assert (_luminance(colours["page"]) > 0.5) == (scheme == "light")
    for name in ("text", "soft", "link", "healthy", "degraded", "unhealthy"):
        for ground in ("page", "card"):
            assert 4.5 <= _contrast(colours[name], colours[ground]), (name, ground)
    assert 4.5 <= _contrast(colours["text"], colours["notice"])
    for name in ("admitted", "refused", "unavailable", "hit"):
        assert 3 <= _contrast(colours[name], colours["card"]), name


def _luminance(colour: str) -> float:
    digits = colour.strip().lstrip("#")
    digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: str, other: str) -> float:
    """The contrast of two colours (WCAG 2.1, "contrast ratio")."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_page_is_accessible(browser: Browser, counted: Telemetry) -> None:
    """A language, one main heading, cells with headers, pictures with words,
    a status that is not only a colour.
    """
    count(counted)
    with served(page_on()) as address:
        browser.visit(f"{address}/ops/status/")

    assert "en" == browser.run("document.documentElement.lang")
    assert 1 == browser.run("document.querySelectorAll('h1').length")
    assert ["col"] * 4 == browser.run("[...document.querySelectorAll('thead th')].map(h => h.scope)")
    assert ["row"] * 3 == browser.run("[...document.querySelectorAll('tbody th')].map(h => h.scope)")
    labels = browser.run("[...document.querySelectorAll('svg[role=img]')].map(s => s.getAttribute('aria-label'))")
    assert "Limiter decisions of the last ten minutes: 1,234 admitted, 66 refused, 100 unavailable" == labels[0]
    assert "Cache hit rate of the last ten minutes: 750 hits, 250 misses" == labels[1]
    silent = "document.querySelectorAll('svg:not([role=img]):not([aria-hidden]), img:not([alt])').length"
    assert 0 == browser.run(silent)
    assert "Healthy" == browser.run("document.querySelector('.status').textContent")


def test_page_without_traffic(browser: Browser, counted: Telemetry) -> None:
    """Nothing yet: it says so, with no numbers made of nothing, and without an error."""
    with served(page_on()) as address:
        browser.visit(f"{address}/ops/status/")

    assert [] == browser.console
    empty = browser.run("[...document.querySelectorAll('.empty')].map(e => e.textContent)")
    assert ["No requests", "No inputs", "No policy has been asked"] == [text.partition(" in ")[0] for text in empty]
    assert "NaN" not in browser.run("document.body.innerText")
    assert ["0/s", "—", "—", "—"] == browser.run("[...document.querySelectorAll('.figure b')].map(b => b.textContent)")


def test_page_comes_back_until_it_is_paused(browser: Browser, counted: Telemetry) -> None:
    """Without a script; the link pauses it, keeps what else it was asked with, and resumes it."""
    refresh = "document.querySelector('meta[http-equiv=refresh]')?.content"
    with served(page_on()) as address:
        browser.visit(f"{address}/ops/status/?t=a%26b")
        assert "10" == browser.run(refresh)
        browser.visit(browser.run("document.querySelector('footer a').href"))
        assert f"{address}/ops/status/?t=a%26b&refresh=off" == browser.run("location.href")
        assert browser.run(refresh) is None
        assert f"{address}/ops/status/?t=a%26b" == browser.run("document.querySelector('footer a').href")


# its source


@pytest.mark.anyio
async def test_nothing_needs_an_exception_from_the_policy(counted: Telemetry) -> None:
    """No script, no inline style, nothing from elsewhere;
    the policy is the strictest that shows the page.
    """
    count(counted)
    async with client_of(page_on()) as client:
        response = await client.get("/ops/status/")
        head = await client.head("/ops/status/")

    assert "text/html; charset=utf-8" == response.headers["content-type"]
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert "'none'" == policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"]
    assert ("'self'", "'self'") == (policy["style-src"], policy["img-src"])
    assert re.search(r"<script[ >](?!document)| style=|<style| on\w+=|//", response.text.replace("&lt;", "")) is None
    assert ("no-store", "no-referrer", "nosniff") == tuple(
        response.headers[name] for name in ("cache-control", "referrer-policy", "x-content-type-options")
    )
    assert (200, b"") == (head.status_code, head.content)


@pytest.mark.anyio
async def test_what_is_in_flight_is_told(counted: Telemetry) -> None:
    """How many requests hold a place now, under each concurrency limit."""
    count(counted)
    manager = RedisManager(Settings(REDIS_URL="memory://"))
    app = Starlette()
    app.mount("/status", status_app(redis=manager))
    assert "In flight" not in await text_of(app, "/status/")
    async with RateLimiter(manager).slot("a", 2), RateLimiter(manager).slot("b", 2):
        assert "In flight: 2 of slot()" in await text_of(app, "/status/")


@pytest.mark.anyio
async def test_users_text_is_escaped(counted: Telemetry) -> None:
    """A policy's name, and what the page is asked with, are text and never markup."""
    count(counted)
    source = await text_of(page_on(), '/ops/status/?"><script>alert(1)</script>=<b>')

    assert "<script" not in source
    assert "<b>&" not in source
    assert "&lt;locals&gt;" in source
    assert "{status}" in source


@pytest.mark.anyio
async def test_open_page_says_so(counted: Telemetry) -> None:
    """Without ``authorize`` it says in bold that anybody may read it; with one it does not."""
    warning = "<strong>This page is open to anybody who reaches it.</strong>"

    assert warning in await text_of(page_on())
    assert warning not in await text_of(page_on(authorize=lambda _conn: True))


@pytest.mark.anyio
async def test_authorize_guards_the_page(counted: Telemetry) -> None:
    """403 for strangers; the stylesheet and the icons,
    which are the same everywhere, are not asked about.
    """

    async def operator(connection: HTTPConnection) -> bool:
        return connection.headers.get("x-token") == "good"

    async with client_of(page_on(authorize=operator)) as client:
        refused = await client.get("/ops/status/")
        admitted = await client.get("/ops/status/", headers={"x-token": "good"})
        assets = [await client.get(f"/ops/status/{name}") for name in ("status.css", "healthy.svg", "unhealthy.svg")]

    assert (403, 200) == (refused.status_code, admitted.status_code)
    assert b"redis-asgi" not in refused.content
    assert [200] * 3 == [asset.status_code for asset in assets]
    assert ["text/css; charset=utf-8"] + ["image/svg+xml"] * 2 == [asset.headers["content-type"] for asset in assets]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("closed", "status", "words"),
    [
        (False, "Degraded", "Redis cannot be reached. The app goes on without it."),
        (True, "Unhealthy", "Redis cannot be reached. Requests that need it are refused."),
    ],
)
async def test_redis_that_is_gone(counted: Telemetry, status: str, words: str, *, closed: bool) -> None:
    """It says what that means, at once, and gives neither host nor user nor a message away."""
    manager = RedisManager(Settings(REDIS_URL=NOWHERE))
    manager.fails_closed = closed
    app = Starlette()
    app.mount("/ops/status", status_app(redis=manager, authorize=lambda _conn: True))
    started = fair_time()
    source = await text_of(app)

    assert fair_time() - started < DEADLINE + 0.4
    assert f"<title>{status} · redis-asgi</title>" in source
    assert words in source
    assert source.count("not known") == 3
    assert re.search(r"127\.0|:1\b(?!\d*<)|someuser|somesecret|localhost|Error|Exception", source) is None


@pytest.mark.anyio
async def test_pool_and_deployment_are_shown(counted: Telemetry, redis_url: str, cluster: Cluster) -> None:
    """Connections of this process, of a single server and of all nodes; ``memory://`` has none."""
    manager = RedisManager(Settings(REDIS_URL=redis_url, REDIS_POOL_SIZE=5))
    client = await manager.get_connection()
    await client.ping()
    app = Starlette()
    app.mount("/ops/status", status_app(redis=manager))
    alone = await text_of(app)
    nodes = await text_of(page_on(cluster.url, REDIS_CLUSTER=True))
    async with aioredis.RedisCluster.from_url(cluster.url, max_connections=24) as many:
        for node in cluster.nodes:
            await many.ping(target_nodes=many.get_node("127.0.0.1", node.port))
        app = Starlette()
        app.mount("/ops/status", status_app(redis=many))
        used = await text_of(app)
    memory = await text_of(page_on())

    assert "0 of 5 in use, 1 idle" in alone
    assert ">Standalone<" in alone
    assert (">Cluster<" in nodes, "No connection yet" in nodes, "not known" in nodes) == (True, True, False)
    assert "0 of 72 in use, 3 idle" in used
    assert "In this process, each worker its own" in memory
    assert "Breaker" not in memory


@pytest.mark.anyio
async def test_client_that_cannot_be_built(counted: Telemetry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is there all the same, without a pool."""

    def nowhere(_manager: RedisManager) -> None:
        raise OSError("a certificate in /etc cannot be read")

    monkeypatch.setattr(RedisManager, "_connect", nowhere)
    source = await text_of(page_on(NOWHERE))

    assert ("Degraded" in source, "/etc" in source, source.count("not known")) == (True, False, 4)


@pytest.mark.anyio
async def test_it_says_for_whom_it_speaks(counted: Telemetry) -> None:
    """One worker of perhaps several, by its process id."""
    assert f"Process {os.getpid()}, one worker: others count for themselves." in await text_of(page_on())


@pytest.mark.anyio
async def test_figures_say_what_they_are(counted: Telemetry) -> None:
    """The rate is a mean, and policies count what they decided, not requests."""
    count(counted)
    page = await text_of(page_on())

    assert "<b>280/s</b> <span>mean of the last minute; 1,400 in ten</span>" in page
    assert "Each policy counts what it decided: a request under two of them is in both rows" in page


@pytest.mark.anyio
async def test_shadow_is_said_to_be_one(counted: Telemetry) -> None:
    """What it would have refused is shown, with a word that it refused nobody;
    without a shadow there is no word.
    """
    counted.ratelimit_policy.labels("real", "allowed").inc(9)
    without = await text_of(page_on())
    counted.ratelimit_policy.labels("trial", "allowed").inc(30)
    counted.ratelimit_policy.labels("trial", "shadow_refused").inc(10)
    counted.tick(time.monotonic() + SAMPLE_SECONDS)
    source = await text_of(page_on())

    assert "shadow" not in without
    (row,) = re.findall(r'<tr><th scope="row">trial.*?</tr>', source)
    assert ["trial", "shadow", "30", "10", "25", "%"] == re.sub(r"<[^>]*>", " ", row).split()
    assert "A shadow refuses nobody" in source


@pytest.mark.parametrize("width", [1280, 320])
def test_middle_of_the_time_axis_is_in_the_middle(browser: Browser, counted: Telemetry, width: int) -> None:
    """The words below a chart stand where they belong."""
    browser.resize(width, 800)
    with served(page_on()) as address:
        browser.visit(f"{address}/ops/status/")
    offsets = browser.run(
        "(() => { const b = e => e.getBoundingClientRect(); const c = b(document.querySelector('.canvas'));"
        "const r = document.createRange();"
        "return [...document.querySelectorAll('.x')[0].children].map(s => { r.selectNodeContents(s); const t = "
        "r.getBoundingClientRect(); return [t.left - c.left, (t.left + t.right) / 2 - (c.left + c.right) / 2, "
        "t.right - c.right].map(Math.round); }); })()"
    )

    assert (0, 0, 0) == (offsets[0][0], offsets[1][1], offsets[2][2])


@pytest.mark.anyio
async def test_only_the_busiest_are_listed(counted: Telemetry) -> None:
    """Ten policies, the busiest first, and how many are left out."""
    for number in range(13):
        counted.ratelimit_policy.labels(f"p{number}", "allowed").inc(100 + number)
    source = await text_of(page_on())

    assert [f"p{n}" for n in range(12, 2, -1)] == re.findall(r'<th scope="row">(p\d+)', source)
    assert "3 more with less to do" in source


def test_what_is_wrong_is_told_at_construction() -> None:
    """As with every part of the package."""
    with pytest.raises(ConfigurationError, match="authorize"):
        status_app(settings=Settings(REDIS_URL="memory://"), authorize="token")  # type: ignore[arg-type]  # the point
    assert isinstance(status_app(settings=Settings(REDIS_URL="memory://")), SubApp)


# its parts


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 1), (0.03, 0.05), (0.2, 0.2), (1, 1), (1.01, 2), (20, 20), (21, 50), (51, 100), (999, 1000), (1000, 1000)],
)
def test_nice_ceiling(value: float, expected: float) -> None:
    """An axis ends at 1, 2 or 5 times a power of ten."""
    assert charts.nice_ceiling(value) == pytest.approx(expected)


def _sample(hits: int, misses: int) -> Sample:
    return Sample(0.0, 5.0, hits=hits, misses=misses)


def test_line_has_gaps() -> None:
    """Where nothing is known there is no line, not one at zero."""
    history = [_sample(1, 1), _sample(0, 0), _sample(1, 0), _sample(3, 1)]
    drawn = charts.line(history, "hit", lambda s: s.hits / (s.hits + s.misses) if s.hits + s.misses else None, 1.0)

    assert ["M580 50H585", "M590 0H595L595 25H600"] == re.findall(r'class="line hit" d="([^"]*)"', drawn)


def test_areas_stand_on_each_other() -> None:
    """The second series begins where the first ends, and is not drawn where it is zero."""
    history = [_sample(1, 1), _sample(2, 0)]
    drawn = charts.stacked(history, [("a", lambda s: s.hits), ("b", lambda s: s.misses)], 2.0)

    assert [
        ("a", "M590 50H595L595 0H600L600 100H595L595 100H590Z"),
        ("b", "M590 0H595L595 50H590Z"),
    ] == re.findall(r'class="area (\w)" d="([^"]*)"', drawn)


@pytest.mark.parametrize(
    ("part", "whole", "expected"),
    [
        (0, 0, "—"),
        (0, 9, "0 %"),
        (9, 9, "100 %"),
        (1, 3000, "< 0.1 %"),
        (1, 100, "1.0 %"),
        (1, 3, "33 %"),
        (2999, 3000, "> 99.9 %"),
        (995, 1000, "99.5 %"),
    ],
)
def test_percent(part: int, whole: int, expected: str) -> None:
    """Some is never shown as none, nor most as all."""
    assert expected == _percent(part, whole)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0, "0/s"), (0.2, "0.2/s"), (1, "1/s"), (9.96, "10/s"), (1234.4, "1,234/s"), (0.0333, "0.033/s")],
)
def test_rate(rate: float, expected: str) -> None:
    """Two digits, or whole numbers."""
    assert expected == _rate(rate)


def test_markup_escapes_what_is_not_markup() -> None:
    """Text and attributes are escaped once; what is markup stays."""
    inner = markup("<i>{text}</i>", text="a<b>&\"'{x}")

    assert "<i>a&lt;b&gt;&amp;&quot;&#x27;{x}</i>" == inner
    assert f"<p>{inner}{inner}7</p>" == markup("<p>{a}{n}</p>", a=joined([inner, inner]), n=7)
    assert isinstance(inner, Markup)
