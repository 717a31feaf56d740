"""Exceptions of the package, and the one reader of Redis exception classes.

::

    Exception
    └── RedisASGIError                 everything the package raises on purpose
        ├── ConfigurationError         (also ValueError) a setting or argument cannot work; at construction
        │   └── ArgumentError          (also TypeError) what is called does not take these arguments
        ├── MaintenanceError           Redis did not do what an operator asked; lives in ``redis_asgi.maintenance``
        │   ├── FlushError             a model's vectors may still be served
        │   ├── PersistenceError       not all of the configuration was set
        │   └── QuotaError             a client's quota was not told, or not reset
        └── RateLimitExceeded          (also starlette HTTPException) 429; lives in ``redis_asgi.ratelimit``

Trouble with Redis during a request is no exception: it is a `Failure`,
a value that the caller's policy answers.
"""

import asyncio
import logging
import re
import traceback
from enum import StrEnum

import hiredis
from redis import exceptions as redis_exceptions
from redis.asyncio.sentinel import MasterNotFoundError

from .events import say

__all__ = [
    "ConfigurationError",
    "Failure",
    "RedisASGIError",
    "classify",
]

logger = logging.getLogger("redis_asgi.connection")


class RedisASGIError(Exception):
    """Root of everything the package raises on purpose."""


