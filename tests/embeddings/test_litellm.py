"""LiteLLM's proxy as it comes, served alone and behind the cache,
before a fake upstream on loopback.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from starlette.types import Message, Receive, Scope, Send

from ..kit.embedding_apps import Spy, cache_status, read, respond, server, vector
from ..kit.processes import ENDS_WITHIN, clean_environment
from ..kit.servers import Server, free_port, wait_until
from .clients import installed
from .test_socket import served

pytestmark = pytest.mark.clients

KEY = "sk-of-this-test-alone"
PLACES = {
    "authorization": f"Bearer {KEY}",
    "x-litellm-api-key": KEY,
    "x-goog-api-key": KEY,
    "Ocp-Apim-Subscription-Key": KEY,
}
# Two model names, of which the second steps in for the first; nothing is tried again or put aside.
CONFIGURATION = """
model_list:
  - {{model_name: main, litellm_params: {{model: openai/first, api_base: "{upstream}/v1", api_key: upstream}}}}
  - {{model_name: spare, litellm_params: {{model: openai/second, api_base: "{upstream}/v1", api_key: upstream}}}}
router_settings: {{num_retries: 0, disable_cooldowns: true, fallbacks: [{{main: [spare]}}]}}
general_settings: {{master_key: {key}}}
"""
WRAPPED = """
from litellm.proxy.proxy_server import app
from redis_asgi import EmbeddingCacheMiddleware

app.add_middleware(EmbeddingCacheMiddleware)
"""
LEASE = 3.0  # seconds


@dataclass
class Upstream:
    """Where the proxy sends its requests; while *down* its first model does not answer."""

    spy: Spy = field(default_factory=Spy)
    down: bool = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await read(receive)
        if self.down and b'"first"' in raw:
            await respond(send, b'{"error":{"message":"down"}}', 503)
            return

        async def again() -> Message:
            return {"type": "http.request", "body": raw, "more_body": False}

        await server(self.spy)(scope, again, send)


@dataclass
class Proxy:
    """The proxy twice, before one upstream."""

    alone: httpx.Client
    cached: httpx.Client
    upstream: Upstream

    def ask(self, texts: list[str], headers: dict[str, str] | None = None, **fields: Any) -> list[httpx.Response]:
        """What it answers alone and through the cache, in this order."""
        body = {"model": "main", "input": texts, **fields}
        headers = {"authorization": f"Bearer {KEY}"} if headers is None else headers
        return [c.post("/v1/embeddings", json=body, headers=headers) for c in (self.alone, self.cached)]

    def through(self, texts: list[str], **fields: Any) -> httpx.Response:
        """What it answers through the cache."""
        headers = {"authorization": f"Bearer {KEY}"}
        return self.cached.post("/v1/embeddings", json={"model": "main", "input": texts, **fields}, headers=headers)


@contextmanager
def _serving(module: str, folder: Path, **environment: str) -> Iterator[httpx.Client]:
    """A process with uvicorn and *module*, ended by its process id."""
    port = free_port()
    log = folder / f"{port}.log"
    command = [sys.executable, "-W", "ignore", "-m", "uvicorn", module, "--port", str(port)]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, cwd=folder, env=clean_environment(**environment), stdout=sink, stderr=subprocess.STDOUT
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:

            def answers() -> bool:
                assert process.poll() is None, log.read_text("utf-8")[-3000:]
                try:
                    return client.get("/health/liveliness").status_code == 200
                except httpx.TransportError:
                    return False

            yield _ready(client, answers)
    finally:
        process.terminate()
        process.wait(timeout=ENDS_WITHIN)


def _ready(client: httpx.Client, answers: Callable[[], bool]) -> httpx.Client:
    wait_until(answers, "LiteLLM's proxy answers", within=120)
    return client


@pytest.fixture(scope="module")
def started(server_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The proxy, started twice for this module."""
    installed("litellm", "apscheduler", "prisma")
    folder = tmp_path_factory.mktemp("litellm")
    (folder / "wrapped.py").write_text(WRAPPED, "utf-8")
    upstream, redis = Upstream(), Server.start(server_binary)
    with ExitStack() as stack:
        stack.callback(redis.stop)
        url = stack.enter_context(served(upstream))
        configuration = folder / "config.yaml"
        configuration.write_text(CONFIGURATION.format(upstream=url, key=KEY), "utf-8")
        environment = {
            "CONFIG_FILE_PATH": str(configuration),
            # No look at the network for prices.
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "NO_PROXY": "127.0.0.1",
            "REDIS_URL": redis.url,
            "EMBEDDING_CACHE_LEASE": str(LEASE),
            "EMBEDDING_CACHE_TIMEOUT": "5",
            "EMBEDDING_CACHE_IGNORED_FIELDS": "user,metadata.trace_id",
        }
        alone = stack.enter_context(_serving("litellm.proxy.proxy_server:app", folder, **environment))
        cached = stack.enter_context(_serving("wrapped:app", folder, **environment))
        yield Proxy(alone, cached, upstream)


