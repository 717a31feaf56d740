"""The counters agree with what clients saw: through real uvicorn, with one worker and with three."""

import json
import re
import time
from collections import Counter as Tally
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import redis

from redis_asgi.count_buffer import FLUSHED_WITHIN

from ..kit.documents import section
from ..kit.servers import Server, wait_until
from .scrapes import TLS, workers

StartServer = Callable[..., Server]

APP = """
import json, os
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Mount, Route
from redis_asgi import EmbeddingCacheMiddleware, RateLimitMiddleware, Rule, by_header, metrics_app

async def home(request):
    return PlainTextResponse(str(os.getpid()))

async def embeddings(request):
    body = await request.json()
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    data = [{"object": "embedding", "index": i, "embedding": [float(len(t)), 0.5]} for i, t in enumerate(texts)]
    n = 4 * len(texts)
    usage = {"prompt_tokens": n, "total_tokens": n}
    return JSONResponse({"object": "list", "data": data, "model": body["model"], "usage": usage})

app = Starlette(routes=[
    Route("/", home), Route("/free", home), Route("/watched", home),
    Route("/v1/embeddings", embeddings, methods=["POST"]), Mount("/metrics", metrics_app()),
])
app.add_middleware(EmbeddingCacheMiddleware, namespace="wiring", share=True)
rules = [
    Rule("50/hour", name="by-key", paths=["/", "/closed"], partition_by=by_header("x-api-key")),
    Rule("1000/hour", name="wide", paths="/"),
    Rule("3/hour", name="watch", paths="/watched", shadow=True),
]
app.add_middleware(RateLimitMiddleware, rules=rules, exempt=["/free"])
"""


class Series:
    """The samples of a scrape, summed over the labels that are not asked for."""

    def __init__(self, url: str) -> None:
        text = httpx.get(f"{url}/metrics/", trust_env=False, verify=TLS).text
        self._samples: list[tuple[str, dict[str, str], float]] = []
        for line in text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                labels = dict(re.findall(r'(\w+)="([^"]*)"', name))
                self._samples.append((name.partition("{")[0].removeprefix("redis_asgi_"), labels, float(value)))

    def sum(self, name: str, **labels: str) -> float:
        return sum(
            value
            for each, its, value in self._samples
            if each == name and all(its.get(label) == wanted for label, wanted in labels.items())
        )


def settled(url: str) -> tuple[Series, int]:
    """The samples when every worker has told what it noted,
    and how many scrapes it took to see that.
    """
    last, scrapes = Series(url), 1
    for _ in range(50):
        time.sleep(2 * FLUSHED_WITHIN)
        now = Series(url)
        scrapes += 1
        # A scrape is a request that no limit covers, and nothing else.
        if 1 == now.sum("ratelimit_requests_total") - last.sum("ratelimit_requests_total"):
            return now, scrapes
        last = now
    raise AssertionError("The counters do not come to rest.")


def statuses(url: str, path: str, count: int, **headers: str) -> Tally[int]:
    """What so many requests, eight at a time and each over a connection of its own, were answered
    with.
    """

    def ask(_: int) -> int:
        return httpx.get(f"{url}{path}", headers=headers, trust_env=False, verify=TLS).status_code

    with ThreadPoolExecutor(8) as pool:
        return Tally(pool.map(ask, range(count)))


@pytest.mark.parametrize("number", [1, 3])
def test_limiter_counts_what_clients_saw(tmp_path: Path, redis_url: str, number: int) -> None:
    """Admitted, refused and exempt requests, each once, and each policy's decisions."""
    with workers(tmp_path, APP, number, REDIS_URL=redis_url) as url:
        before, _ = settled(url)
        seen = statuses(url, "/", 80, **{"x-api-key": "ada"})
        assert {200: 50, 429: 30} == seen
        assert {200: 7} == statuses(url, "/free", 7)
        after, scrapes = settled(url)

    def gained(name: str, **labels: str) -> float:
        return after.sum(name, **labels) - before.sum(name, **labels)

    requests = "ratelimit_requests_total"
    assert 50 == gained(requests, outcome="allowed", source="redis")
    assert 30 == gained(requests, outcome="refused")
    assert 30 == gained(requests, source="refusal_memory") + gained(requests, outcome="refused", source="redis")
    assert 7 + scrapes == gained(requests, outcome="exempt")
    assert 0 == gained(requests, outcome="unavailable") == gained("ratelimit_fallback_total")
    policy = "ratelimit_policy_total"
    assert (50, 30) == (
        gained(policy, policy="by-key", outcome="allowed"),
        gained(policy, policy="by-key", outcome="refused"),
    )
    assert 0 == gained(policy, policy="wide", outcome="refused")
    # Only who asked Redis has waited; of those answered together, the longest wait is told.
    assert 0 < gained("ratelimit_check_duration_seconds_count") <= gained(requests, source="redis")
    # Every check went to Redis in some batch, but those known to be refused.
    assert gained(requests, source="redis") == gained("redis_batch_size_sum")
    assert gained("redis_batch_size_count") == gained("redis_commands_total", op="check", outcome="ok")
    assert gained("redis_batch_size_count") == gained("redis_command_duration_seconds_count", op="check")


def test_shadow_is_counted_apart(tmp_path: Path, redis_url: str) -> None:
    """What a shadow would have refused is admitted, and said."""
    with workers(tmp_path, APP, 1, REDIS_URL=redis_url) as url:
        assert {200: 5} == statuses(url, "/watched", 5)
        after, _ = settled(url)

    policy = "ratelimit_policy_total"
    assert 3 == after.sum(policy, policy="watch", outcome="allowed")
    assert 2 == after.sum(policy, policy="watch", outcome="shadow_refused")
    assert 0 == after.sum(policy, policy="watch", outcome="refused")
    assert 5 == after.sum("ratelimit_requests_total", outcome="allowed")


