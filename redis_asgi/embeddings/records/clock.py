"""The time, for what is kept and what is believed."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Clocks:
    """Two clocks of one middleware; a test sets others.

    Attributes:
        wall: Unix seconds, which all processes share: of births, leases and refusals.
        monotonic: Seconds of this process: of what it believes unasked.
    """

    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
