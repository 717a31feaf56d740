"""Computations of `EmbeddingCache` under way, and the changes by others that win over them."""

import asyncio
import concurrent.futures
import threading
from collections import Counter
from collections.abc import Iterable, Sequence

from ...settings import Settings
from ..records.codec import Float32Array


class Computation:
    """Ids that one task looks up and computes for everybody who waits.

    Args:
        ids: What it is to find.
        under_way: Where callers find it by id; it takes its place there at once, and leaves it with
            the last caller that waits, so that none joins what is being given up.
    """

    def __init__(self, ids: Sequence[str], under_way: dict[str, "Computation"]) -> None:
        self.ids = tuple(ids)
        self.superseded: set[str] = set()  # ids that were set or deleted meanwhile
        self.writing = False
        self.ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.task: asyncio.Task[None] | None = None
        self.vectors: asyncio.Future[dict[str, Float32Array]] = asyncio.get_running_loop().create_future()
        self.given_up = False
        self._under_way = under_way
        self._waiting = 0
        under_way.update(dict.fromkeys(self.ids, self))

    def join(self) -> None:
        """Note one more who waits."""
        self._waiting += 1

    def leave(self) -> None:
        """Note one less; when that was the last and there are no vectors yet,
        no caller joins any more and it ends.
        """
        self._waiting -= 1
        if self._waiting == 0 and not self.vectors.done():
            self.given_up = True
            self.step_down()
            if self.task is not None:
                self.task.cancel()

    def fail(self, error: BaseException) -> None:
        """Let everyone who waits raise *error*."""
        if not self.vectors.done():
            self.vectors.set_exception(raisable(error))
            self.vectors.exception()  # seen, also when no caller waits any more

    def step_down(self) -> None:
        """Be found no longer; ids that another one has taken over stay his."""
        for name in self.ids:
            if self._under_way.get(name) is self:
                del self._under_way[name]


class Changes:
    """The ids being computed or changed now,
    in all caches of one manager and all loops of the process.
    """

    def __init__(self, _settings: Settings) -> None:
        self._changing: Counter[str] = Counter()
        self._computing: dict[str, set[Computation]] = {}
        self._lock = threading.Lock()

    def begin(self, computation: Computation) -> None:
        """Note *computation*; ids that are being changed are superseded at once."""
        with self._lock:
            for name in computation.ids:
                self._computing.setdefault(name, set()).add(computation)
                if name in self._changing:
                    computation.superseded.add(name)

    def end(self, computation: Computation) -> None:
        """Let go of *computation*, and of who waits for it; once is enough."""
        with self._lock:
            if computation.ended.done():
                return
            for name in computation.ids:
                self._computing[name].remove(computation)
                if not self._computing[name]:
                    del self._computing[name]
            computation.ended.set_result(None)

    def changing(self, ids: Iterable[str], by: int) -> None:
        """Note that so many more or fewer are changing each of *ids*."""
        with self._lock:
            for name in ids:
                self._changing[name] += by
                if not self._changing[name]:
                    del self._changing[name]

    def supersede(self, ids: Iterable[str]) -> set[Computation]:
        """Let computations of *ids* keep nothing for them; gives those that are past that."""
        found: set[Computation] = set()
        with self._lock:
            for name in ids:
                for computation in self._computing.get(name, ()):
                    computation.superseded.add(name)
                    found.add(computation)
        return {computation for computation in found if computation.writing}


def raisable(error: BaseException) -> BaseException:
    """An exception that a future can raise in place of *error*.

    With a `StopIteration` it would never be done, and a `CancelledError` would tell callers that
    were not cancelled that they were.
    """
    if isinstance(error, StopIteration | asyncio.CancelledError):
        raised = RuntimeError(f"compute raised {type(error).__name__}. Ask again.")
        raised.__cause__ = error
        return raised
    return error
