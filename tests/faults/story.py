"""What one row looks like from outside: an app that was well, is not, and is well again."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Self

import redis.asyncio as aioredis
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from redis_asgi import RedisManager, Settings, check_redis_health
from redis_asgi.connection.health_cache import Watch
from redis_asgi.telemetry import fresh_telemetry

from ..kit.logs import event_of
from ..kit.proxy import FaultProxy
from ..kit.servers import Server, wait_until
from .asking import Answer, Exchange, embedding, limited
from .service import MODES, Endpoints, build
from .table import Row, Scene

CREDENTIAL = "Bearer one"
EARLY, ILL, LATE, LAST = (f"10.0.0.{number}" for number in range(1, 5))
STORED = ("stored before", "stored too")
PAGES = ("/health/live", "/health/ready", "/health/", "/optional/ready", "/metrics/", "/metrics/json", "/status/")
_BURST = 8
_ROUNDS = 12
_GIVE_UP = 20.0  # seconds; a story that lasts longer has failed


class Control:
    """How late this loop wakes: what a deadline may be missed by, measured beside it.

    A machine that others use, a collection of garbage and the app's own work delay a plain timer as
    they delay a request, so that the difference between the two is the package's.
    """

    def __init__(self) -> None:
        self._lags: list[float] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._task is not None
        self._task.cancel()

    async def _watch(self) -> None:
        while True:
            due = time.perf_counter() + 0.002
            await asyncio.sleep(0.002)
            self._lags.append(time.perf_counter() - due)

    def worst(self) -> float:
        """The latest a timer has been since the last question, in seconds."""
        lags, self._lags = self._lags, []
        return max(lags, default=0.0)


@dataclass
class Phase:
    """What was asked and answered in one part of a story.

    Attributes:
        limited: By mode.
        embeddings: With the texts that were asked for.
        pages: By path.
        worst: The latest a timer of the loop was, in seconds.
        ping: The longest that a plain PING took beside it, in seconds, while Redis was well.
    """

    limited: dict[str, list[Answer]] = field(default_factory=lambda: {mode: [] for mode in MODES})
    embeddings: list[tuple[tuple[str, ...], Answer]] = field(default_factory=list)
    pages: dict[str, Answer] = field(default_factory=dict)
    worst: float = 0.0
    ping: float = 0.0

    @property
    def slowest(self) -> float:
        """Of all limited requests and embeddings, in seconds."""
        answers = [answer for answers in self.limited.values() for answer in answers]
        return max(answer.seconds for answer in [*answers, *(answer for _, answer in self.embeddings)])


@dataclass
class Told:
    """A whole story.

    Attributes:
        checked: What `check_redis_health` found while it was ill.
        later: When the breaker stands where it is going to.
        waited: Of requests that were run while the breaker was open,
            how many had something to wait for.
        recovered: From the cure to the first check that Redis decided,
            in seconds; ``None``: there is no cure.
        is_in_time: Whether that was before half a second and a plain PING after it had passed.
        charged: What Redis counted for the ill client, by mode.
        metrics: As scraped while it was ill.
        log: Events and reasons of the package, in order.
        others: Lines of other loggers, of which there should be none.
    """

    row: Row
    before: Phase = field(default_factory=Phase)
    during: Phase = field(default_factory=Phase)
    checked: dict[str, Any] = field(default_factory=dict)
    later: Phase = field(default_factory=Phase)
    after: Phase = field(default_factory=Phase)
    breaker: str = ""
    waited: int = 0
    recovered: float | None = None
    is_in_time: bool = False
    charged: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, dict[tuple[str, ...], float]] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    records: list[str] = field(default_factory=list)

    @property
    def is_disturbed(self) -> bool:
        """Whether the machine stood still for so long that deadlines passed for its own sake."""
        stood_still = max(max(phase.worst, phase.ping) for phase in (self.before, self.during, self.after))
        return stood_still > self.row.deadline / 2

    def transitions(self, to: str) -> float:
        """How often the breaker came *to* a state before it was last looked at."""
        return self.metrics.get("redis_asgi_breaker_transitions_total", {}).get((to,), 0)


class Listener(logging.Handler):
    """Collects what is said."""

    def __init__(self, told: Told) -> None:
        super().__init__(logging.WARNING)
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self._told.records.append(f"{record.getMessage()} {record.__dict__}")
        if record.name.startswith("redis_asgi"):
            event = event_of(record).removeprefix("redis_asgi.")
            self._told.log.append((event, str(getattr(record, "reason", ""))))
        else:
            self._told.others.append(f"{record.name}: {record.getMessage()}")


@contextmanager
def listening(told: Told) -> Any:
    """Whatever is logged within is *told*."""
    root, listener = logging.getLogger(), Listener(told)
    root.addHandler(listener)
    try:
        yield
    finally:
        root.removeHandler(listener)


def tell(row: Row, server: Server) -> Told:
    """Run the story of *row*, in a loop of its own."""
    told = Told(row)
    with fresh_telemetry(), listening(told):
        asyncio.run(asyncio.wait_for(_Story(row, server, told).run(), _GIVE_UP))
    return told


class _Story:
    def __init__(self, row: Row, server: Server, told: Told) -> None:
        self.row, self.server, self.told = row, server, told

    async def run(self) -> None:
        row, told = self.row, self.told
        async with FaultProxy(self.server.host, self.server.port) as proxy, Control() as self.control:
            url = row.url.format(address=f"127.0.0.1:{proxy.port}")
            self.settings = Settings(
                REDIS_URL=url,
                RATE_LIMIT_TIMEOUT=row.deadline,
                EMBEDDING_CACHE_TIMEOUT=row.deadline,
                EMBEDDING_CACHE_L1_BYTES=0,
                EMBEDDING_CACHE_NAMESPACE="faults",
                **{"REDIS_TIMEOUT": 1, **row.settings},
            )
            self.manager = RedisManager(self.settings)
            scene = Scene(self.server, proxy, self.manager)
            self.app = build(self.manager, Endpoints())
            await row.before(scene)
            if row.from_start:
                await row.inject(scene)
            else:
                await self._be_well(told.before, EARLY, *STORED)
                await row.inject(scene)
            await self._be_ill(scene)
            if row.heal is not None:
                await self._recover(scene, row.heal)
            await self.manager.close()
            if row.heal is not None:
                await asyncio.to_thread(wait_until, lambda: not self.server.connections(), "no connection is left")
            for undo in scene.undo:
                await undo()

    async def _be_well(self, phase: Phase, client: str, *texts: str) -> None:
        self._forget_health()
        for _ in range(2):  # once to be stored, once to be found
            await self._embed(phase, *texts)
        self.control.worst()
        beside = asyncio.create_task(self._ping_beside(phase))
        await self._burst(phase, client)
        await self._embed(phase, *texts)
        await self._look(phase)
        phase.worst = self.control.worst()
        beside.cancel()
        await asyncio.gather(beside, return_exceptions=True)

    async def _be_ill(self, scene: Scene) -> None:
        told, phase = self.told, self.told.during
        self._forget_health()
        self.control.worst()
        await asyncio.gather(
            self._burst(phase, ILL), self._embed(phase, *STORED), self.row.meanwhile(scene), self._live(phase)
        )
        for number in range(_ROUNDS):
            if number >= 2 and self.manager.breaker_state == self.row.breaker:
                break
            await asyncio.gather(
                *(self._ask(phase, mode, ILL) for mode in MODES),
                self._embed(phase, *STORED),
                self._embed(phase, f"new {number}", STORED[0]),
            )
        told.checked, _ = await asyncio.gather(self._check(), self._look(phase))
        phase.worst = self.control.worst()
        told.breaker = await self._until_breaker(self.row.breaker)
        await self._embed(told.later, *STORED)
        if told.breaker == "open":
            for mode in MODES:
                # Nobody comes between: whether it is open is known when the request begins.
                await self._until_breaker("open")
                told.waited += limited(self.app, mode, ILL).waits()
        told.metrics = samples(phase.pages["/metrics/"].body.decode())

    async def _recover(self, scene: Scene, heal: Any) -> None:
        told, phase = self.told, self.told.after
        await heal(scene)
        control = asyncio.create_task(self._half_a_second_later())
        recovery = asyncio.create_task(self._until_redis_decides())
        async with asyncio.timeout(_GIVE_UP / 2):
            await asyncio.wait({control, recovery}, return_when=asyncio.FIRST_COMPLETED)
            told.is_in_time = recovery.done()
            control.cancel()
            told.recovered = await recovery
        if self.row.keeps:
            told.charged = self._charged(ILL)
        await self._be_well(phase, LATE, *(STORED if self.row.keeps else ("new", "newer")))
        self._let_a_second_pass()
        await limited(self.app, "local", LAST).run()

    async def _half_a_second_later(self) -> None:
        """Half a second, and what it takes to connect and be answered."""
        await asyncio.sleep(0.5)
        url = str(self.settings.REDIS_URL and self.settings.REDIS_URL.get_secret_value())
        async with aioredis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=5) as plain:
            await plain.ping()

    async def _ping_beside(self, phase: Phase) -> None:
        """What Redis itself, or the machine, keeps everybody waiting for."""
        reader, writer = await asyncio.open_connection(self.server.host, self.server.port)
        try:
            while True:
                began = time.perf_counter()
                writer.write(b"PING\r\n")
                await reader.readline()
                phase.ping = max(phase.ping, time.perf_counter() - began)
                await asyncio.sleep(0.002)
        finally:
            writer.close()

    async def _until_redis_decides(self) -> float:
        """How long that took, in seconds."""
        began = time.perf_counter()
        for number in count():
            answer = await limited(self.app, "open", f"10.1.{number // 256}.{number % 256}").run()
            if answer.headers["x-source"] == "redis":
                break
            await asyncio.sleep(0.01)
        return time.perf_counter() - began

    async def _burst(self, phase: Phase, client: str) -> None:
        await asyncio.gather(*(self._ask(phase, mode, client) for mode in MODES for _ in range(_BURST)))

    async def _ask(self, phase: Phase, mode: str, client: str) -> None:
        phase.limited[mode].append(await limited(self.app, mode, client).run())

    async def _embed(self, phase: Phase, *texts: str) -> None:
        phase.embeddings.append((texts, await embedding(self.app, CREDENTIAL, *texts).run()))

    async def _live(self, phase: Phase) -> None:
        phase.pages["/health/live"] = await Exchange(self.app, "/health/live").run()

    async def _look(self, phase: Phase) -> None:
        for path in PAGES[1:] if "/health/live" in phase.pages else PAGES:
            phase.pages[path] = await Exchange(self.app, path).run()

    async def _check(self) -> dict[str, Any]:
        return await check_redis_health(await self.manager.get_connection())

    async def _until_breaker(self, state: str) -> str:
        until = time.perf_counter() + 3
        while self.manager.breaker_state != state and time.perf_counter() < until:
            # Where probes are answered and commands are not, it is half open now and then.
            await limited(self.app, "open", ILL).run()
            await asyncio.sleep(0.005)
        return self.manager.breaker_state

    def _charged(self, client: str) -> dict[str, int]:
        """What Redis has counted, read without the package."""
        fields: dict[bytes, bytes] = self.server.command("HGETALL", f"rate_limit:{{{client}}}")
        return {name.decode().partition(":")[0]: int(value.split()[1]) for name, value in fields.items()}

    # Time is an argument to what follows; here it is what has passed.

    def _forget_health(self) -> None:
        """A second passes: the next page looks again."""
        self.manager.per_client(Watch)._last = None

    def _let_a_second_pass(self) -> None:
        """Without trouble: the outage is over."""
        breaker = self.manager.breaker()
        breaker._last_trouble -= 1.0
        if breaker._settling is not None:
            breaker._settling.cancel()
            breaker._say_back()


def samples(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """A scrape: by name, and by the labels' values in the order of their names."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def statuses(answers: Iterable[Answer]) -> dict[int, int]:
    """How often each status came."""
    return dict(Counter(answer.status for answer in answers))
