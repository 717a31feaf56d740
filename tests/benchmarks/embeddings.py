"""The embedding cache against raw MGET and its peers, in one run:
``python -m tests.benchmarks.embeddings``.

Prints microseconds, the best and the median of rounds that take turns, since the machine is shared,
and ratios. Needs a Redis of its own, given as ``REDIS_URL``, which it empties. Peers that are not
installed are left out.
"""

import asyncio
import base64
import gc
import importlib
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import orjson
import redis.asyncio as aioredis
from starlette.types import Message, Receive, Scope, Send

from redis_asgi import EmbeddingCacheMiddleware
from redis_asgi.connection.manager import RedisManager
from redis_asgi.settings import Settings

URL = os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/15")
INPUTS, DIMS = 64, 1536
TEXTS = [f"passage number {n} about something that is worth embedding" for n in range(1000)]
VECTORS = np.random.default_rng(1).standard_normal((1000, DIMS)).astype("<f4")
FLOATS: list[list[float]] = [vector.tolist() for vector in VECTORS]
ROUNDS = 200
STALLS = 20
Work = Callable[[], Awaitable[Any]]
PROMISES = (
    ("base64 from Redis", "MGET and join", "<= 2"),
    ("base64 in process", "MGET and join", "< 1"),
    ("float in process", "base64 in process", "<= 2"),
    ("float from Redis", "MGET and orjson", "<= 1.2"),
)


async def best(work: Callable[[], Awaitable[Any]], rounds: int = 60) -> float:
    """Microseconds of the fastest round."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        await work()
        times.append(time.perf_counter() - began)
    return min(times) * 1e6


@dataclass(frozen=True)
class Timed:
    """Microseconds of one round."""

    best: float
    median: float


class App:
    """An OpenAI server that costs nothing: its answers are ready."""

    def __init__(self) -> None:
        self.calls = 0
        self.ready: dict[bytes, bytes] = {}

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        raw = (await receive())["body"]
        body = self.ready.get(raw)
        if body is None:
            fields = orjson.loads(raw)
            numbers = [TEXTS.index(text) for text in fields["input"]]
            base = fields.get("encoding_format") == "base64"
            data = [
                {
                    "object": "embedding",
                    "index": at,
                    "embedding": base64.b64encode(VECTORS[n].tobytes()).decode() if base else FLOATS[n],
                }
                for at, n in enumerate(numbers)
            ]
            usage = {"prompt_tokens": len(data), "total_tokens": len(data)}
            answer = {"object": "list", "data": data, "model": "m", "usage": usage}
            body = self.ready[raw] = orjson.dumps(answer)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def request(app: Any, texts: list[str], encoding: str, *, keep: bool = True) -> Callable[[], Awaitable[list[bytes]]]:
    """A call of *app*, in process and without a client's own cost;
    without *keep* nobody holds what was sent.
    """
    body = orjson.dumps({"model": "m", "input": texts, "encoding_format": encoding})
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]

    async def call() -> list[bytes]:
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/embeddings",
            "query_string": b"",
            "headers": headers,
            "state": {},
        }
        parts: list[bytes] = []
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if unread:
                return unread.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            if keep:
                parts.append(message.get("body", b""))

        await app(scope, receive, send)
        return parts

    return call


async def longest_stall(work: Work) -> float:
    """Milliseconds that another task had to wait at most while *work* ran."""
    worst, done = 0.0, False

    async def watch() -> None:
        nonlocal worst
        while not done:
            began = time.perf_counter()
            await asyncio.sleep(0)
            worst = max(worst, time.perf_counter() - began)

    watcher = asyncio.create_task(watch())
    await asyncio.sleep(0)
    await work()
    done = True
    await watcher
    return worst * 1e3


@dataclass
class Ours:
    """The middleware over an app, its vectors stored: what is called,
    and what a first call took (microseconds).
    """

    app: App
    manager: RedisManager
    call: Work
    cold: float


async def ours(encoding: str, *, local: bool) -> Ours:
    """Warm the middleware up, with or without its in-process layer."""
    local_bytes = 64 * 1024 * 1024 if local else 0
    namespace = f"{encoding} {local}"
    settings = Settings(REDIS_URL=URL, EMBEDDING_CACHE_NAMESPACE=namespace, EMBEDDING_CACHE_L1_BYTES=local_bytes)
    manager = RedisManager(settings)
    app = App()
    await request(app, TEXTS[:INPUTS], encoding)()
    client = await manager.get_connection()
    cold = []
    for _ in range(5):
        await client.flushdb()
        call = request(EmbeddingCacheMiddleware(app, redis=manager), TEXTS[:INPUTS], encoding)
        began = time.perf_counter()
        await call()
        cold.append(time.perf_counter() - began)
    app.calls = 0
    return Ours(app, manager, call, min(cold) * 1e6)


async def by_hand(client: "aioredis.Redis") -> tuple[Work, Work]:
    """One MGET and a join, and the same with orjson rendering the floats."""
    names = [f"raw:{n}" for n in range(INPUTS)]

    async def mget() -> bytes:
        return b"".join(cast("list[bytes]", await client.mget(names)))

    async def rendered() -> bytes:
        raws = cast("list[bytes]", await client.mget(names))
        numbers = [np.frombuffer(raw, "<f4").astype("<f8") for raw in raws]
        return b",".join(orjson.dumps(n, option=orjson.OPT_SERIALIZE_NUMPY) for n in numbers)

    for n, name in enumerate(names):
        await client.set(name, VECTORS[n].tobytes())
    return mget, rendered


async def race(works: Mapping[str, Work]) -> dict[str, Timed]:
    """Time *works* in turn, so that what else the machine does slows all of them down."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            began = time.perf_counter()
            await work()
            times[name].append((time.perf_counter() - began) * 1e6)
    return {name: Timed(min(taken), statistics.median(taken)) for name, taken in times.items()}


