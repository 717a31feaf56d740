"""The log: every line is of the table, says it all in its message, and holds no secret."""

import ast
import io
import logging
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as aioredis
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

import redis_asgi
from redis_asgi import ConfigurationError, RedisManager, Settings
from redis_asgi.connection.breaker import Breaker
from redis_asgi.connection.client_factory import describe, describe_client
from redis_asgi.connection.redis_argument import resolve_manager
from redis_asgi.errors import Failure
from redis_asgi.events import EVENTS, REASONS, say, words_for
from redis_asgi.explanations import explain, explanations, near

from .kit.logs import event_of
from .kit.processes import run_python

ROOT = Path(redis_asgi.__file__).parent
LOGGER = logging.getLogger("redis_asgi.test")

# Who takes an event's name, and where among its arguments.
_TAKES = {"say": 1, ".say": 0, "._say": 0}
# What a field of every failure holds, see `words_for`.
_OF_A_REASON = frozenset(words_for("timeout"))
# For structured logs only: an address names the node, and vectors' writes pause for one reason.
_NOT_SHOWN = frozenset({"node", "reason"})


def _calls() -> Iterator[tuple[str, str, frozenset[str], bool]]:
    """(where, event, fields, whether there may be more of them) of every line that the package
    logs.
    """
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = f".{node.func.attr}" if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            at = _TAKES.get(name)
            if at is None or len(node.args) <= at:
                continue
            event = node.args[at]
            if not isinstance(event, ast.Constant) or (event.value not in EVENTS and " " in str(event.value)):
                continue  # handed on, or another kind of saying
            given = {keyword.arg for keyword in node.keywords if keyword.arg}
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Call) and getattr(keyword.value.func, "id", "") == "words_for":
                    given |= _OF_A_REASON
            stars = any(
                k.arg is None and getattr(getattr(k.value, "func", None), "id", "") != "words_for"
                for k in node.keywords
            )
            yield f"{path.relative_to(ROOT)}:{node.lineno}", str(event.value), frozenset(given), stars


CALLS = list(_calls())


def test_each_line_is_in_the_table_and_each_row_is_logged() -> None:
    """Whatever is logged can be looked up, and nothing can be looked up that is never logged."""
    assert set(EVENTS) == {event for _, event, _, _ in CALLS}


def test_nothing_is_logged_in_another_way() -> None:
    """`events` alone calls a logger's methods."""
    methods = {"debug", "info", "warning", "error", "exception", "critical", "log"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in methods
        and getattr(node.func.value, "id", "") in ("logger", "logging", "log", "_logger")
    ]

    assert ["events.py"] == [where.partition(":")[0] for where in found]


@pytest.mark.parametrize(("where", "event", "fields", "more"), CALLS, ids=[f"{e}-{w}" for w, e, _, _ in CALLS])
def test_a_line_has_the_fields_of_its_row(where: str, event: str, fields: frozenset[str], more: bool) -> None:
    """A row's texts name what the line is given, and what a line is given is in its message."""
    named = EVENTS[event].fields

    assert more or named <= fields, where
    assert fields - named <= _NOT_SHOWN | _OF_A_REASON | {"about"}, where
    # `logging` refuses these, and the line would be an exception.
    assert not fields & {*vars(logging.makeLogRecord({})), "message", "asctime", "event", "code", "fix"}, where


def test_each_failure_has_words() -> None:
    """Whatever a health check, a metric or the log names can be looked up."""
    assert set(REASONS) == {failure.value for failure in Failure}
    for failure in Failure:
        assert explain(f"redis_{failure.value}") is not None


@pytest.mark.parametrize("event", EVENTS)
def test_a_row_is_two_sentences(event: str) -> None:
    """Its cause and its cure, each whole, in words that need no line."""
    row = EVENTS[event]
    said = explain(event)
    assert said is not None
    assert said == explain(f"redis_asgi.{event}")

    for text in (said.cause, said.fix):
        assert text[0].isupper() or text[0] in "`@%", text
        assert text.endswith("."), text
        assert "%(" not in text
    assert row.fields <= {"cause", "cure"} or any(field.upper() in said.cause + said.fix for field in row.fields)


