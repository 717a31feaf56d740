"""The settings in force of a middleware's cache, for those who ask without a request."""

from dataclasses import dataclass

from ..connection.manager import RedisManager
from ..settings import Settings


@dataclass(frozen=True, slots=True)
class CacheInForce:
    """The place where one middleware keeps vectors.

    Attributes:
        manager: Which Redis they are in.
        namespace: In every key.
        settings: Those it was built with.
    """

    manager: RedisManager
    namespace: str
    settings: Settings