async def redisvl() -> tuple[float, float]:
    """Microseconds and bytes per entry of redisvl's EmbeddingsCache."""
    EmbeddingsCache = importlib.import_module("redisvl.extensions.cache.embeddings").EmbeddingsCache  # noqa: N806

    cache = EmbeddingsCache(name="rvl", redis_url=URL, ttl=3600)
    for n in range(INPUTS):
        await cache.aset(content=TEXTS[n], model_name="m", embedding=FLOATS[n])
    micros = await best(lambda: cache.amget(contents=TEXTS[:INPUTS], model_name="m"), 5)
    size = await memory_per_key("rvl:*")
    await cache.adisconnect()
    return micros, size


async def langchain() -> tuple[float, float]:
    """The same of LangChain's CacheBackedEmbeddings over its RedisStore."""
    from langchain_classic.embeddings import CacheBackedEmbeddings
    from langchain_community.storage import RedisStore
    from langchain_core.embeddings import Embeddings

    class Known(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [FLOATS[TEXTS.index(text)] for text in texts]

        def embed_query(self, text: str) -> list[float]:
            return FLOATS[TEXTS.index(text)]

    store = RedisStore(redis_url=URL, namespace="lc")
    cached = CacheBackedEmbeddings.from_bytes_store(Known(), store, namespace="m", key_encoder="sha256")
    await cached.aembed_documents(TEXTS[:INPUTS])
    micros = await best(lambda: cached.aembed_documents(TEXTS[:INPUTS]), 10)
    store.client.close()
    return micros, await memory_per_key("lc*")


async def litellm() -> tuple[float, float]:
    """The same of LiteLLM's Redis cache."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    lib: Any = importlib.import_module("litellm")
    base: Any = lib.CustomLLM

    class Known(base):
        async def aembedding(self, model: str, input: list[str], model_response: Any, **_: Any) -> Any:  # noqa: A002
            data = [
                {"object": "embedding", "index": i, "embedding": FLOATS[TEXTS.index(t)]} for i, t in enumerate(input)
            ]
            model_response.data, model_response.model = data, model
            return lib.EmbeddingResponse(model=model, data=data)

    lib.custom_provider_map = [{"provider": "known", "custom_handler": Known()}]
    lib.cache = lib.Cache(type="redis", url=URL, namespace="ll", ttl=3600)

    async def call() -> Any:
        return await lib.aembedding(model="known/m", input=TEXTS[:INPUTS], caching=True)

    await call()
    await asyncio.sleep(1)
    micros = await best(call, 5)
    return micros, await memory_per_key("ll*")


async def memory_per_key(pattern: str) -> float:
    """MEMORY USAGE per key, on average."""
    client = aioredis.Redis.from_url(URL)
    sizes = [await client.memory_usage(key) or 0 async for key in client.scan_iter(pattern)]
    await client.aclose()
    return sum(sizes) / len(sizes) if sizes else 0.0


async def main() -> None:
    """Measure and print."""
    client = aioredis.Redis.from_url(URL)
    try:
        await client.ping()
    except aioredis.RedisError as error:
        sys.exit(f"No Redis to measure with ({error}). Set REDIS_URL to one of its own, as it is emptied.")
    cached = {
        f"{encoding} {where}": await ours(encoding, local=where == "in process")
        for encoding in ("base64", "float")
        for where in ("from Redis", "in process")
    }
    mget, rendered = await by_hand(client)
    # Warming up emptied the database each time.
    for one in cached.values():
        await one.call()
        one.app.calls = 0
    calls = {name: one.call for name, one in cached.items()}
    # Rendering floats takes ten times what the others do,
    # and leaves nothing of theirs in the CPU's caches.
    slow = {"MGET and orjson": rendered, "float from Redis": calls.pop("float from Redis")}
    timed = await race({"MGET and join": mget, **calls}) | await race(slow)
    print(f"{INPUTS} x {DIMS}, in-process ASGI, microseconds{'best':>13}{'median':>10}{'cold':>10}")
    for name, taken in timed.items():
        cold = f"{cached[name].cold:10.0f}" if name in cached else ""
        print(f"{name:42}{taken.best:10.0f}{taken.median:10.0f}{cold}")
    for ours_, other, promise in PROMISES:
        best_, median = timed[ours_].best / timed[other].best, timed[ours_].median / timed[other].median
        print(f"{f'{ours_} / {other} ({promise})':50}{best_:10.2f}{median:10.2f}")
    for one in cached.values():
        assert one.app.calls == 0, "a warm call reached the app"
        await one.manager.close()
    print(f"bytes per vector in Redis{await memory_per_key('embedding_input:*'):10.0f}")
    for peer in (redisvl, langchain, litellm) if "--no-peers" not in sys.argv else ():
        try:
            micros, size = await peer()
        except ImportError as error:
            print(f"{peer.__name__}: not installed ({error.name})")
            continue
        ratios = ", ".join(f"{micros / timed[name].best:.0f}x {name}" for name in cached)
        print(f"{peer.__name__:10}{micros:10.0f} us: {ratios}; {size:.0f} bytes per vector")
    # One full collection over this file's lists of floats takes 55 ms: not the cache's.
    gc.collect()
    gc.freeze()
    for local in (False, True):
        settings = Settings(
            REDIS_URL=URL,
            EMBEDDING_CACHE_NAMESPACE=f"stall{local}",
            EMBEDDING_CACHE_L1_BYTES=64 * 1024 * 1024 if local else 0,
            EMBEDDING_CACHE_TIMEOUT=5,
        )
        manager = RedisManager(settings)
        app = App()
        # To let go of 30 MB in one go, as a list of all parts would, is nothing that a server does.
        call = request(EmbeddingCacheMiddleware(app, redis=manager), TEXTS, "float", keep=False)
        await request(app, TEXTS, "float")()
        stalls = [await longest_stall(call) for _ in range(1 + STALLS)]
        where, warm = "in process" if local else "from Redis", stalls[1:]
        print(
            f"longest stall, 1000 x {DIMS} floats (<= 10 ms): cold {stalls[0]:.1f} ms; "
            f"warm {where} {statistics.median(warm):.1f} ms, at worst of {STALLS} {max(warm):.1f} ms"
        )
        await manager.close()
    await client.flushdb()
    await client.aclose()


if __name__ == "__main__":
    asyncio.run(main())
