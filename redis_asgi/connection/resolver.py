"""Addresses of host names, looked up in threads of our own.

asyncio asks the resolver in the loop's default executor, once for each connection: one that hangs
for Redis's name takes all threads that the app has for its own look-ups, files and
``asyncio.to_thread``. Here at most one look-up of a name is under way in a process, and at most
`MAX_LOOKUPS` in all. While the resolver does not answer, the last answer is used.
"""

import asyncio
import ipaddress
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TypeAlias, TypeVar

from ..events import say

logger = logging.getLogger("redis_asgi.connection")

T = TypeVar("T")
Addresses: TypeAlias = tuple[str, ...] | socket.gaierror

MAX_LOOKUPS = 4
_PATIENCE = 0.05  # seconds for a look-up before the last answer is used meanwhile; a probe has 0.2 for everything
_KEPT = 600.0  # seconds that an answer may be used when there is no newer one
_SILENT = 1.0  # seconds without an answer that are worth a line in the log
_MAX_NAMES = 1000  # remembered; a cluster or a sentinel may name any
_LOOPBACK = ("127.0.0.1", "::1")


def ask_resolver(host: str) -> tuple[str, ...]:
    """The addresses of *host*, as the system says, each once.

    Raises:
        OSError: When it says that there are none, or nothing.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


def known_without_asking(host: str) -> tuple[str, ...]:
    """The addresses of *host* if it is an address itself, or this machine; else none."""
    if host.lower().rstrip(".") == "localhost":
        return _LOOPBACK
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return ()
    return (host,)


class _Lookup:
    """A question that is queued or with the resolver, and who waits for its answer."""

    __slots__ = ("began", "host", "is_told", "waiters")

    def __init__(self, host: str, began: float) -> None:
        self.host = host
        self.began = began
        self.is_told = False  # whether the log has a line about its silence
        self.waiters: dict[asyncio.Future[Addresses], asyncio.AbstractEventLoop] = {}


class Names:
    """The names of one process; for any number of event loops and threads.

    Args:
        look_up: Asks the resolver, in a thread.
        clock: Seconds, as `time.monotonic`.
        patience: Seconds that a look-up may take before the last answer is used meanwhile.
    """

    def __init__(
        self,
        look_up: Callable[[str], tuple[str, ...]] = ask_resolver,
        *,
        clock: Callable[[], float] = time.monotonic,
        patience: float = _PATIENCE,
    ) -> None:
        self._look_up = look_up
        self._clock = clock
        self._patience = patience
        self._lock = threading.Lock()
        self._under_way: dict[str, _Lookup] = {}
        self._queue: deque[_Lookup] = deque()
        self._threads = 0
        self._last: dict[str, tuple[float, tuple[str, ...]]] = {}
        self._failed: dict[str, dict[str, float]] = {}

    async def addresses_of(self, host: str) -> tuple[str, ...]:
        """The addresses of *host*; the caller has the only deadline.

        Raises:
            socket.gaierror: When the resolver says that it is nowhere,
                or says nothing and never did lately.
        """
        known = known_without_asking(host)
        if known:
            return known
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Addresses] = loop.create_future()
        lookup = self._join(host, future, loop)
        last = self._last_of(host)
        try:
            # Those who join a look-up that hangs already do not wait again.
            left = None if last is None else max(0.0, lookup.began + self._patience - self._clock())
            await asyncio.wait({future}, timeout=left)
        finally:
            self._leave(lookup, future)
        answer = future.result() if future.done() else None
        if isinstance(answer, tuple):
            return answer
        if last is not None and (answer is None or answer.errno == socket.EAI_AGAIN):
            self._tell(lookup)
            return last
        # Of its own, as a traceback grows with everybody who raises it.
        raise socket.gaierror(*(answer.args if answer is not None else ()))

    async def reach(self, host: str, connect: Callable[[str], Awaitable[T]]) -> T:
        """Connect to the first address of *host* that works;
        those that lately did not are tried last.

        Raises:
            OSError: What the first address raised, when none works.
        """
        first: OSError | None = None
        for address in self._in_order(host, await self.addresses_of(host)):
            try:
                made = await connect(address)
            except OSError as error:
                self._note(host, address, works=False)
                first = first or error
            except BaseException:
                # Who gives up here has often waited too long: the next one begins with another.
                self._note(host, address, works=False)
                raise
            else:
                self._note(host, address, works=True)
                return made
        raise first or socket.gaierror(socket.EAI_NONAME, "no address")

    def _join(self, host: str, future: asyncio.Future[Addresses], loop: asyncio.AbstractEventLoop) -> _Lookup:
        with self._lock:
            lookup = self._under_way.get(host)
            is_new = lookup is None
            if lookup is None:
                lookup = self._under_way[host] = _Lookup(host, self._clock())
                self._queue.append(lookup)
            lookup.waiters[future] = loop
            needs_thread = is_new and self._threads < MAX_LOOKUPS
            self._threads += needs_thread
        if needs_thread:
            try:
                threading.Thread(target=self._work, name="redis_asgi.names", daemon=True).start()
            except RuntimeError:
                # No thread can be had, or the interpreter ends.
                with self._lock:
                    self._threads -= 1
                    self._withdraw(lookup)
                self._settle(lookup, socket.gaierror(socket.EAI_AGAIN, "no thread for a look-up"))
        return lookup

    def _leave(self, lookup: _Lookup, future: asyncio.Future[Addresses]) -> None:
        with self._lock:
            lookup.waiters.pop(future, None)
            if not lookup.waiters:
                self._withdraw(lookup)

    def _withdraw(self, lookup: _Lookup) -> None:
        """Take *lookup* back if the resolver has not been asked yet."""
        if lookup in self._queue:
            self._queue.remove(lookup)
            del self._under_way[lookup.host]

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._threads -= 1
                    return
                lookup = self._queue.popleft()
            answer = self._answer(lookup.host)
            with self._lock:
                del self._under_way[lookup.host]
                if isinstance(answer, tuple):
                    self._last.pop(lookup.host, None)
                    self._last[lookup.host] = (self._clock(), answer)
                    _bound(self._last)
            self._settle(lookup, answer)

    def _answer(self, host: str) -> Addresses:
        try:
            found = self._look_up(host)
        except socket.gaierror as error:
            return socket.gaierror(*error.args)
        except Exception as error:
            # Such as a name that IDNA cannot write.
            return socket.gaierror(socket.EAI_NONAME, str(error))
        return found or socket.gaierror(socket.EAI_NONAME, "no address")

    def _settle(self, lookup: _Lookup, answer: Addresses) -> None:
        with self._lock:
            waiters = list(lookup.waiters.items())
        for future, loop in waiters:
            with suppress(RuntimeError):  # its loop was closed meanwhile
                loop.call_soon_threadsafe(_wake, future, answer)

    def _last_of(self, host: str) -> tuple[str, ...] | None:
        with self._lock:
            at, addresses = self._last.get(host, (0.0, None))
        return addresses if addresses is not None and self._clock() - at < _KEPT else None

    def _tell(self, lookup: _Lookup) -> None:
        if lookup.is_told or self._clock() - lookup.began < _SILENT:
            return
        lookup.is_told = True
        say(logger, "resolver_silent")  # the name stays out of the log

    def _in_order(self, host: str, addresses: Sequence[str]) -> list[str]:
        with self._lock:
            failed = self._failed.get(host, {})
            for address in failed.keys() - set(addresses):
                del failed[address]
            return sorted(addresses, key=lambda address: failed.get(address, 0.0))

    def _note(self, host: str, address: str, *, works: bool) -> None:
        with self._lock:
            if works:
                self._failed.get(host, {}).pop(address, None)
            else:
                self._failed.setdefault(host, {})[address] = self._clock()
                _bound(self._failed)


def _bound(table: dict[str, T]) -> None:
    while len(table) > _MAX_NAMES:
        del table[next(iter(table))]


def _wake(future: asyncio.Future[Addresses], answer: Addresses) -> None:
    if not future.done():
        future.set_result(answer)


class _Process:
    """The names of this process: after a fork the threads are gone,
    and a lock may be held for ever.
    """

    pid = 0
    names = Names()


def names() -> Names:
    """The names of this process."""
    pid = os.getpid()
    if _Process.pid != pid:
        _Process.names, _Process.pid = Names(), pid
    return _Process.names
