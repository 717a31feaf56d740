"""Every line of the log: what an event means and what to do, in one table;
`say` is how each of them is logged.

A line's message holds the event, its cause and the cure, so that Python's own format tells the
whole story; for structured logs ``extra`` has the event's name in ``event`` (and without its prefix
in ``code``), the cure in ``fix``, and what the message is about in fields of its own.
``redis-asgi explain`` prints the table (`explanations`).
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .redaction import in_one_line, without_secrets

PREFIX = "redis_asgi."

FIELD = re.compile(r"%\((\w+)\)s")


@dataclass(frozen=True, slots=True)
class Event:
    """One kind of line.

    Attributes:
        level: Of `logging`.
        cause: What has happened, and why; ``%(name)s`` is a field of the line.
        fix: What to do.
        generally: What stands in the table where *fix* is another in each line (``%(cure)s``).
    """

    level: int
    cause: str
    fix: str
    generally: str = "See what its reason says: `redis-asgi explain REASON`."

    @property
    def fields(self) -> frozenset[str]:
        """The fields that its message shows."""
        return frozenset(FIELD.findall(f"{self.cause} {self.fix}"))


@dataclass(frozen=True, slots=True)
class Reason:
    """The reason why Redis gave no answer, in words:
    what a `redis_asgi.errors.Failure` stands for, and what to do.
    """

    cause: str
    fix: str


REASONS: Mapping[str, Reason] = {
    "timeout": Reason(
        "Redis does not answer in time.",
        "See whether it is stopped, overloaded or far away, whether it speaks TLS as the address says, and firewalls "
        "on the way; `redis-asgi check` says more.",
    ),
    "connection": Reason(
        "Redis cannot be reached.",
        "Check REDIS_URL, or REDIS_HOST and REDIS_PORT, and that the server runs and listens there; `redis-asgi check` "
        "says more.",
    ),
    "auth": Reason("Redis refuses the credentials.", "Check REDIS_USERNAME and REDIS_PASSWORD, or those in REDIS_URL."),
    "permission": Reason(
        "The Redis user may not do what is needed.", "`redis-asgi acl --user NAME` prints the rights it takes."
    ),
    "readonly": Reason(
        "Redis takes no writes: it is a replica, or its writes are stopped.",
        "Point it at the primary; if it is one, its log says why.",
    ),
    "loading": Reason("Redis is loading its data.", "Try again in a moment."),
    "busy": Reason("A script blocks Redis.", "SCRIPT KILL ends it."),
    "oom": Reason("Redis has no memory left and refuses writes.", "Raise its maxmemory."),
    "cluster": Reason(
        "Part of Redis is not served: a node is gone, no master is known, or a cluster is taken for one server.",
        "Bring the node back, or set REDIS_CLUSTER=true; `redis-asgi check` says which, and what the sentinels know.",
    ),
    "pool": Reason(
        "No connection was free in time: that is this process's own load, not Redis.", "Raise REDIS_POOL_SIZE."
    ),
    "wrong_loop": Reason(
        "The client belongs to another event loop.",
        "Pass redis= a URL or a RedisManager, which have a client for each loop.",
    ),
    "reply": Reason(
        "Redis answers oddly, or lacks a command that is needed: is it Redis, and nothing else on the way?",
        "See what listens at that address; `redis-asgi check` tries each command.",
    ),
    "defect": Reason(
        "Not Redis but the package, or a library's version, is at fault: the log has a traceback.",
        "Install a version of redis-py that the package allows; if it is one, report the traceback.",
    ),
}

# What health checks say beside these: ``redis_timeout`` and so on.
BREAKER_OPEN = Reason(
    "Redis answers again; the breaker is about to close.", "Nothing: it does so within half a second of good answers."
)

EVENTS: Mapping[str, Event] = {
    # Redis, and the way to it.
    "redis_unavailable": Event(
        logging.ERROR,
        "Redis (%(address)s) is lost: %(reason)s. %(cause)s Until it is back, on_redis_error decides about requests "
        "and every embedding is computed.",
        "%(cure)s",
    ),
    "redis_back": Event(
        logging.WARNING, "Redis (%(address)s) answers again, and is used again.", "Nothing is left to do."
    ),
    "command_failed": Event(
        logging.WARNING,
        "One command to Redis (%(address)s) failed: %(reason)s. %(cause)s It is decided without Redis; at most one "
        "such line a minute.",
        "%(cure)s",
    ),
    "breaker": Event(
        logging.DEBUG,
        "The breaker of Redis (%(address)s) is %(state)s now; the last failure: %(reason)s.",
        "While it is open no request waits for Redis, and a probe asks whether it is back.",
    ),
    "sentinels_refuse": Event(
        logging.ERROR,
        "The sentinels (%(address)s), not the master, refuse us: %(reason)s.",
        "Set REDIS_SENTINEL_USERNAME and REDIS_SENTINEL_PASSWORD to a user of theirs that may run SENTINEL MASTER; "
        "`redis-asgi check` says more.",
    ),
    "resolver_silent": Event(
        logging.WARNING,
        "The resolver does not answer for the name of a Redis server, so its last address is used, for 10 minutes at "
        "most.",
        "See to the name servers of this host.",
    ),
    "slots_enforced": Event(
        logging.WARNING,
        "Redis (%(address)s) refuses keys of several slots in one command, so each goes in one of its own.",
        "Set REDIS_BATCH=key for that from the start, or REDIS_CLUSTER=true if it is a cluster.",
    ),
    "no_cluster": Event(
        logging.WARNING,
        "REDIS_CLUSTER is set, and Redis (%(address)s) tells nothing of a cluster, so all keys are taken to be at that "
        "address, each in a command of its own.",
        "Unset REDIS_CLUSTER, and set REDIS_BATCH=key if it is an endpoint for several shards.",
    ),
    "tls_unverified": Event(
        logging.WARNING,
        "The URL of Redis (%(address)s) says %(option)s, so that somebody on the way can pose as Redis.",
        "Set REDIS_SSL_CA_CERTS to the authority's certificate instead.",
    ),
    "client_retries": Event(
        logging.WARNING,
        "The client given as redis= (%(address)s) tries a command %(retries)s times more. When a reply is lost, a "
        "command that is tried again runs again, so one request may be counted several times.",
        "Build the client with retry=Retry(NoBackoff(), 0).",
    ),
    "misspelt_setting": Event(
        logging.WARNING,
        "The variable %(variable)s looks like a setting, and is none: it changes nothing.",
        "If %(meant)s is meant, rename it; `redis-asgi settings` lists every one.",
    ),
    "connection_failed": Event(
        logging.ERROR,
        "%(operation)s, a @redis_operation, did not reach Redis: %(error)s. %(cause)s The error goes on to its caller.",
        "%(cure)s",
    ),
    "operation_failed": Event(
        logging.ERROR,
        "%(operation)s, a @redis_operation, got an error from Redis: %(error)s. %(cause)s It goes on to its caller.",
        "%(cure)s",
    ),
    "defect": Event(
        logging.ERROR,
        "%(error)s, which no Redis causes, was raised while Redis was asked; requests are decided as without Redis.",
        "Is redis-py of a version that the package allows? If so, it is a bug of the package: report it with the "
        "traceback.",
    ),
    "metrics_unreadable": Event(
        logging.ERROR,
        "The counters of all processes cannot be read (%(error)s), so a scrape is answered with 503.",
        "See to the files in PROMETHEUS_MULTIPROC_DIR: this process must be able to read and write them, and they must "
        "be removed when the app is started anew.",
    ),
    # Limits.
    "reset_failed": Event(
        logging.WARNING,
        "A client's counters were not reset in Redis (%(address)s): %(reason)s. %(cause)s",
        "Reset them again. %(cure)s",
    ),
    "forwarded_header_untrusted": Event(
        logging.WARNING,
        "The forwarding header %(header)s came from %(peer)s, which is not trusted, so clients behind it share its "
        "counter.",
        "If it is your proxy, set RATE_LIMIT_TRUSTED_PROXIES to its address or network; if clients reach the app "
        "directly, all is well.",
    ),
    "no_client_address": Event(
        logging.WARNING,
        "The server gives no client address, as on a unix socket, so all clients share one counter.",
        "If a proxy is at its other end, set RATE_LIMIT_TRUSTED_PROXIES=unix, and the proxy to overwrite its "
        "forwarding header; or partition by something else.",
    ),
    "mounted_twice": Event(
        logging.WARNING,
        "RateLimitMiddleware wraps this app twice with the same limit; the inner one skips it.",
        "Remove one.",
    ),
    "user_middleware_missing": Event(
        logging.WARNING,
        "The rule %(rule)s counts by user, and nothing outside of it has put a user into a request's scope, so "
        "everybody is counted as RATE_LIMIT_MISSING_IDENTITY says (%(missing)s).",
        "Call add_middleware(AuthenticationMiddleware, ...) after add_middleware(RateLimitMiddleware, ...): what is "
        "added last is outermost.",
    ),
    "cors_inside": Event(
        logging.WARNING,
        "A browser asks from another page (it sends Origin), and CORSMiddleware is inside of RateLimitMiddleware: a "
        "refusal carries no CORS headers, so the page sees a network error in place of the 429.",
        "Call add_middleware(CORSMiddleware, ...) last: what is added last is outermost.",
    ),
    "cost_never_fits": Event(
        logging.WARNING,
        "A request costs %(cost)s under the rule %(rule)s, whose quota is %(quota)s: it can never be admitted, however "
        "long its client waits.",
        "Raise the quota, or have cost= return no more than it.",
    ),
    "concurrency_denied": Event(
        logging.ERROR,
        "The Redis user may not run what concurrency limits take: requests under a rule with concurrency= are decided "
        "by each process alone.",
        "`redis-asgi acl --user NAME` prints the rights it takes; those of an earlier version lack ZADD, ZCOUNT, ZREM, "
        "ZRANGEBYSCORE and ZREMRANGEBYSCORE.",
    ),
    "usage_unreadable": Event(
        logging.WARNING,
        "An answer is encoded as '%(encoding)s' when the limiter sees it, so what it has used is not read, and its "
        "estimate stays under the rule %(rule)s.",
        "Compress outside of the limiter: what is added last with add_middleware is outermost.",
    ),
    "values_hidden": Event(
        logging.WARNING,
        "Nothing is ever counted as %(hidden)s of %(values)s: %(hiding)s stands before it, and the first that matches "
        "counts.",
        "Put the narrower pattern before the wider one: ['gpt-5-mini*', 'gpt-5*'].",
    ),
    "usage_undeclared": Event(
        logging.WARNING,
        "An answer has no Content-Type, and may be text that a model was told to write, so what it has used is not "
        "read, and its estimate stays under the rule %(rule)s.",
        "Give it its media type, such as StreamingResponse(..., media_type='text/event-stream'), or say what it used: "
        "request.state.rate_limit.used(n).",
    ),
    "limits_unreadable": Event(
        logging.WARNING,
        "The callable of the rule %(rule)s returned limits that cannot be read: %(why)s. Such a client has its last "
        "readable limits, else the default ones.",
        "Have it return notation such as '100/minute', or None for not limited.",
    ),
    "small_sliding_quota": Event(
        logging.WARNING,
        "Under the policy %(policy)s, a sliding-window-counter, a client that used its quota of %(quota)s waits up to "
        "%(wait)s s, which is longer than its window.",
        "For a quota of %(quota)s use moving-window or gcra.",
    ),
    # The embedding cache.
    "embedding_writes_paused": Event(
        logging.WARNING,
        "Redis (%(address)s) has no memory left for vectors, so none is written for 10 s; those that are there are "
        "read.",
        "Raise its maxmemory, set its maxmemory-policy to allkeys-lru or allkeys-lfu, or give vectors a server of "
        "their own with EMBEDDING_CACHE_REDIS_URL.",
    ),
    "embedding_namespace_empty": Event(
        logging.WARNING,
        "EMBEDDING_CACHE_NAMESPACE is empty: any service on this Redis (%(address)s) answering that path and model "
        "shares its vectors.",
        "Set EMBEDDING_CACHE_NAMESPACE to your model and its revision.",
    ),
    "embedding_cache_defeated": Event(
        logging.WARNING,
        "%(what)s is in the cache's key and new in every request, so nothing is found again; while that lasts, nothing "
        "is stored.",
        "%(cure)s",
        "If it chooses no tenant, model or permission, put it into EMBEDDING_CACHE_IGNORED_HEADERS or "
        "EMBEDDING_CACHE_IGNORED_FIELDS; if it says who asks, give partition_by what stays the same of a caller.",
    ),
    "embedding_response_not_stored": Event(
        logging.WARNING,
        "The app's embeddings are not stored: its Cache-Control forbids it.",
        "If that comes from a middleware for security headers, exempt the embedding endpoint there.",
    ),
    "embedding_response_varies": Event(
        logging.WARNING,
        "The app's embeddings are not stored: its Vary names the header %(header)s, which is not in the cache's key.",
        "Put %(header)s into EMBEDDING_CACHE_KEYED_HEADERS, or do not send that Vary.",
    ),
    "embedding_item_lists": Event(
        logging.WARNING,
        "The body's field %(about)s is as long as the inputs, and may belong to them one by one, so such requests pass "
        "through uncached.",
        "If it belongs to the whole request, add it to EMBEDDING_CACHE_REQUEST_LISTS.",
    ),
    "embedding_answers_not_understood": Event(
        logging.WARNING,
        "The app does not answer a smaller %(wire_format)s request as it answers the whole one, so for a minute at a "
        "time its requests with a miss go out whole.",
        "See what it answers to fewer inputs.",
    ),
    "embedding_lengths_differ": Event(
        logging.WARNING,
        "Vectors of the model '%(model)s' differ in length from those stored, which are dropped: the model has "
        "changed, or two services share a namespace.",
        "Set EMBEDDING_CACHE_NAMESPACE to your model and its revision.",
    ),
    "embedding_model_changed": Event(
        logging.WARNING,
        "The app answers requests for '%(requested)s' with different models (before: %(before)s, now: %(now)s); their "
        "vectors are kept apart.",
        "Give each model a name of its own, or live with fewer hits.",
    ),
    "embedding_request_unreadable": Event(
        logging.WARNING,
        "The wire format %(wire_format)s fails to read a request (%(failure)s), which passes through uncached.",
        "If it is your own, correct its split(); else report it.",
    ),
    "embedding_wire_format_fails": Event(
        logging.WARNING,
        "The wire format %(wire_format)s fails: its %(step)s gave %(got)s. The request passes through uncached.",
        "If it is your own, correct it; else report it.",
    ),
    "embedding_answer_unreadable": Event(
        logging.ERROR,
        "The wire format %(wire_format)s fails to read an answer, which is relayed as it is and not stored.",
        "If it is your own, correct its read(); else report it with the traceback.",
    ),
}


def say(logger: logging.Logger, event: str, error: BaseException | None = None, /, **fields: object) -> None:
    """Log *event*, a name in `EVENTS`.

    Args:
        error: Whose traceback is logged with it.
        fields: What its texts name, and whatever else structured logs are to have. Strings may be a
            client's: the message shows them in one line, and no user or password of a URL in them.
    """
    row = EVENTS[event]
    if not logger.isEnabledFor(row.level):
        return
    fields = {name: without_secrets(value) if isinstance(value, str) else value for name, value in fields.items()}
    shown = {name: in_one_line(str(value)) for name, value in fields.items()}
    extra = {"event": PREFIX + event, "code": event, "fix": row.fix % shown}
    # The template stays the same for an event, which is what tools group lines by.
    template = f"{PREFIX}{event}: {row.cause} {row.fix}"
    logger.log(row.level, template, *([shown] if shown else []), exc_info=error, stacklevel=2, extra=extra | fields)


class SaidOnce:
    """Lines that are said the first time only.

    Args:
        logger: Where they are said.
        most: How many are said at most of what clients name: an *about* that is not empty.
    """

    def __init__(self, logger: logging.Logger, most: int = 64) -> None:
        self._logger = logger
        self._most = most
        self._said: set[tuple[str, str]] = set()

    def is_new(self, event: str, about: str = "") -> bool:
        """Whether *event* has still to be said of *about*; from now on it has been."""
        known = (event, about)
        if known in self._said or (about and len(self._said) >= self._most):
            return False
        self._said.add(known)
        return True

    def say(self, event: str, about: str = "", **fields: object) -> None:
        """`say`, the first time only; *about*: for each of these, as long as there are few."""
        if self.is_new(event, about):
            say(self._logger, event, **({"about": about, **fields} if about else fields))


def words_for(reason: str) -> dict[str, str]:
    """The fields of a line about *reason*, a `Failure`: itself, what it means, and what to do."""
    found = REASONS[reason]
    return {"reason": str(reason), "cause": found.cause, "cure": found.fix}
