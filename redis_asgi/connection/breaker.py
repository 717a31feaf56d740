"""The circuit breaker: after repeated failures no request waits for Redis any more,
until a probe has found it well.

::

    closed ── 5 failures in a row, 10 of the last 20, or a refused login or right ──> open
    open ── a probe answers ──> half open ── the one real command let through works ──> closed
                                    └── it fails ──> open
"""

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeAlias

from ..errors import Failure, classify
from ..events import say, words_for
from ..telemetry import telemetry
from . import side_connection

logger = logging.getLogger("redis_asgi.connection")

BreakerState: TypeAlias = Literal["closed", "half_open", "open"]

PROBE_EVERY = 0.2  # seconds, give or take a fifth, so that workers do not probe in step
PROBE_WITHIN = 0.2
_LOOKS = 20  # after a probe, within its limit
# Far away a connection and its greeting take longer than that,
# so one probe a second goes on while others are sent.
_KEPT_EVERY = 1.0
_KEPT_FOR = 5.0
_SLOW_PROBE_EVERY = 5.0  # a refused login stays refused, and each one is a line in the server's ACL log
_TRIAL_WITHIN = 1.0  # a trial that was never sent, since its request went away, does not keep others out for ever
_IN_A_ROW = 5
_REMEMBERED = (1 << 20) - 1  # the last 20 outcomes, one bit each
_TOO_MANY = 10
_QUIET = 60.0  # seconds between two lines about commands whose failure says nothing about the server
_SETTLED = 1.0  # seconds without trouble before an outage counts as over
_IN_DOUBT = 10.0  # seconds after the last trouble in which one that is not tried is taken for as ill as it was
_REFUSED = 20  # odd replies in a row that are more than a key of another program

# Our own load and faults, a full memory and odd replies say nothing about whether the server
# answers.
_SAYS_NOTHING = frozenset((Failure.POOL, Failure.REPLY, Failure.DEFECT))
_NOT_COUNTED = _SAYS_NOTHING | {Failure.OOM}
_ANSWERS = frozenset((Failure.OOM, Failure.REPLY))
_AT_ONCE = frozenset((Failure.AUTH, Failure.PERMISSION))
_OF_THE_CONNECTIONS = frozenset((Failure.READONLY, Failure.CLUSTER))