class ConfigurationError(RedisASGIError, ValueError):
    """A setting or argument cannot work; raised while it is built, or what a callable returns.

    Args:
        problems: What cannot work, and what would: a sentence or two for each.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


class ArgumentError(ConfigurationError, TypeError):
    """A call with arguments that cannot work, or a missing call; the text says what was meant."""


class Failure(StrEnum):
    """The reasons why Redis gave no answer: a small closed set, fit for logs,
    health codes and metric labels.
    """

    TIMEOUT = "timeout"  # no answer within the deadline
    CONNECTION = "connection"  # refused, reset, closed, unresolvable, TLS
    AUTH = "auth"  # NOAUTH, WRONGPASS
    PERMISSION = "permission"  # NOPERM: the ACL lacks a right
    READONLY = "readonly"  # a replica, with its primary or without, or writes are stopped
    LOADING = "loading"  # the dataset is being read from disk
    BUSY = "busy"  # a script blocks the server
    OOM = "oom"  # maxmemory reached and nothing may be evicted
    CLUSTER = "cluster"  # slot not served, master unknown
    POOL = "pool"  # no free connection in time: our own load, not Redis
    WRONG_LOOP = "wrong_loop"  # the client belongs to another event loop
    REPLY = "reply"  # an error of no other kind, such as WRONGTYPE, no answer to what was asked, or nothing to send
    DEFECT = "defect"  # no Redis causes it: a fault of ours, or of a library's version


class OddReply(redis_exceptions.ResponseError):
    """A reply that its command cannot have:
    nothing that follows it on that connection can be believed either.
    """


# The first word of an error reply decides:
# errors raised inside a script arrive as plain ResponseErrors.
_REPLY_CODES = {
    "NOAUTH": Failure.AUTH,
    "WRONGPASS": Failure.AUTH,
    "NOPERM": Failure.PERMISSION,
    "READONLY": Failure.READONLY,
    "MISCONF": Failure.READONLY,
    "NOREPLICAS": Failure.READONLY,
    "LOADING": Failure.LOADING,
    "BUSY": Failure.BUSY,
    "OOM": Failure.OOM,
    "CLUSTERDOWN": Failure.CLUSTER,
    "MASTERDOWN": Failure.READONLY,
    "TRYAGAIN": Failure.CLUSTER,
    "CROSSSLOT": Failure.CLUSTER,
    "MOVED": Failure.CLUSTER,
    "ASK": Failure.CLUSTER,
}

# What a script may not do, or not there, comes without a word of its own.
_DENIED_IN_SCRIPT = ("The user executing the script can't", "ACL failure in script")
# Of a client that is not logged in Redis takes no more than ten words, and none that is long.
_NOT_LOGGED_IN = "Protocol error: unauthenticated"
_ELSEWHERE_IN_SCRIPT = tuple(
    f"{who}ttempted to access a {what}"
    for who in ("Lua script a", "Script a", "A")
    for what in ("non local key", "slot not served")
)

# What stands before the first word of an error raised inside a script: Redis 6.2 says where, twice
# if uncaught, and Lua's own error() does so on every version.
_BEFORE_FIRST_WORD = re.compile(
    r"(?:-|ERR |Error running script \(call to \w+\): |[@=]?(?:user_script|user_function|\[C\]): ?-?\d+: )*"
)

# Most specific first; redis-py makes AuthenticationError,
# BusyLoadingError and MaxConnectionsError ConnectionErrors.
_CLASSES: tuple[tuple[type[BaseException], Failure], ...] = (
    (redis_exceptions.AuthenticationError, Failure.AUTH),
    (redis_exceptions.AuthorizationError, Failure.PERMISSION),
    (redis_exceptions.NoPermissionError, Failure.PERMISSION),
    (redis_exceptions.BusyLoadingError, Failure.LOADING),
    (redis_exceptions.MaxConnectionsError, Failure.POOL),
    (redis_exceptions.ReadOnlyError, Failure.READONLY),
    (redis_exceptions.OutOfMemoryError, Failure.OOM),
    # What only a replica says, in a cluster or not; redis-py makes a ClusterError of it.
    (redis_exceptions.MasterDownError, Failure.READONLY),
    (redis_exceptions.ClusterError, Failure.CLUSTER),
    (redis_exceptions.ClusterDownError, Failure.CLUSTER),
    (redis_exceptions.RedisClusterException, Failure.CLUSTER),
    # Of these redis-py strips the first word.
    (redis_exceptions.AskError, Failure.CLUSTER),
    (redis_exceptions.TryAgainError, Failure.CLUSTER),
    (redis_exceptions.ClusterCrossSlotError, Failure.CLUSTER),
    (redis_exceptions.TimeoutError, Failure.TIMEOUT),
    (asyncio.TimeoutError, Failure.TIMEOUT),
    (MasterNotFoundError, Failure.CLUSTER),
    (redis_exceptions.ConnectionError, Failure.CONNECTION),
    (redis_exceptions.ResponseError, Failure.REPLY),
    # Input that cannot be sent: it must not count as trouble of the server.
    (redis_exceptions.DataError, Failure.REPLY),
    (UnicodeError, Failure.REPLY),
    (NotImplementedError, Failure.DEFECT),
    (RecursionError, Failure.DEFECT),
    (RuntimeError, Failure.WRONG_LOOP),
    (OSError, Failure.CONNECTION),
    (redis_exceptions.RedisError, Failure.CONNECTION),
    (hiredis.HiredisError, Failure.CONNECTION),
    (EOFError, Failure.CONNECTION),
    # What redis-py's own code raises when a server answers nonsense, or a slot table is in flux.
    (ValueError, Failure.CONNECTION),
    (LookupError, Failure.CONNECTION),
)

_DEFECTS_SAID = 64
_said: set[tuple[type[BaseException], str, int]] = set()


def classify_reply(text: str) -> Failure:
    """The failure an error reply of Redis stands for,
    by its first word; `Failure.REPLY` when unknown.

    A position in a script before it is read past.
    """
    text = _BEFORE_FIRST_WORD.sub("", text, count=1)
    if text.startswith(_DENIED_IN_SCRIPT):
        return Failure.PERMISSION
    if text.startswith(_ELSEWHERE_IN_SCRIPT):
        return Failure.CLUSTER
    if text.startswith(_NOT_LOGGED_IN):
        return Failure.AUTH
    words = text.split(maxsplit=1)
    return _REPLY_CODES.get(words[0], Failure.REPLY) if words else Failure.REPLY


def is_unknown_command(error: BaseException) -> bool:
    """Whether a server, or a proxy before it, has no such command, or another name for it."""
    return any(words in str(error).lower() for words in ("unknown command", "unsupported command"))


def is_crossslot(reply: object) -> bool:
    """Whether *reply* refuses keys of several slots in one command, of which nothing has run."""
    # redis-py strips the first word.
    return isinstance(reply, redis_exceptions.ClusterCrossSlotError) or (
        isinstance(reply, Exception) and str(reply).lstrip("-").startswith("CROSSSLOT")
    )


def classify(exc: BaseException) -> Failure:
    """Sort what a Redis client raised into a `Failure`;
    what no Redis causes is a `Failure.DEFECT`, and logged once.

    redis-py 8.1 raises a wrong password, LOADING, an exhausted pool and an unknown sentinel master
    as subclasses of its ``ConnectionError``, BUSY and in-script errors as plain ``ResponseError``,
    an unserved cluster slot as ``RedisClusterException`` (no ``RedisError``), a client of another
    loop as ``RuntimeError``.
    """
    if isinstance(exc, redis_exceptions.ResponseError):
        by_text = classify_reply(str(exc))
        if by_text is not Failure.REPLY:
            return by_text
    for kind, failure in _CLASSES:
        if isinstance(exc, kind):
            if failure is Failure.DEFECT:
                break
            return failure
    _say_defect(exc)
    return Failure.DEFECT


def _say_defect(exc: BaseException) -> None:
    """Log *exc* with its traceback, once for each place that it comes from."""
    frames = traceback.extract_tb(exc.__traceback__)
    where = (type(exc), frames[-1].filename, frames[-1].lineno or 0) if frames else (type(exc), "", 0)
    if where in _said or len(_said) >= _DEFECTS_SAID:
        return
    _said.add(where)
    say(logger, "defect", exc, error=type(exc).__name__, reason=Failure.DEFECT.value)
