"""The configuration of one middleware."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from ...settings import Settings
from .lease import MODEL_SECONDS

PartitionBy = Callable[[HTTPConnection], "str | Awaitable[str | None] | None"]


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments of a middleware, else its settings; units are those of ``EMBEDDING_CACHE_*``."""

    ttl: float
    namespace: str
    share: bool
    lease: float | None  # None: "off"
    partition_by: PartitionBy | None
    settings: Settings

    @property
    def lease_seconds(self) -> float:
        """For how long a full hit is answered after the app was asked; 0 = never."""
        return min(self.ttl if self.lease is None else self.lease, MODEL_SECONDS)