def test_a_line_says_it_all(caplog: pytest.LogCaptureFixture) -> None:
    """Event, cause and cure are in the message;
    the event's name and the fields are in ``extra`` too.
    """
    say(LOGGER, "redis_unavailable", **words_for(Failure.AUTH), address="redis:6379/0")
    (record,) = caplog.records

    assert (
        "redis_asgi.redis_unavailable: Redis (redis:6379/0) is lost: auth. Redis refuses the credentials. Until it is "
        "back, on_redis_error decides about requests and every embedding is computed. Check REDIS_USERNAME and "
        "REDIS_PASSWORD, or those in REDIS_URL."
    ) == record.getMessage()
    about = vars(record)
    assert ("redis_asgi.redis_unavailable", "redis_unavailable") == (about["event"], about["code"])
    assert ("auth", "redis:6379/0") == (about["reason"], about["address"])
    assert REASONS["auth"].fix == about["fix"]
    assert "test_events.py" == record.filename


def test_lines_of_one_event_are_grouped(caplog: pytest.LogCaptureFixture) -> None:
    """What tools group by, the template of the message, is the same for every line of an event."""
    for address in ("a:1/0", "b:2/0"):
        say(LOGGER, "redis_back", address=address)

    first, second = caplog.records
    assert first.msg == second.msg
    assert first.getMessage() != second.getMessage()


def test_what_is_switched_off_costs_nothing() -> None:
    """A line below the logger's level is not even made up."""

    class Trap:
        def __str__(self) -> str:
            raise AssertionError

    say(logging.getLogger("redis_asgi.quiet"), "breaker", state=Trap(), reason=Trap(), address=Trap())


@given(st.text(max_size=30))
def test_a_client_writes_no_lines_of_its_own(name: str) -> None:
    """A name that a client chose stands in one line, whatever is in it."""
    for line in _logged("embedding_item_lists", about=name):
        assert line.isprintable()


def _logged(event: str, **fields: object) -> list[str]:
    """What Python's own format makes of a line, and the repr of all that is in its record."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    kept: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        kept.append(repr(vars(record)))
        return True

    handler.addFilter(keep)
    LOGGER.addHandler(handler)
    try:
        say(LOGGER, event, **fields)
    finally:
        LOGGER.removeHandler(handler)
    return [out.getvalue().removesuffix("\n"), *kept]


# No secret.

# Long enough not to stand in a line by chance; with whatever a URL may have, encoded or not.
SECRETS = st.text(st.sampled_from("Zq7@:/?#&=%+ é"), min_size=1, max_size=12).map(lambda text: f"hUnter{text}tWo")


def quoted(secret: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else f"%{byte:02X}" for c in secret for byte in c.encode())


def parts(secret: str) -> set[str]:
    """*secret*, as it stands in a URL too, and its beginning and end:
    not even a piece of it may be seen.
    """
    return {"hUnter", "tWo", secret, quoted(secret)}


@st.composite
def urls(draw: st.DrawFn) -> tuple[str, str]:
    """A secret, and a URL that has it where a user, a password or an option may stand."""
    # With what may stand there as it is; anything else is written %XX.
    secret, is_quoted = draw(SECRETS), draw(st.booleans())
    if not is_quoted:
        secret = "".join(c for c in secret if c not in "/?#&%+ é")
    held = quoted(secret) if is_quoted else secret
    form = draw(
        st.sampled_from(
            [
                "redis://:{}@h:1/0", "redis://{}@h", "redis://u:{}@h:1", "rediss://{0}:{0}@h:1/2", "valkey://u:{}@h",
                "redis://h:1/0?password={}", "redis://h?username={}", "unix://:{}@/tmp/r.sock",
                "unix:///tmp/r.sock?password={}", "redis://u:{0}@h?password={0}", "redis://h?p%61ssword={}",
                "redis://[::1]:6379/0?password={}&username={}",
            ]
        )
    )  # fmt: skip
    return secret, form.format(held, held)


@given(urls())
def test_no_secret_of_a_url_is_logged_or_told(secret_and_url: tuple[str, str]) -> None:
    """Neither as an address of a line, nor in an error about a URL that cannot work."""
    secret, url = secret_and_url
    try:
        settings = Settings(REDIS_URL=url)
    except ConfigurationError as error:
        shown = ["".join(traceback.format_exception(error))]
    else:
        address = describe(settings)
        shown = [address, repr(RedisManager(settings)), repr(settings)]
        shown += _logged("redis_unavailable", **words_for(Failure.AUTH), address=address)
    # Whatever else is handed to a line.
    shown += _logged("redis_back", address=url)

    for text in shown:
        assert not {part for part in parts(secret) if part in text}, text


@given(SECRETS)
def test_no_secret_setting_is_in_an_address(secret: str) -> None:
    """Passwords of their own, of Redis and of sentinels,
    are nowhere in what is logged of a manager.
    """
    settings = Settings(
        REDIS_PASSWORD=secret,
        REDIS_USERNAME="app",
        REDIS_SENTINELS="a:1,b:2",
        REDIS_SENTINEL_MASTER="m",
        REDIS_SENTINEL_PASSWORD=secret,
        REDIS_KEY_SECRET=secret * 4,
    )
    shown = [describe(settings), *_logged("redis_back", address=describe(settings))]

    assert "sentinel master 'm'" == shown[0]
    for text in shown:
        assert not {part for part in parts(secret) if part in text}, text


@pytest.mark.parametrize(
    ("client", "address"),
    [
        pytest.param(aioredis.Redis(host="h", port=7, db=3, password="hunter2"), "h:7/3", id="alone"),
        pytest.param(aioredis.Redis.from_url("redis://u:hunter2@h"), "h:6379/0", id="url"),
        pytest.param(aioredis.Redis.from_url("unix://u:hunter2@/tmp/r.sock"), "/tmp/r.sock", id="socket"),
        pytest.param(aioredis.RedisCluster("h", 7, password="hunter2"), "cluster h:7", id="cluster"),
        pytest.param(
            aioredis.Sentinel([("s", 1)], sentinel_kwargs={"password": "hunter2"}).master_for("m", password="hunter2"),
            "sentinel master 'm'",
            id="sentinel",
        ),
    ],
)
def test_address_of_a_given_client(client: Any, address: str) -> None:
    """A client of the user's is named by where it points, and by nothing else that it knows."""
    assert address == describe_client(client)


