"""The cache's metrics, their children bound once; no label carries a text or a key."""

from time import monotonic
from typing import Literal, get_args

from ...errors import Failure
from ...telemetry import telemetry

CacheResult = Literal["hit", "miss", "partial", "bypass", "stale", "error"]
Rejection = Literal["response-no-store", "vary", "not-understood", "status", "unique-header", "integers"]

_RESULTS: tuple[CacheResult, ...] = ("hit", "miss", "partial", "bypass", "stale", "error")
# The tokens of `Cache-Status`; "partition" is what a partition_by let pass,
# and "other" a wire format's own word.
_BYPASSES = (
    "body-header",
    "busy",
    "encoding",
    "integers",
    "item-lists",
    "late-chunking",
    "multi-vector",
    "no-store",
    "not-json",
    "not-understood",
    "other",
    "partition",
    "redis-down",
    "replayed",
    "response-no-store",
    "too-large",
    "unique-header",
    "vary",
)
_REJECTIONS: tuple[Rejection, ...] = get_args(Rejection)


class Items:
    """Inputs, or ids: found, computed, and waited for while another request computed them."""

    def __init__(self) -> None:
        self._telemetry = telemetry()
        items = self._telemetry.cache_items
        self._hits, self._misses, self._collapsed = (items.labels(name) for name in ("hit", "miss", "collapsed"))

    def tick(self) -> None:
        """Say that something is about to be counted."""
        self._telemetry.tick(monotonic())

    def add(self, hits: int = 0, misses: int = 0, collapsed: int = 0) -> None:
        """Count some of each."""
        if hits:
            self._hits.inc(hits)
        if misses:
            self._misses.inc(misses)
        if collapsed:
            self._collapsed.inc(collapsed)


class CacheMetrics:
    """The metrics that all requests of one middleware count into."""

    def __init__(self) -> None:
        made = telemetry()
        items = made.cache_items
        self._hits, self._misses, self._collapsed = (items.labels(name) for name in ("hit", "miss", "collapsed"))
        self._requests = {result: made.cache_requests.labels(result) for result in _RESULTS}
        self._bypasses = {token: made.cache_bypass.labels(token) for token in _BYPASSES}
        self._rejections = {reason: made.cache_rejected.labels(reason) for reason in _REJECTIONS}
        self._served_bytes = made.cache_served_bytes
        self._saved_tokens = made.cache_saved_tokens
        self._add = made.buffer.add
        self._lookup_seconds = made.cache_lookup_duration
        self.tell = made.buffer.flush
        self.store_seconds = made.cache_store_duration
        self.origin_seconds = made.cache_origin_duration
        self.stored_bytes = made.cache_stored_bytes

    def looked_up(self, seconds: float) -> None:
        """Count a lookup in Redis."""
        self._add((self._lookup_seconds, seconds))

    def request(
        self, result: CacheResult, reason: str, *, hits: int, misses: int, collapsed: int, size: int, tokens: int
    ) -> None:
        """Count a request.

        Args:
            result: What it turned out to be.
            reason: The token of its bypass.
            hits: Different inputs found.
            misses: Different inputs computed.
            collapsed: Different inputs that others were computing.
            size: Bytes of the vectors that were found and went out.
            tokens: Those that the app need not count.
        """
        self._add(
            (self._requests[result], 1),
            (self._hits, hits),
            (self._misses, misses),
            (self._collapsed, collapsed),
            (self._served_bytes, size),
            (self._saved_tokens, tokens),
        )
        if result == "bypass":
            self._add((self._bypasses[reason if reason in self._bypasses else "other"], 1))

    def rejected(self, reason: str) -> None:
        """Count an answer of the app that is not stored; *reason* is a `Rejection`."""
        self._rejections[reason if reason in self._rejections else "not-understood"].inc()


class Commands:
    """Trips to one Redis, by what for and how they ended."""

    def __init__(self) -> None:
        made = telemetry()
        self._outcomes = {
            (op, outcome): made.redis_commands.labels(op, outcome)
            for op in ("lookup", "store")
            for outcome in ("ok", *Failure)
        }
        self._seconds = {op: made.redis_command_duration.labels(op) for op in ("lookup", "store")}

    def count(self, op: Literal["lookup", "store"], failure: Failure | None, seconds: float) -> None:
        """Count one trip; *seconds* from leasing a connection to the last reply."""
        self._outcomes[op, failure or "ok"].inc()
        self._seconds[op].observe(seconds)
