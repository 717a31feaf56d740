"""Rights that an ACL has to give: the commands that the package uses,
and on which keys; and whether one does.
"""

import hashlib
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from redis.asyncio.connection import parse_url
from redis.exceptions import ResponseError

from ..errors import Failure, classify, is_unknown_command
from ..settings import Settings

Run: TypeAlias = Callable[..., Awaitable[Any]]

# Of `RateLimiter` and all that limits: outside of the script,
# and inside, where rights are checked too.
LIMITS = ("evalsha", "eval", "time", "hget", "hmget", "hset", "hkeys", "hdel", "pttl", "pexpire", "unlink")
MOVING_WINDOW = ("lindex", "llen", "ltrim", "lrem", "rpush")
CONCURRENCY = ("zadd", "zcount", "zrem", "zrangebyscore", "zremrangebyscore")
VECTORS = ("mget", "set", "expire", "del")
VECTORS_IN_A_CLUSTER = ("get", "set", "expire", "del")
HEALTH = ("ping", "info")
# Without these health and metrics know less; all else goes on.
DISPENSABLE = frozenset(["+info", "+cluster|info"])
IN_A_CLUSTER = ("cluster|slots", "cluster|info", "command", "asking")

# Refused by Redis until it is replaced, so that nobody gets a user whose password is a placeholder.
NO_PASSWORD = "#SHA256-OF-THE-PASSWORD"  # noqa: S105 - that is the point
_GLOB = re.compile(r"([*?\[\]\\^])")


@dataclass(frozen=True, slots=True)
class Rights:
    """The rights that a server must give these settings.

    Attributes:
        keys: Patterns of the keys that are touched.
        commands: Names as ``ACL SETUSER`` takes them after a ``+``.
    """

    keys: tuple[str, ...]
    commands: tuple[str, ...]

    def line(self, user: str, password: str | None = None) -> str:
        """The ``ACL SETUSER`` command that gives *user* these rights and no other, of Redis 6.2 and
        later.

        Args:
            password: Goes in as its SHA-256; ``None`` leaves a placeholder that Redis refuses.
        """
        secret = NO_PASSWORD if password is None else f"#{hashlib.sha256(password.encode()).hexdigest()}"
        words = ["ACL", "SETUSER", user, "reset", "on", secret]
        words += (*(f"~{key}" for key in self.keys), *(f"+{name}" for name in self.commands))
        return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    """*word* as ``redis-cli`` reads it."""
    if '"' not in word and "'" not in word:
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def rights_of(settings: Settings, *, limits: bool = True, vectors: bool = True) -> Rights:
    """The rights that the package needs of the server of *settings*.

    Args:
        limits: Whether counters are kept there.
        vectors: Whether vectors are.
    """
    prefix = _GLOB.sub(r"\\\1", settings.REDIS_KEY_PREFIX)
    keys: list[str] = []
    commands: list[str] = []
    if limits:
        keys.append(f"{prefix}rate_limit:*")
        commands += (*LIMITS, *MOVING_WINDOW, *CONCURRENCY)
    if vectors:
        keys += (f"{prefix}embedding:*", f"{prefix}embedding_*")
        commands += VECTORS_IN_A_CLUSTER if settings.REDIS_CLUSTER else VECTORS
    commands += HEALTH
    if settings.REDIS_CLUSTER:
        commands += IN_A_CLUSTER
    elif database_of(settings):
        commands.append("select")
    return Rights(tuple(keys), tuple(commands))


def database_of(settings: Settings) -> int:
    """The database these settings select."""
    if settings.REDIS_URL is None:
        return settings.REDIS_DB
    return int(parse_url(settings.REDIS_URL.get_secret_value()).get("db", settings.REDIS_DB) or 0)


def user_of(settings: Settings) -> str:
    """The user that these settings log in as."""
    url = settings.REDIS_URL.get_secret_value() if settings.REDIS_URL else ""
    in_url = parse_url(url).get("username") if url else None
    return in_url or settings.REDIS_USERNAME or "default"


@dataclass(frozen=True, slots=True)
class MissingRight:
    """A command that a server did not let us run.

    Attributes:
        right: As ``ACL SETUSER`` takes it: ``+hget`` or ``~rate_limit:*``;
            empty when it is no matter of rights.
        failure: Why.
        text: The reply, shortened.
    """

    right: str
    failure: Failure
    text: str = ""


def probe_keys(prefix: str, fits: Callable[[bytes], bool] = lambda _: True) -> tuple[str, str, tuple[str, ...]]:
    """Unused keys of every family: a hash and a list of counters, and one per kind of vector key.

    Args:
        fits: Whether a key lives on the server that is asked,
            on a cluster; its tag is then looked for.
    """
    while True:
        tag = f"{{check-{secrets.token_hex(6)}}}"
        if fits(f"{prefix}rate_limit:{tag}".encode()):
            break
    counters = f"{prefix}rate_limit:{tag}"
    families = ("embedding:", "embedding_input:v1:", "embedding_lease:v1:", "embedding_epoch:v1:")
    return counters, f"{counters}:check:m1:1", tuple(f"{prefix}{family}{tag}" for family in families)


