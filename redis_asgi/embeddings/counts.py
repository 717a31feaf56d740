"""What the cache adds to the process's telemetry, its children bound once; no label carries a text or a key."""

from time import monotonic
from typing import Literal

from ..errors import Failure
from ..telemetry import telemetry
from ..tracing import annotate_span

Result = Literal["hit", "miss", "partial", "bypass", "stale", "error"]
Rejection = Literal["response-no-store", "vary", "integers", "not-understood", "status"]

_RESULTS: tuple[Result, ...] = ("hit", "miss", "partial", "bypass", "stale", "error")
# The tokens of `Cache-Status`; "partition" is what a partition_by let pass, and "other" a wire format's own word.
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
    "vary",
)
_REJECTIONS: tuple[Rejection, ...] = ("response-no-store", "vary", "integers", "not-understood", "status")


class Items:
    """Inputs, or ids: found, computed, and waited for while somebody else computed them."""

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


class Counts:
    """What all requests of one middleware count into."""

    def __init__(self) -> None:
        made = telemetry()
        self.items = Items()
        self.requests = {result: made.cache_requests.labels(result) for result in _RESULTS}
        self.bypasses = {token: made.cache_bypass.labels(token) for token in _BYPASSES}
        self._rejections = {reason: made.cache_rejected.labels(reason) for reason in _REJECTIONS}
        self.lookup_seconds = made.cache_lookup_duration
        self.store_seconds = made.cache_store_duration
        self.origin_seconds = made.cache_origin_duration
        self.stored_bytes = made.cache_stored_bytes
        self.served_bytes = made.cache_served_bytes
        self.saved_tokens = made.cache_saved_tokens

    def rejected(self, reason: str) -> None:
        """Count an answer of the app that is not stored; *reason* is a `Rejection`."""
        self._rejections[reason if reason in self._rejections else "not-understood"].inc()


class Counted:
    """One request: its result may change until it ends, and is counted then, once."""

    __slots__ = ("_counts", "_reason", "_result")

    def __init__(self, counts: Counts) -> None:
        counts.items.tick()
        self._counts = counts
        self._result: Result = "error"
        self._reason = ""

    def turns_out(self, result: Result, reason: str = "") -> None:
        """Say what the request turns out to be; *reason*: the token of its bypass."""
        self._result, self._reason = result, reason
        annotate_span(cache_result=result)

    def served(self, size: int, saved_tokens: int) -> None:
        """Count the bytes of the vectors that were found and go out, and the tokens the app need not count."""
        self._counts.served_bytes.inc(size)
        self._counts.saved_tokens.inc(saved_tokens)

    def end(self) -> None:
        """Count it."""
        counts = self._counts
        counts.requests[self._result].inc()
        if self._result == "bypass":
            counts.bypasses[self._reason if self._reason in counts.bypasses else "other"].inc()


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
