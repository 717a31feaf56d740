"""The cache's part in one request, for the app and for billing."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class EmbeddingCacheResult:
    """``request.state.embedding_cache_result`` on every request to an embedding endpoint.

    Attributes:
        outcome: ``hit``: all answered from the cache; ``miss``: none;
            ``partial``; ``bypass``: not looked at.
        hits: Different inputs found.
        misses: Different inputs the app computes for this request.
        collapsed: Different inputs another request was already waiting for.
        tokens: What the app would have counted without a cache; 0 until that is known.
        billed_tokens: What it counted for this request.
    """

    outcome: Literal["hit", "miss", "partial", "bypass"]
    hits: int = 0
    misses: int = 0
    collapsed: int = 0
    tokens: int = 0
    billed_tokens: int = 0