@pytest.mark.anyio
async def test_retries_of_a_given_client_name_it(caplog: pytest.LogCaptureFixture) -> None:
    """The line says which client, without its password."""
    resolve_manager(aioredis.Redis(host="h", password="hunter2", retry=Retry(NoBackoff(), 2)), None)
    (record,) = caplog.records

    assert "redis= (h:6379/0) tries a command 2 times more" in record.getMessage()
    assert "hunter2" not in repr(vars(record))


# What Python shows by itself.


def test_the_default_format_tells_the_story() -> None:
    """With nothing configured, a lost Redis is told on standard error with its address, the cause
    and the cure.
    """
    script = """
import asyncio
from redis_asgi import RateLimiter

async def main():
    limiter = RateLimiter()
    for _ in range(3):
        assert (await limiter.consume("sk-live-identity")).allowed

asyncio.run(main())
"""
    done = run_python(script, env={"REDIS_URL": "redis://app:hunter%40two@127.0.0.1:1/0"})

    lines = [line for line in done.stderr.splitlines() if not line.startswith("Executing ")]  # asyncio, if it is slow
    assert 1 == len(lines), done.stderr
    assert re.fullmatch(
        r"redis_asgi\.redis_unavailable: Redis \('redis://\*\*\*@127\.0\.0\.1:1/0'\) is lost: connection\. "
        r"Redis cannot be reached\. .* Check REDIS_URL, .*`redis-asgi check` says more\.",
        lines[0],
    )


@pytest.mark.anyio
async def test_a_node_of_a_cluster_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Its line says which node of which cluster; ``extra`` has the node by itself."""

    async def nothing() -> None:
        return None

    breaker = Breaker(nothing, nothing, "10.0.0.2:7000", address="cluster a:1")
    breaker.failed(Failure.OOM)
    await breaker.aclose()
    (record,) = caplog.records

    assert "redis_asgi.redis_unavailable" == event_of(record)
    assert "Redis (10.0.0.2:7000 of cluster a:1) is lost: oom." in record.getMessage()
    assert "10.0.0.2:7000" == vars(record)["node"]


# The table.


def test_each_word_explains_itself() -> None:
    """All that is listed can be asked for, and stands there once."""
    listed = explanations()

    assert len(listed) == len({each.word for each in listed})
    assert all(explain(each.word) == each for each in listed)
    assert {"error", "warning", "debug", "health"} == {each.where for each in listed}


@pytest.mark.parametrize(
    "typed", ["redis_asgi.redis_back:", " redis_asgi.redis_back: Redis ('redis://h') answers again"]
)
def test_a_line_of_the_log_is_explained(typed: str) -> None:
    """What is copied from it needs no trimming."""
    assert explain("redis_back") == explain(typed)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("redis_unavailble", "redis_asgi.redis_unavailable"),
        ("redis_asgi.mounted_twise", "redis_asgi.mounted_twice"),
        ("Redis_Timeout", "redis_timeout"),
        ("namespace", "redis_asgi.embedding_namespace_empty"),
    ],
)
def test_a_near_miss_is_guessed(typed: str, meant: str) -> None:
    """What is almost a word, or a part of one, leads to it."""
    assert explain(typed) is None
    assert meant in near(typed)
