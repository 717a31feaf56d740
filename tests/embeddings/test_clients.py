"""Real clients on a real socket: cold and warm are equal, and warm never reaches the app."""

import asyncio
import gc
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from redis_asgi.embeddings.middleware import EmbeddingCacheMiddleware
from redis_asgi.settings import Settings

from ..kit.embedding_apps import Spy, server, vector
from .clients import missing, needed
from .test_socket import served

pytestmark = [
    pytest.mark.clients,
    # What other people's packages warn about is not ours to fix.
    pytest.mark.filterwarnings("ignore"),
]
TEXTS = ["first text", "second", "first text", "naïve 🙂"]


@pytest.fixture(autouse=True)
def forgotten_clients() -> Iterator[None]:
    """Some clients cannot be closed;
    what Python says of that belongs to this test and to no later one.
    """
    yield
    gc.collect()


@pytest.fixture
def spy() -> Spy:
    """What the app was asked."""
    return Spy(dims=8)


@pytest.fixture
def url(spy: Spy, redis_url: str) -> Iterator[str]:
    """The app behind the middleware."""
    settings = Settings(REDIS_URL=redis_url, EMBEDDING_CACHE_TIMEOUT=2)
    with served(EmbeddingCacheMiddleware(server(spy), settings=settings)) as base:
        yield base


def cold_and_warm(call: Callable[[], list[list[float]]], spy: Spy) -> list[list[float]]:
    """Call twice; the second time the app must not be asked, and the answers are equal."""
    cold = call()
    calls = spy.calls
    assert calls >= 1
    warm = call()
    assert calls == spy.calls
    assert [list(v) for v in cold] == [list(v) for v in warm]
    return cold


def test_openai(url: str, spy: Spy) -> None:
    """The sync client, which asks for base64; the vectors are the right ones, in the right order."""
    openai = needed("openai")
    with openai.OpenAI(api_key="k", base_url=f"{url}/v1", max_retries=0) as client:
        got = cold_and_warm(lambda: [d.embedding for d in client.embeddings.create(model="m", input=TEXTS).data], spy)
    assert [vector(text, "m", 8).tolist() for text in TEXTS] == got
    assert b'"encoding_format":"base64"' in spy.bodies[0]


def test_openai_async(url: str, spy: Spy) -> None:
    """The async client, as floats."""
    openai = needed("openai")

    async def call() -> list[list[float]]:
        async with openai.AsyncOpenAI(api_key="k", base_url=f"{url}/v1", max_retries=0) as client:
            answer = await client.embeddings.create(model="m", input=TEXTS, encoding_format="float")
            assert [0, 1, 2, 3] == [d.index for d in answer.data]
            return [d.embedding for d in answer.data]

    assert [vector(text, "m", 8).tolist() for text in TEXTS] == cold_and_warm(lambda: asyncio.run(call()), spy)


def test_langchain_openai(url: str, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token arrays in chunks of 1,000, read by position."""
    langchain = needed("langchain_openai")
    files = Path(sysconfig.get_path("purelib")) / "litellm" / "litellm_core_utils" / "tokenizers"
    if not files.is_dir():
        missing("tiktoken's files come with litellm")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(files))
    model = langchain.OpenAIEmbeddings(
        model="text-embedding-3-small", api_key="k", base_url=f"{url}/v1", max_retries=0, chunk_size=1000
    )
    texts = [f"document number {n}" for n in range(1500)]
    got = cold_and_warm(lambda: model.embed_documents(texts), spy)
    assert 1500 == len(got)
    assert isinstance(spy.seen[0], list)
    assert all(len(v) == 8 for v in got)


def test_litellm(url: str, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteLLM as a client of an OpenAI-like server."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = needed("litellm")

    def call() -> list[list[float]]:
        answer = litellm.embedding(model="openai/m", input=TEXTS, api_base=f"{url}/v1", api_key="k", num_retries=0)
        return [item["embedding"] for item in answer.data]

    got = cold_and_warm(call, spy)
    assert vector(TEXTS[1], "m", 8).tolist() == pytest.approx(_floats(got[1]))


def _floats(value: Any) -> list[float]:
    if isinstance(value, str):
        import base64

        import numpy as np

        return list(np.frombuffer(base64.b64decode(value), "<f4").astype(float))
    return list(value)


def test_cohere(url: str, spy: Spy) -> None:
    """Version 2, by type."""
    cohere = needed("cohere")
    http = httpx.Client()
    client = cohere.ClientV2(api_key="k", base_url=url, httpx_client=http)

    def call() -> list[list[float]]:
        answer = client.embed(model="m", texts=TEXTS, input_type="search_document", embedding_types=["float"])
        assert TEXTS == answer.texts
        return list(answer.embeddings.float_)

    assert [vector(text, "m", 8).tolist() for text in TEXTS] == cold_and_warm(call, spy)
    http.close()


def test_ollama(url: str, spy: Spy) -> None:
    """Both endpoints."""
    ollama = needed("ollama")
    client = ollama.Client(host=url)
    got = cold_and_warm(lambda: [list(v) for v in client.embed(model="m", input=TEXTS).embeddings], spy)
    assert [vector(text, "m", 8).tolist() for text in TEXTS] == got
    spy.bodies.clear()
    cold_and_warm(lambda: [list(client.embeddings(model="m", prompt="a").embedding)], spy)
