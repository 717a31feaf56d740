"""State that all requests of one middleware share."""

import asyncio
import weakref

from starlette.types import ASGIApp

from ..asgi.body_budget import process_budget
from ..connection.manager import RedisManager
from .origin.misfits import Misfits
from .origin.single_flight import Flights
from .records.clock import Clocks
from .records.metrics import CacheMetrics
from .records.options import Options
from .records.warnings import Warnings
from .requests.question import Questions
from .storage.vector_cache import VectorCache


class Shared:
    """See the module; one per middleware.

    Attributes:
        app: The wrapped app.
        options: Its configuration.
        settings: The rest of it.
        clock: The time.
        counts: Its metrics.
        warnings: What it has warned of.
        budget: Bytes of bodies that the process may hold.
        questions: Reads requests.
        vectors: What is kept.
        misfits: Whose requests go out whole.
    """

    def __init__(self, app: ASGIApp, manager: RedisManager, options: Options) -> None:
        self.app = app
        self.options = options
        self.settings = options.settings
        self.clock = Clocks()
        self.counts = CacheMetrics()
        self.warnings = Warnings()
        self.budget = process_budget()
        self.questions = Questions(options, self.warnings)
        self.vectors = VectorCache(manager, options, self.clock, self.counts, self.warnings)
        self.misfits = Misfits()
        self._flights: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Flights] = weakref.WeakKeyDictionary()
        manager.keep(self)

    def clear(self) -> None:
        """Forget what was seen so far: the in-process layer,
        who was denied, what defeats the cache.
        """
        self.vectors.clear()
        self.questions.clear()
        self.misfits = Misfits()

    @property
    def flights(self) -> Flights:
        """The running loop's flights."""
        loop = asyncio.get_running_loop()
        flights = self._flights.get(loop)
        if flights is None:
            flights = self._flights[loop] = Flights(self.settings.EMBEDDING_CACHE_TIMEOUT)
        return flights
