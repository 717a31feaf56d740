"""The bytes of bodies that all middlewares of this process may hold at once."""

import threading
from functools import lru_cache

_BUFFERED_BYTES = 256 * 1024 * 1024  # of bodies, in the process
TOGETHER = 4096  # bytes; kept one by one, messages of a few bytes would take two hundred times their size


class Budget:
    """Bytes of bodies that are held at once, at most *limit*.

    Attributes:
        left: Bytes that may be held beside those.
    """

    def __init__(self, limit: int) -> None:
        self.left = limit
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Whether *size* more bytes may be held; give them back later."""
        with self._lock:
            if size > self.left:
                return False
            self.left -= size
            return True

    def give(self, size: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self.left += size


@lru_cache(maxsize=1)
def process_budget() -> Budget:
    """The budget of this process, shared by all middlewares and all loops."""
    return Budget(_BUFFERED_BYTES)
