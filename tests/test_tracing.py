"""Attributes on whatever span is current."""

import time
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from redis_asgi import EmbeddingCacheMiddleware, RateLimitMiddleware, Settings
from redis_asgi.tracing import annotate_span

from .kit.processes import run_python


def test_recording_span_is_annotated() -> None:
    """Attributes are named ``redis_asgi.<part>.<rest>``; what is ``None`` is left out."""
    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("request") as span:
        annotate_span(ratelimit_decision="refused", ratelimit_retry_after=1.5, cache_result=None)
        annotate_span(cache_result="partial", cache_inputs=3)

    assert {
        "redis_asgi.ratelimit.decision": "refused",
        "redis_asgi.ratelimit.retry_after": 1.5,
        "redis_asgi.cache.result": "partial",
        "redis_asgi.cache.inputs": 3,
    } == dict(getattr(span, "attributes", {}))


async def embed(request: Request) -> JSONResponse:
    """An embedding server."""
    body = await request.json()
    data = [{"object": "embedding", "index": 0, "embedding": [0.5, 1.0]}]
    return JSONResponse({"object": "list", "data": data, "model": body["model"], "usage": {"prompt_tokens": 1}})


@pytest.mark.anyio
async def test_requests_are_annotated(redis_url: str) -> None:
    """What was decided about each, and by whom; nothing of who asked, or for what."""
    tracer = TracerProvider().get_tracer("test")
    settings = Settings(REDIS_URL=redis_url, RATE_LIMIT_TIMEOUT=2, EMBEDDING_CACHE_TIMEOUT=2)
    home = Route("/", lambda _: PlainTextResponse("here"))
    app = Starlette(routes=[home, Route("/v1/embeddings", embed, methods=["POST"])])
    app.add_middleware(EmbeddingCacheMiddleware, settings=settings)
    app.add_middleware(RateLimitMiddleware, limits="3/minute", exempt=["/free"], settings=settings)

    async def attributes(method: str, path: str, **asked: Any) -> Mapping[str, Any]:
        with tracer.start_as_current_span("request") as span:
            await client.request(method, path, **asked)
        return {name.removeprefix("redis_asgi."): value for name, value in getattr(span, "attributes", {}).items()}

    body = {"model": "secret-model", "input": "secret text"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        free = await attributes("GET", "/free")
        told = [await attributes("POST", "/v1/embeddings", json=body) for _ in range(2)]
        told += [await attributes("GET", "/") for _ in range(2)]

    by_redis = {"ratelimit.decision": "allowed", "ratelimit.source": "redis"}
    assert {"ratelimit.decision": "exempt", "ratelimit.source": "none"} == free
    assert [
        by_redis | {"cache.result": "miss"},
        by_redis | {"cache.result": "hit"},
        by_redis,
        {"ratelimit.decision": "refused", "ratelimit.source": "redis"},
    ] == told


def test_span_that_does_not_record_is_left_alone() -> None:
    """A span that was not sampled, or no span at all, is no error and gets nothing."""
    tracer = TracerProvider(sampler=ALWAYS_OFF).get_tracer("test")
    with tracer.start_as_current_span("request") as span:
        annotate_span(ratelimit_decision="allowed")

    assert not span.is_recording()
    assert not getattr(span, "attributes", None)
    annotate_span(ratelimit_decision="allowed")


def test_without_opentelemetry_nothing_happens() -> None:
    """Where opentelemetry-api is not installed a call does nothing, and does not try to import it."""
    script = """
import sys

class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(name)

class Refuse:
    def find_spec(self, name, *_):
        raise SystemExit(name)

sys.meta_path.insert(0, Absent())
from redis_asgi.tracing import annotate_span  # redis-py looks for it
sys.meta_path[0] = Refuse()
annotate_span(ratelimit_decision="allowed")
"""
    done = run_python(script)

    assert ("", "", 0) == (done.stdout, done.stderr, done.returncode)


def test_half_imported_module_is_no_error() -> None:
    """Another thread may be in the middle of importing OpenTelemetry."""
    script = """
import sys, types
sys.modules["opentelemetry.trace"] = types.ModuleType("opentelemetry.trace")
from redis_asgi.tracing import annotate_span
annotate_span(ratelimit_decision="allowed")
"""
    done = run_python(script)

    assert ("", 0) == (done.stderr, done.returncode)


def test_no_span_costs_nearly_nothing() -> None:
    """Without a recording span a call takes about 0.4 us (here the bound is fifty times that)."""
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(5_000):
            annotate_span(ratelimit_decision="allowed", ratelimit_source="redis")
        best = min(best, (time.perf_counter() - began) / 5_000)

    assert best < 20e-6
