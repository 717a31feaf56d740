"""Tools for tests of an app with limits: a clock to move,
limits to switch off, the computations really made.

With pytest its fixtures are there without an import; elsewhere the same are context managers::

    with held_clock() as clock:                  # fixture: rate_limit_clock
        assert_limited(client, "GET", "/report", after=5)
        clock.advance(61)

``clock``    the clock that limits go by, held       ``limited``  `assert_limited`
``off``      no limits                               ``calls``    what the cache lets through
``plugin``   the fixtures, and a new start of ``memory://`` for each test
"""

import importlib
from typing import TYPE_CHECKING, Any

from ..connection.manager import all_managers
from .clock import RateLimitClock, held_clock
from .limited import assert_limited
from .off import limits_off

if TYPE_CHECKING:
    from .calls import recorded_embedding_calls

__all__ = [
    "RateLimitClock",
    "assert_limited",
    "held_clock",
    "limits_off",
    "recorded_embedding_calls",
    "start_anew",
]


def __getattr__(name: str) -> Any:
    # At first use: it brings numpy, which tests of limits alone should not wait for.
    if name == "recorded_embedding_calls":
        return importlib.import_module(".calls", __name__).recorded_embedding_calls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def start_anew() -> None:
    """Forget what this process remembers: all that ``memory://`` keeps,
    refusals, vectors; nothing in Redis.

    The pytest plugin does so before each test, for an app built at import too.
    """
    for manager in all_managers():
        manager.clear()