def test_outage_is_counted(tmp_path: Path, private_server: StartServer) -> None:
    """Each request without Redis once, as a fallback with its reason,
    and the breaker's way there and back.
    """
    server = private_server()
    with workers(tmp_path, APP, 1, REDIS_URL=server.url) as url:
        before, _ = settled(url)
        server.kill()
        assert {200: 40} == statuses(url, "/", 40, **{"x-api-key": "ada"})
        after, _ = settled(url)

    def gained(name: str, **labels: str) -> float:
        return after.sum(name, **labels) - before.sum(name, **labels)

    assert 40 == gained("ratelimit_requests_total", outcome="allowed", source="local")
    assert 40 == gained("ratelimit_fallback_total", mode="local")
    # While the breaker is open, nobody waits, and nothing is asked.
    assert 0 < gained("ratelimit_check_duration_seconds_count", source="local") < 40
    assert 0 < gained("redis_commands_total", op="check", outcome="connection") < 40
    assert 1 <= gained("breaker_transitions_total", to="open")
    assert after.sum("breaker_state") in (1, 2)


def test_closed_is_unavailable(tmp_path: Path) -> None:
    """A 503 of ours is no refusal."""
    environment = {"REDIS_URL": "redis://127.0.0.1:1", "RATE_LIMIT_ON_REDIS_ERROR": "closed"}
    with workers(tmp_path, APP, 1, **environment) as url:
        assert {503: 6} == statuses(url, "/", 6, **{"x-api-key": "ada"})
        after, _ = settled(url)

    assert 6 == after.sum("ratelimit_requests_total", outcome="unavailable", source="none")
    assert 6 == after.sum("ratelimit_fallback_total", mode="closed")
    assert 0 == after.sum("ratelimit_requests_total", outcome="refused")


GUIDE_APP = """
from fastapi import FastAPI
from redis_asgi import RateLimitMiddleware, metrics_app

app = FastAPI()
app.add_middleware(RateLimitMiddleware, limits="5/minute")
app.mount("/metrics", metrics_app())
"""


def test_guide_shows_what_is_counted(tmp_path: Path, redis_url: str, redis_client: redis.Redis) -> None:
    """The first answer of the section comes back after six requests,
    and the second has those names.
    """
    shown = re.findall(r"^redis_asgi_ratelimit_\w+\{.*$", section("## Metrics"), re.MULTILINE)
    with workers(tmp_path, GUIDE_APP, 1, REDIS_URL=redis_url) as url:
        assert {404: 5, 429: 1} == statuses(url, "/", 6)
        text = httpx.get(f"{url}/metrics/", trust_env=False, verify=TLS).text
        figures = httpx.get(f"{url}/metrics/json", trust_env=False, verify=TLS).json()

    assert len(shown) == 5
    for line in shown:
        # What is exempt are the scrapes, of which there are more here.
        assert line in text.splitlines() or "exempt" in line, line
    keys = re.search(r"^(\{\"hits\".*?)\n```", section("## Metrics"), re.MULTILINE | re.DOTALL)
    assert keys is not None
    assert shape(json.loads(keys[1])) == shape(figures)


def shape(value: object) -> object:
    """The names in a JSON value, without its numbers."""
    return {name: shape(inner) for name, inner in value.items()} if isinstance(value, dict) else type(value)


@pytest.mark.parametrize("count", [1, 3])
def test_cache_counts_what_clients_saw(tmp_path: Path, private_server: StartServer, count: int) -> None:
    """Inputs found and computed, requests by result, and bypasses:
    exactly, with three workers in sum.
    """

    def embed(*texts: str, **more: object) -> str:
        body = {"model": "m", "input": list(texts), **more}
        answer = httpx.post(f"{url}/v1/embeddings", json=body, headers=more_headers, trust_env=False, verify=TLS)
        assert 200 == answer.status_code
        said = answer.headers["cache-status"]
        if "stored" in said:
            # The answer leaves before the write,
            # and the next request may reach another worker before it.
            kept.update(texts)
            wait_until(lambda: len(kept) == len(inside.keys("embedding_input:*")), "the vectors in Redis")
        return said

    more_headers = {"authorization": "Bearer sk-hostile"}
    kept: set[str] = set()
    store = private_server()
    inside = store.client()
    with workers(tmp_path, APP, count, REDIS_URL=store.url, EMBEDDING_CACHE_L1_BYTES="0") as url:
        before, _ = settled(url)
        # Five batches of ten new inputs, each asked four times more;
        # then two half known; then two of no use to keep.
        told = [embed(*(f"{batch} {n}" for n in range(10))) for batch in range(5) for _ in range(5)]
        told += [embed(f"{batch} 0", f"new {batch}") for batch in range(2)]
        more_headers["cache-control"] = "no-store"
        told += [embed("0 0") for _ in range(3)]
        after, _ = settled(url)

    def gained(name: str, **labels: str) -> float:
        return after.sum(name, **labels) - before.sum(name, **labels)

    assert (20, 5, 2, 3) == tuple(
        sum(mark in each for each in told) for mark in ("; hit", "fwd=miss", "fwd=partial", "fwd=bypass")
    )
    requests = {
        result: gained("cache_requests_total", result=result) for result in ("hit", "miss", "partial", "bypass")
    }
    assert {"hit": 20, "miss": 5, "partial": 2, "bypass": 3} == requests
    assert 3 == gained("cache_bypass_total", reason="no-store")
    assert (20 * 10 + 2, 5 * 10 + 2) == (
        gained("cache_items_total", result="hit"),
        gained("cache_items_total", result="miss"),
    )