class Breaker:
    """The circuit breaker of one server of an open client, in its loop.

    The unit is one command sent, whose outcome is told to `worked` or `failed`; ask `admits` before
    the next. The log has one line when Redis is lost, one when it is back, and few about single
    commands.

    Args:
        probe: Asks the server for a sign of life over a connection of its own,
            and raises when there is none.
        drop_connections: Closes connections that may lead to the wrong server now.
        node: Of a cluster, whose lines in the log then say so.
        address: Where the server is, for the log: no user and no password.
        trial: Whether a command has to work, too, after a probe has;
            where none may come, the probe is enough.

    Attributes:
        state: Whether commands go through.
        reason: Why it is not closed; the last reason of all while it is.
        good_probes: How often a probe has half opened it;
            connections from before may be of the outage.
    """

    def __init__(
        self,
        probe: Callable[[], Awaitable[None]],
        drop_connections: Callable[[], Awaitable[None]],
        node: str = "",
        *,
        address: str = "?",
        trial: bool = True,
    ) -> None:
        self.state: BreakerState = "closed"
        self.reason = Failure.CONNECTION
        self.good_probes = 0
        self._probe = probe
        self._drop_connections = drop_connections
        self._whose = {"address": f"{node} of {address}", "node": node} if node else {"address": address}
        self._needs_trial = trial
        self._loop = asyncio.get_running_loop()
        self._failures = 0  # in a row
        self._refused = 0  # likewise, by odd replies
        self._refused_at = 0.0
        self._recent = 0
        self._unconfirmed = 0
        self._trial_until = 0.0
        self._lost = False
        self._last_trouble = 0.0
        self._dropped_at = -_IN_DOUBT
        self._last_line = -_QUIET
        self._settling: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        why = "" if self.state == "closed" else f" for {self.reason}"
        return f"<{type(self).__name__} of {self._whose['address']}, {self.state}{why}>"

    def admits(self) -> bool:
        """Whether a command may be sent now; half open, that is one."""
        if self.state == "closed":
            return True
        now = self._loop.time()
        if self.state == "open" or now < self._trial_until:
            return False
        self._trial_until = now + _TRIAL_WITHIN
        return True

    @property
    def is_in_doubt(self) -> bool:
        """Whether it is open, or half open and commands have failed lately."""
        if self.state == "half_open":
            return self._loop.time() < self._last_trouble + _IN_DOUBT
        return self.state == "open"

    @property
    def is_refused(self) -> bool:
        """Whether commands were answered by nothing but odd replies lately,
        as by a proxy that has lost its servers.
        """
        return self._refused >= _REFUSED and self._loop.time() < self._refused_at + _IN_DOUBT

    def withdrawn(self) -> None:
        """Note that a command which was admitted says nothing:
        half open, the next one is the trial.
        """
        self._trial_until = 0.0

    def worked(self, *, vectors: bool = False) -> None:
        """Note that a command was answered.

        Args:
            vectors: It moves vectors, which says nothing about others.
        """
        if not vectors:
            self._refused = 0
        if self.state == "half_open":
            self._failures = self._recent = 0
            self._change("closed")
        if self._recent:
            self._failures = 0
            self._recent = self._recent << 1 & _REMEMBERED
        if self._lost and self._settling is None:
            self._say_back()

    def failed(self, failure: Failure, *, vectors: bool = False) -> None:
        """Note that a command was not answered, or with an error.

        Args:
            vectors: It moves vectors, which may be slow for their size, or have rights of their
                own: it counts only when a probe sent next fails too.
        """
        now = self._loop.time()
        if failure in _ANSWERS:
            self.worked(vectors=True)
        if failure is Failure.REPLY and not vectors:
            self._refused += 1
            self._refused_at = now
        if failure in _SAYS_NOTHING:
            self.withdrawn()
            if now - self._last_line >= _QUIET:
                self._last_line = now
                say(logger, "command_failed", **words_for(failure), **self._whose)
            return
        self._last_trouble = now
        if not self._lost:
            self._lost = True
            say(logger, "redis_unavailable", **words_for(failure), **self._whose)
        if failure in _OF_THE_CONNECTIONS:
            self.reason, self._dropped_at = failure, now
            self._start(self._drop_connections())
        if failure in _NOT_COUNTED or self.state == "open":
            return
        # What the last probe found is known; half open, that is good.
        if not vectors or (self._failures and self.state == "closed"):
            self._count(failure)
            return
        # Until that is known it was no trial; half open,
        # the next one is, and that may be no vectors.
        self.withdrawn()
        self._unconfirmed += 1
        if self._unconfirmed == 1:
            self._start(self._confirm(failure))

    async def aclose(self) -> None:
        """End what is under way."""
        if self._settling is not None:
            self._settling.cancel()
        await side_connection.end(self._tasks)

    def _say_back(self) -> None:
        """Once there was no trouble for long enough; the next check asked for tells it."""
        self._settling = None
        if not self._lost or self.state != "closed":
            return
        left = self._last_trouble + _SETTLED - self._loop.time()
        if left > 0:
            self._settling = self._loop.call_later(left, self._say_back)
            return
        self._lost = False
        say(logger, "redis_back", **self._whose)

    def _count(self, failure: Failure, times: int = 1) -> None:
        self._failures += times
        for _ in range(times):
            self._recent = (self._recent << 1 | 1) & _REMEMBERED
        broken = failure in _AT_ONCE or self._failures >= _IN_A_ROW or self._recent.bit_count() >= _TOO_MANY
        if self.state == "half_open" or broken:
            # Who was under way on a connection that was dropped here brings no other reason.
            if failure is not Failure.CONNECTION or self._loop.time() >= self._dropped_at + _IN_DOUBT:
                self.reason = failure
            if self.state != "open":
                self._change("open")
                self._start(self._probing())

    def _change(self, state: BreakerState) -> None:
        self.state = state
        telemetry().breaker_transitions.labels(state).inc()
        say(logger, "breaker", state=state, reason=self.reason.value, **self._whose)

    def _start(self, work: Awaitable[None]) -> None:
        self._keep_until_done(asyncio.ensure_future(work))

    def _keep_until_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _alive(self, within: float) -> Failure | None:
        """The failure that a probe met; ``None`` is a sign of life.

        A loop that is kept busy could not have read an answer meanwhile, and its own slowness is no
        fault of the server's: the limit is counted in looks, each of which takes a few of its
        turns.

        Args:
            within: Its limit in seconds, of a loop that has time.
        """
        probe = asyncio.ensure_future(self._probe())
        try:
            for _ in range(_LOOKS):
                done, _ = await asyncio.wait([probe], timeout=within / _LOOKS)
                if done:
                    await probe
                    return None
        except Exception as error:
            # Whatever a client raises says that it could not ask.
            return classify(error)
        finally:
            await side_connection.end([probe])
        return Failure.TIMEOUT

    async def _confirm(self, failure: Failure) -> None:
        found = await self._alive(PROBE_WITHIN)
        times, self._unconfirmed = self._unconfirmed, 0
        if found is not None and self.state != "open":
            self._count(failure if found in _NOT_COUNTED else found, times)

    async def _probing(self) -> None:
        kept: set[asyncio.Task[Failure | None]] = set()
        kept_at = -math.inf
        try:
            while self.state == "open":
                every = _SLOW_PROBE_EVERY if self.reason in _AT_ONCE else PROBE_EVERY
                pause = every * random.uniform(0.8, 1.2)  # noqa: S311 - no secret
                # One that is kept is an answer whenever it comes.
                answered = await _first(kept, pause)
                probe: asyncio.Task[Failure | None] | None = None
                if not answered:
                    probe = asyncio.ensure_future(self._alive(_KEPT_FOR))
                    kept.add(probe)
                    await _first_sign(kept, probe, PROBE_WITHIN)
                answers = [each.result() for each in kept if each.done()]
                kept = {each for each in kept if not each.done()}
                if None in answers:
                    self.good_probes += 1
                    self._trial_until = 0.0
                    self._change("half_open")
                    if not self._needs_trial:
                        self.worked()
                    return
                found = next(filter(None, answers), Failure.TIMEOUT)
                if found not in _NOT_COUNTED:
                    self.reason = found
                if probe in kept and self._loop.time() < kept_at + _KEPT_EVERY:
                    kept.discard(probe)
                    # Its end is not waited for, while another one may have found life.
                    self._keep_until_done(probe)
                    probe.cancel()
                elif probe in kept:
                    kept_at = self._loop.time()
        finally:
            await side_connection.end(kept)


async def _first(tasks: set[asyncio.Task[Failure | None]], within: float) -> bool:
    """Whether any of *tasks* ends in so many seconds, which pass otherwise."""
    if not tasks:
        await asyncio.sleep(within)
        return False
    done, _ = await asyncio.wait(tasks, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    return bool(done)


async def _first_sign(
    kept: set[asyncio.Task[Failure | None]], probe: asyncio.Task[Failure | None], within: float
) -> None:
    """Wait until *probe* ends or another one that is kept finds life, or for so many seconds."""
    until = asyncio.get_running_loop().time() + within
    waiting = {each for each in kept if not each.done()}
    while probe in waiting and (left := until - asyncio.get_running_loop().time()) > 0:
        done, waiting = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if any(each.result() is None for each in done):
            return