async def try_rights(
    run: Run, rights: Rights, hash_key: str, list_key: str, vector_keys: Sequence[str]
) -> list[MissingRight]:
    """Try each command of *rights* on unused keys,
    so that nothing is left behind; what was not let through.

    Rights are looked at before a command is carried out, so most are tried in a form that does
    nothing: on a key that is not there, or with an argument too many.
    """
    missing: list[MissingRight] = []
    granted: set[str] = set()
    for command in rights.commands:
        trials = _trials(command, hash_key, list_key, vector_keys, granted)
        if command == "rpush" and not trials and any(each.right == "+unlink" for each in missing):
            # It could not be undone; granting it with the others does no harm if it is there.
            missing.append(MissingRight("+rpush", Failure.PERMISSION, "not tried"))
        for words in trials:
            try:
                await run(*words)
            except ResponseError as error:
                refused = _refusal(error, command, rights, words)
                if refused is not None:
                    if refused not in missing:
                        missing.append(refused)
                    continue
            granted.add(command)
    return missing


def _trials(
    command: str, hash_key: str, list_key: str, vector_keys: Sequence[str], granted: set[str]
) -> list[tuple[Any, ...]]:
    """Commands that find out about *command*; none for what connecting has shown already."""
    forms: dict[str, tuple[Any, ...]] = {
        "evalsha": ("EVALSHA", "0" * 40, 0),
        "eval": ("EVAL", "return 1", 1, hash_key),
        "time": ("TIME",),
        "hget": ("HGET", hash_key, "check"),
        "hmget": ("HMGET", hash_key, "check"),
        "hset": ("HSET", hash_key, "check", "1", "odd"),
        "hkeys": ("HKEYS", hash_key),
        "hdel": ("HDEL", hash_key, "check"),
        "pttl": ("PTTL", hash_key),
        "pexpire": ("PEXPIRE", hash_key, 1000),
        "unlink": ("UNLINK", hash_key),
        "lindex": ("LINDEX", list_key, 0),
        "llen": ("LLEN", list_key),
        "ltrim": ("LTRIM", list_key, 1, 0),
        "lrem": ("LREM", list_key, 0, "check"),
        "zadd": ("ZADD", list_key, "XX", 0, "check"),
        "zcount": ("ZCOUNT", list_key, 0, 0),
        "zrem": ("ZREM", list_key, "check"),
        "zrangebyscore": ("ZRANGEBYSCORE", list_key, 0, 0),
        "zremrangebyscore": ("ZREMRANGEBYSCORE", list_key, 0, 0),
        "asking": ("ASKING",),
        "ping": ("PING",),
        "info": ("INFO",),
        "cluster|info": ("CLUSTER INFO",),
    }
    if command in forms:
        return [forms[command]]
    if command == "rpush":
        # There is no form of it that does nothing, so only where it can be undone.
        undoing = next((name for name in ("unlink", "ltrim", "lrem", "pexpire") if name in granted), None)
        undo = {**forms, "unlink": ("UNLINK", list_key), "pexpire": ("PEXPIRE", list_key, 1)}
        return [("RPUSH", list_key, "check"), undo[undoing]] if undoing else []
    vectors: dict[str, Callable[[str], tuple[Any, ...]]] = {
        "mget": lambda key: ("MGET", key),
        "get": lambda key: ("GET", key),
        "set": lambda key: ("SET", key, "check", "EX", 0),
        "expire": lambda key: ("EXPIRE", key, 1),
        "del": lambda key: ("DEL", key),
    }
    return [vectors[command](key) for key in vector_keys] if command in vectors else []


def _refusal(error: ResponseError, command: str, rights: Rights, words: tuple[Any, ...]) -> MissingRight | None:
    text = str(error)
    failure = classify(error)
    if is_unknown_command(error):
        return MissingRight(f"+{command}", Failure.REPLY, "unknown command")
    if failure is Failure.PERMISSION:
        if "permissions to access" in text.lower():
            key = str(words[3] if command == "eval" else words[1])
            return MissingRight(f"~{_pattern_of(key, rights)}", failure)
        return MissingRight(f"+{command}", failure)
    # NOSCRIPT, a wrong number of arguments, an expiry of 0: it was let through.
    return None if failure is Failure.REPLY else MissingRight("", failure, text[:80])


def _pattern_of(key: str, rights: Rights) -> str:
    """The pattern of *rights* that is for *key*: the longest that it begins with."""
    plain = {pattern: re.sub(r"\\(.)", r"\1", pattern.removesuffix("*")) for pattern in rights.keys}
    return max((p for p in rights.keys if key.startswith(plain[p])), key=len)
