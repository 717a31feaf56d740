"""The time as limits see it: the one place to read it.

This process's own clocks, and in Redis Redis's own, until a test holds them still
(`redis_asgi.testing`); nothing else sets them. The functions are attributes rather than methods so
that reading the time costs what it costs without them.
"""

import time
from collections.abc import Callable


class Clock:
    """The clocks that limits go by.

    Attributes:
        monotonic_ns: For counters of this process, in nanoseconds.
        monotonic: For remembered refusals, in seconds.
        unix: For ``X-RateLimit-Reset``, in seconds since 1970.
        redis: What Redis takes for its time, in microseconds since 1970; ``None`` = its own.
    """

    __slots__ = ("monotonic", "monotonic_ns", "redis", "unix")

    monotonic_ns: Callable[[], int]
    monotonic: Callable[[], float]
    unix: Callable[[], float]
    redis: int | None

    def __init__(self) -> None:
        self.let_go()

    def let_go(self) -> None:
        """Go by the real clocks."""
        self.monotonic_ns = time.monotonic_ns
        self.monotonic = time.monotonic
        self.unix = time.time
        self.redis = None


CLOCK = Clock()