@pytest.fixture
def proxy(started: Proxy) -> Proxy:
    """The same with nothing asked yet."""
    started.upstream.down = False
    started.upstream.spy.bodies.clear()
    return started


def _vectors(answer: httpx.Response) -> list[Any]:
    assert 200 == answer.status_code, answer.text
    return [item["embedding"] for item in answer.json()["data"]]


@pytest.mark.parametrize("place", PLACES)
def test_a_key_opens_only_for_whom_it_opens_alone(proxy: Proxy, place: str) -> None:
    """With the key the second answer is a hit; without it, or with a wrong one,
    a caller gets what the proxy says.
    """
    text, key = f"sent with {place}", {place: PLACES[place]}
    expected, cold = proxy.ask([text], key)
    assert _vectors(expected) == _vectors(cold) == [vector(text, "first").tolist()]
    calls = proxy.upstream.spy.calls
    warm = proxy.cached.post("/v1/embeddings", json={"model": "main", "input": [text]}, headers=key)
    assert _vectors(cold) == _vectors(warm)
    assert "; hit" in cache_status(warm)
    assert calls == proxy.upstream.spy.calls
    elsewhere = {other: "sk-stolen" for other in PLACES if other != place}
    for headers in ({}, {place: "sk-stolen"}, {place: "Bearer sk-stolen"}, elsewhere, {"x-unknown": KEY}):
        alone, through = proxy.ask([text], headers)
        assert alone.status_code == through.status_code, headers
        assert 400 <= through.status_code < 500
    assert 401 == proxy.ask([text], {})[1].status_code
    assert calls == proxy.upstream.spy.calls


def test_an_answer_has_vectors_of_one_model_only(proxy: Proxy) -> None:
    """While the spare model answers,
    nothing of the first one is among its vectors; nor the other way round.
    """
    proxy.through(["stored before"])
    proxy.upstream.down = True
    expected, mixed = proxy.ask(["stored before", "asked meanwhile"])
    assert "second" == expected.json()["model"]
    assert (_vectors(expected), "second") == (_vectors(mixed), mixed.json()["model"])


def test_a_fallback_does_not_outlive_its_outage(proxy: Proxy) -> None:
    """What the spare model answered is a hit for as long as a lease lasts, and then no more."""
    proxy.upstream.down = True
    expected, during = proxy.ask(["only asked in the outage"])
    assert _vectors(expected) == _vectors(during) == [vector("only asked in the outage", "second").tolist()]
    proxy.upstream.down = False
    right = [vector("only asked in the outage", "first").tolist()]
    wait_until(
        lambda: right == _vectors(proxy.through(["only asked in the outage"])), "the first model is back", within=30
    )
    assert right == _vectors(proxy.through(["only asked in the outage"]))


def test_what_metadata_says_of_one_request_costs_no_hit(proxy: Proxy) -> None:
    """An ignored member differs and the answer is a hit;
    any other member makes another request of it.
    """
    answers = [proxy.through(["with metadata"], metadata={"trace_id": str(n), "tags": ["a"]}) for n in range(2)]
    assert ["fwd=miss", "hit"] == [cache_status(answer).split("; ")[1] for answer in answers]
    assert _vectors(answers[0]) == _vectors(answers[1])
    other = proxy.through(["with metadata"], metadata={"trace_id": "2", "tags": ["b"]})
    assert "fwd=miss" in cache_status(other)
    bodies = [orjson.loads(body) for body in proxy.upstream.spy.bodies]
    assert [["with metadata"]] * 2 == [body["input"] for body in bodies]
