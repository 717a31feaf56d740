"""A clock that stands while the machine has no time for this process.

Whether nobody waits longer than a deadline cannot be told by the clock on the wall of a machine
that others use too.
"""

import threading
import time

_TICK = 0.001  # seconds
_MOST = 0.01  # seconds that one tick may take; what is beyond was the machine's


class _Clock:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._seconds = 0.0
        self._looked = 0.0

    def read(self) -> float:
        with self._lock:
            if self._thread is None:
                self._looked = time.monotonic()
                self._over.clear()
                self._thread = threading.Thread(target=self._run, name="fair-time", daemon=True)
                self._thread.start()
            return self._seconds + min(time.monotonic() - self._looked, _MOST)

    def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._over.set()
            thread.join()

    def _run(self) -> None:
        while not self._over.wait(_TICK):
            with self._lock:
                now = time.monotonic()
                self._seconds += min(now - self._looked, _MOST)
                self._looked = now


_CLOCK = _Clock()


def fair_time() -> float:
    """Seconds since some moment, without those that this process had to wait for a core.

    They are never more than those of ``time.monotonic()``: of use for upper bounds only.
    """
    return _CLOCK.read()


def stop_fair_time() -> None:
    """End its thread, which the next reading starts anew; each test's end does."""
    _CLOCK.stop()
