"""The counters and timings that both middlewares add to, and a short history of them; no I/O.

`telemetry()` gives the process's one `Telemetry`. Hot paths bind their children once,
``.labels(...)`` being four times as dear as the ``inc()`` that follows. What would count once per
request is noted instead, see `CountBuffer`; what counts rarely calls ``tick(time.monotonic())``
before it does. prometheus-client is imported at the first use, not with the package.
"""

import threading
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from .count_buffer import CountBuffer
from .errors import ConfigurationError

if TYPE_CHECKING:
    from prometheus_client import Metric

    from .bulk_metrics import Counter, Histogram

__all__ = [
    "Telemetry",
    "fresh_telemetry",
    "telemetry",
]

PREFIX = "redis_asgi"
SAMPLE_SECONDS = 5.0
SAMPLES_KEPT = 120  # ten minutes

# Seconds. A check takes 0.1 to 1 ms; past RATE_LIMIT_TIMEOUT there is none.
_REDIS_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_ORIGIN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_UNIT_BUCKETS = (0, 10, 100, 1_000, 10_000, 100_000)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)

_NO_POLICIES: Mapping[str, tuple[int, int, int]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Sample:
    """The counts of this process in one interval.

    Attributes:
        at: The end of the interval, in Unix seconds.
        seconds: Its length.
        allowed: Requests that the limiter admitted.
        refused: Requests over quota, answered with 429.
        exempt: Requests that no limit covered.
        unavailable: Requests answered with 503, because Redis was needed and gone.
        hits: Inputs of embedding requests that were stored.
        misses: Inputs that were computed;
            neither counts an input that waited for another request's computation.
        fallbacks: Checks that were decided without Redis because it gave no answer.
        policies: Of each policy that was asked, the requests it admitted, refused,
            and would have refused if it were no shadow.
    """

    at: float
    seconds: float
    allowed: int = 0
    refused: int = 0
    exempt: int = 0
    unavailable: int = 0
    hits: int = 0
    misses: int = 0
    fallbacks: int = 0
    policies: Mapping[str, tuple[int, int, int]] = field(default_factory=lambda: _NO_POLICIES)


class Telemetry:
    """Every metric the package counts itself,
    in a registry of its own, and what they counted lately.

    Metrics are plain ones of prometheus-client. Gauges are not among them:
    `metrics_app()` reads those when it is asked.

    Args:
        now: When history begins, in monotonic seconds; ``None`` = now.

    Raises:
        ConfigurationError: If ``PROMETHEUS_MULTIPROC_DIR`` names no directory that can be written
            to.
    """

    def __init__(self, *, now: float | None = None) -> None:
        # Here, not above: it costs as much as the rest of the package, and an app may never count.
        from prometheus_client import CollectorRegistry  # noqa: PLC0415

        self.buffer = CountBuffer(self.tick)
        buffer = self.buffer

        class Registry(CollectorRegistry):
            """A registry that is up to date when it is read."""

            def collect(self) -> "Iterable[Metric]":
                buffer.flush()
                return super().collect()

        self.registry = Registry()
        try:
            self._make_metrics()
        except OSError as error:
            # Only in multi-process mode do metrics live in files.
            raise ConfigurationError(
                f"PROMETHEUS_MULTIPROC_DIR is not a directory that can be written to ({type(error).__name__}). "
                "Make it, and empty it, before the first worker starts; or unset it to count in each process."
            ) from None
        self._lock = threading.Lock()
        self._samples: deque[Sample] = deque(maxlen=SAMPLES_KEPT)
        self._counted: Mapping[tuple[str, ...], float] = {}
        self._due = (time.monotonic() if now is None else now) + SAMPLE_SECONDS

    def tick(self, now: float) -> None:
        """Take a sample for every interval of 5 s that has ended; nearly free when none has.

        Call it once per request, before the request is counted: what was counted since the last
        sample is then known to belong to the interval that began with it, however long ago that
        was.

        Args:
            now: ``time.monotonic()``.
        """
        if now >= self._due:
            self._sample(now)

    def history(self, now: float | None = None) -> tuple[Sample, ...]:
        """The counts of each interval of 5 s, oldest first; the last ten minutes at most.

        Intervals in which nothing happened are there, with zeros; the one that has not ended is
        not. In multi-process mode it is the history of this process alone.

        Args:
            now: In monotonic seconds; ``None`` = now.
        """
        now = time.monotonic() if now is None else now
        self.buffer.flush()
        self.tick(now)
        with self._lock:
            samples = tuple(self._samples)
        # Samples keep monotonic time, so that a clock that is set does not disorder them.
        to_unix = time.time() - now
        return tuple(replace(sample, at=sample.at + to_unix) for sample in samples)

    def _sample(self, now: float) -> None:
        with self._lock:
            if now < self._due:
                return  # another thread was first
            ended = int((now - self._due) // SAMPLE_SECONDS) + 1
            totals = self._totals()
            self._samples.append(_sample_of(self._due, _difference(totals, self._counted)))
            self._counted = totals
            # Counting ticks first, so that nothing was counted in the intervals after it.
            for n in range(max(1, ended - SAMPLES_KEPT), ended):
                self._samples.append(Sample(self._due + n * SAMPLE_SECONDS, SAMPLE_SECONDS))
            self._due += ended * SAMPLE_SECONDS

    def _totals(self) -> Mapping[tuple[str, ...], float]:
        """The totals that history is made of, by metric and the labels that matter to it."""
        totals: Tally[tuple[str, ...]] = Tally()
        for kind, metric, labels in (
            ("requests", self.ratelimit_requests, ("outcome",)),
            ("policy", self.ratelimit_policy, ("policy", "outcome")),
            ("fallback", self.ratelimit_fallback, ()),
            ("items", self.cache_items, ("result",)),
        ):
            for family in metric.collect():
                for sample in family.samples:
                    if sample.name.endswith("_total"):
                        totals[(kind, *(sample.labels[label] for label in labels))] += int(sample.value)
        return totals

    def _make_metrics(self) -> None:
        self.ratelimit_requests = self._counter(
            "ratelimit_requests", "Requests that reached the limiter, each once.", "outcome", "source"
        )
        self.ratelimit_policy = self._counter(
            "ratelimit_policy", "Decisions of each policy; a request may meet several.", "policy", "outcome"
        )
        self.ratelimit_fallback = self._counter(
            "ratelimit_fallback", "Checks decided without Redis because it gave no answer.", "mode", "reason"
        )
        self.ratelimit_check_duration = self._histogram(
            "ratelimit_check_duration_seconds",
            "How long a request waited for its verdict, when Redis was asked.",
            "source",
        )
        self.ratelimit_used_units = self._counter(
            "ratelimit_used_units", "Units that answers have cost, of what is known after them.", "policy"
        )
        self.ratelimit_estimate_error_units = self._histogram(
            "ratelimit_estimate_error_units",
            "How far what was charged before an answer was from what it cost.",
            "policy",
            "was",
            buckets=_UNIT_BUCKETS,
        )
        self.ratelimit_local_evictions = self._counter(
            "ratelimit_local_evictions", "Clients that a full process forgot before their windows had ended."
        )
        self.cache_requests = self._counter("cache_requests", "Embedding requests by what the cache did.", "result")
        self.cache_bypass = self._counter("cache_bypass", "Embedding requests that were passed through.", "reason")
        self.cache_items = self._counter("cache_items", "Inputs of embedding requests.", "result")
        self.cache_lookup_duration = self._histogram("cache_lookup_duration_seconds", "Reading vectors.")
        self.cache_store_duration = self._histogram("cache_store_duration_seconds", "Writing vectors.")
        self.cache_origin_duration = self._histogram(
            "cache_origin_duration_seconds", "Answers of the app to what was forwarded.", buckets=_ORIGIN_BUCKETS
        )
        self.cache_stored_bytes = self._counter("cache_stored_bytes", "Bytes of the vectors written.")
        self.cache_served_bytes = self._counter("cache_served_bytes", "Bytes of the vectors read and served.")
        self.cache_saved_tokens = self._counter("cache_saved_tokens", "Tokens of inputs that were not computed.")
        self.cache_rejected = self._counter("cache_rejected", "Answers of the app that were not stored.", "reason")
        self.redis_commands = self._counter("redis_commands", "Commands sent; a batch is one.", "op", "outcome")
        self.redis_command_duration = self._histogram(
            "redis_command_duration_seconds", "Commands, from sending to the reply.", "op"
        )
        self.redis_batch_size = self._histogram(
            "redis_batch_size", "Checks that shared one command.", buckets=_BATCH_BUCKETS
        )
        self.redis_script_loads = self._counter("redis_script_loads", "Times the script had to be sent whole.")
        self.redis_reconnects = self._counter("redis_reconnects", "Connections opened in place of lost ones.")
        self.redis_pool_wait = self._histogram("redis_pool_wait_seconds", "Waits for a connection, when none was free.")
        self.breaker_transitions = self._counter("breaker_transitions", "Times the breaker changed its state.", "to")

    def _counter(self, name: str, documentation: str, *labels: str) -> "Counter":
        from .bulk_metrics import Counter  # noqa: PLC0415

        return Counter(f"{PREFIX}_{name}", documentation, labels, registry=self.registry)

    def _histogram(
        self, name: str, documentation: str, *labels: str, buckets: tuple[float, ...] = _REDIS_BUCKETS
    ) -> "Histogram":
        from .bulk_metrics import Histogram  # noqa: PLC0415

        return Histogram(f"{PREFIX}_{name}", documentation, labels, buckets=buckets, registry=self.registry)


def _difference(
    totals: Mapping[tuple[str, ...], float], before: Mapping[tuple[str, ...], float]
) -> Mapping[tuple[str, ...], int]:
    found = {}
    for key, value in totals.items():
        # A fork starts its own files at zero:
        # a total that fell is counted from there, as Prometheus does it.
        gained = value - before.get(key, 0)
        found[key] = int(gained if gained >= 0 else value)
    return found


def _sample_of(end: float, counted: Mapping[tuple[str, ...], int]) -> Sample:
    policies: dict[str, tuple[int, int, int]] = {}
    for key, value in counted.items():
        if key[0] == "policy" and value:
            admitted, refused, shadowed = policies.get(key[1], (0, 0, 0))
            policies[key[1]] = (
                admitted + value * (key[2] == "allowed"),
                refused + value * (key[2] == "refused"),
                shadowed + value * (key[2] == "shadow_refused"),
            )
    return Sample(
        end,
        SAMPLE_SECONDS,
        allowed=counted.get(("requests", "allowed"), 0),
        refused=counted.get(("requests", "refused"), 0),
        exempt=counted.get(("requests", "exempt"), 0),
        unavailable=counted.get(("requests", "unavailable"), 0),
        hits=counted.get(("items", "hit"), 0),
        misses=counted.get(("items", "miss"), 0),
        fallbacks=counted.get(("fallback",), 0),
        policies=MappingProxyType(policies) if policies else _NO_POLICIES,
    )


_telemetry: Telemetry | None = None
_lock = threading.Lock()


def telemetry() -> Telemetry:
    """The process's one `Telemetry`, made at the first call."""
    global _telemetry  # noqa: PLW0603 - the process has one
    if _telemetry is None:
        with _lock:
            if _telemetry is None:
                _telemetry = Telemetry()
    return _telemetry


def flush_counts() -> None:
    """Tell what was noted, if anything was ever counted."""
    if _telemetry is not None:
        _telemetry.buffer.flush()


def discard_counts() -> None:
    """Forget what was noted, in a child that was just forked: its parent tells it."""
    if _telemetry is not None:
        _telemetry.buffer.discard()


@contextmanager
def fresh_telemetry(*, now: float | None = None) -> Iterator[Telemetry]:
    """For tests: what is built within counts into a `Telemetry` of its own, from zero.

    What was built before keeps the one it has bound, so make app and manager inside.

    Args:
        now: When its history begins, in monotonic seconds; ``None`` = now.
    """
    global _telemetry  # noqa: PLW0603 - the process has one
    with _lock:
        before, _telemetry = _telemetry, Telemetry(now=now)
        mine = _telemetry
    try:
        yield mine
    finally:
        with _lock:
            _telemetry = before
