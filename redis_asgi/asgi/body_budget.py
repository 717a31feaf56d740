"""How many bytes of bodies are held at once, by all middlewares of this process together."""

import threading
from functools import lru_cache

_BUFFERED_BYTES = 256 * 1024 * 1024  # of bodies, in the process
TOGETHER = 4096  # bytes; kept one by one, messages of a few bytes would take two hundred times their size


class Budget:
    """Bytes of bodies that are held at once, at most *limit*."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Whether *size* more bytes may be held; give them back later."""
        with self._lock:
            if size > self._left:
                return False
            self._left -= size
            return True

    def give(self, size: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self._left += size


@lru_cache(maxsize=1)
def process_budget() -> Budget:
    """What all middlewares of this process share, whatever loops they run in."""
    return Budget(_BUFFERED_BYTES)
