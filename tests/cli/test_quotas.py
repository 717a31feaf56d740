"""`redis-asgi peek`, `reset` and `flush`: what a deployment keeps, looked at and forgotten."""

import json
import re

import anyio
import pytest

from redis_asgi import Settings
from redis_asgi.cli import output
from redis_asgi.maintenance import flush_model

from ..conftest import StartServer
from ..kit.servers import ExternalServer
from ..test_layout import MODULES, _targets
from .shell import CREDENTIAL, PASSWORD, Invoke, counted, run


def test_peek_and_reset(redis_server: ExternalServer, invoke: Invoke) -> None:
    """What a client has left, and its full quota back, through real processes."""
    counted(redis_server, "tenant-1", "5/minute", cost=5)
    env = {"REDIS_URL": redis_server.url, "RATE_LIMITS": "5/minute"}
    peeked = run("peek", "tenant-1", "--by", "custom", env=env)
    again = invoke("peek", "tenant-1", "--by", "custom", **env)
    was_reset = run("reset", "tenant-1", "--by", "custom", env=env)
    nothing = invoke("reset", "tenant-1", "--by", "custom", **env)
    after = invoke("peek", "tenant-1", "--by", "custom", **env)

    assert [0] * 2 == [done.returncode for done in (peeked, was_reset)]
    assert [0] * 3 == [done.exit_code for done in (again, nothing, after)]
    label, head, row = peeked.stdout.splitlines()
    assert re.fullmatch(r"custom:[0-9a-f]{8}", label)
    assert head.split() == ["policy", "strategy", "used", "quota", "window", "left", "next", "full", "again"]
    assert re.fullmatch(r"default +fixed-window +5 +5 +60 s +0 +\d\d s +\d\d s", row)
    assert row.split()[:7] == again.stdout.splitlines()[2].split()[:7]
    assert was_reset.stdout == f"{label}: has its full quota again\n"
    assert nothing.stdout == f"{label}: nothing was counted\n"
    assert after.stdout.splitlines()[0] == f"{label}: nothing is counted"
    assert redis_server.client().keys() == []


def test_peek_as_json(redis_server: ExternalServer, invoke: Invoke) -> None:
    """Numbers for machines: seconds, units, and null for what nothing here knows."""
    counted(redis_server, "a", "5/minute; 50/hour", name="login")
    known = invoke(
        "peek",
        "a",
        "--by",
        "custom",
        "--name",
        "login",
        "--limits",
        "5/minute; 50/hour",
        "--json",
        REDIS_URL=redis_server.url,
    )
    unknown = invoke("peek", "a", "--by", "custom", "--name", "login", "--json")
    told = json.loads(known.stdout)

    assert [("login-3600s", 50, 49), ("login-60s", 5, 4)] == [
        (policy["policy"], policy["quota"], policy["remaining"]) for policy in told["policies"]
    ]
    assert all(0 < policy["reset"] <= policy["window"] for policy in told["policies"])
    assert [(1, None), (1, None)] == [(p["used"], p["quota"]) for p in json.loads(unknown.stdout)["policies"]]


def test_peek_without_a_quota(redis_server: ExternalServer, invoke: Invoke) -> None:
    """Of a rule whose limits are in the app's code, what is used, and how to learn more."""
    counted(redis_server, "a", "5/minute", name="login")
    result = invoke("peek", "a", "--by", "custom", REDIS_URL=redis_server.url)

    assert re.search(r"^login +fixed-window +1 +\? +60 s +\? +\? +\d+ s$", result.stdout, re.MULTILINE)
    assert "pass --app, or the rule's --name and --limits" in result.stderr


def test_a_name_from_redis_steers_no_terminal(redis_server: ExternalServer, invoke: Invoke) -> None:
    """What somebody else has written into Redis is not shown,
    and nothing is with control characters.
    """
    counted(redis_server, "a")
    (key,) = redis_server.client().keys()
    redis_server.client().hset(key, "\x1b[2J\r\nevil:f60:1", "1 1")
    result = invoke("peek", "a", "--by", "custom", REDIS_URL=redis_server.url)

    assert result.exit_code == 0
    assert "\x1b" not in result.output
    assert "evil" not in result.output
    assert output.printable("\x1b[2J\r\nb\u202ed") == "?[2J??b?d"


def test_reset_of_one_rule(redis_server: ExternalServer, invoke: Invoke) -> None:
    """With a name the other rules keep counting."""
    counted(redis_server, "a", name="login")
    counted(redis_server, "a", name="search")
    result = invoke("reset", "a", "--by", "custom", "--name", "login", REDIS_URL=redis_server.url)
    (key,) = redis_server.client().keys()

    assert (0, [b"search:f60:1"]) == (result.exit_code, redis_server.client().hkeys(key))


def test_only_the_command_line_prints() -> None:
    """What finds out and does knows nothing of a terminal;
    nothing but ``__main__`` imports the command line.
    """
    for name in MODULES:
        if not name.startswith("redis_asgi.cli"):
            targets = _targets(name)
            assert not targets & {"typer", "rich", "redis_asgi.cli.commands", "redis_asgi.cli.output"}
            assert "redis_asgi.cli" not in targets or name == "redis_asgi.__main__"


@pytest.mark.parametrize("command", ["peek", "reset"])
def test_a_credential_is_never_printed(command: str, redis_server: ExternalServer, invoke: Invoke) -> None:
    """A key, from the command line or standard input, is shown as its kind and eight digits."""
    by = ("--by", "header:x-api-key")
    argument = invoke(command, CREDENTIAL, *by, REDIS_URL=redis_server.url)
    piped = invoke(command, "-", *by, text=f"{CREDENTIAL}\n")
    as_ip = invoke(command, CREDENTIAL)
    custom = [invoke(command, typed, "--by", "custom", text=f"{CREDENTIAL}\r\n") for typed in (CREDENTIAL, "-")]

    assert argument.output == piped.output
    assert custom[0].output == custom[1].output
    assert re.match(r"header:x-api-key:[0-9a-f]{8}: nothing", argument.stdout)
    assert (2, True) == (as_ip.exit_code, "not an address" in as_ip.stderr)
    in_two = invoke(command, "Bearer", CREDENTIAL, *by)
    assert (2, True) == (in_two.exit_code, "One CLIENT only" in in_two.stderr)
    for result in (argument, piped, as_ip, in_two, *custom):
        assert CREDENTIAL not in result.output


# flush


def test_flush(redis_server: ExternalServer, invoke: Invoke) -> None:
    """One key is written, under the namespace of the settings or of the option."""
    env = {"REDIS_URL": redis_server.url}
    first = run("flush", "bge-m3", "--force", env=env)
    second = invoke("flush", "bge-m3", "--namespace", "n", "--force", **env)

    assert (0, "") == (first.returncode, first.stderr)
    assert (0, "") == (second.exit_code, second.stderr)
    assert first.stdout == "Flushed 'bge-m3': complete in every process within 5 s.\n"
    assert second.stdout == "Flushed 'bge-m3' in namespace 'n': complete in every process within 5 s.\n"
    keys = redis_server.client().keys("embedding_epoch:v1:*")
    assert len(keys) == 2
    epoch = redis_server.client().get(keys[0])
    assert invoke("flush", "bge-m3", "--namespace", "").exit_code == 0
    assert invoke("flush", "bge-m3", "--namespace", "n").exit_code == 0
    assert redis_server.client().get(keys[0]) != epoch


@pytest.mark.parametrize(
    ("setting", "when"),
    [
        ({"EMBEDDING_CACHE_L1_SECONDS": "60"}, "within 60 s"),
        ({"EMBEDDING_CACHE_L1_SECONDS": "0"}, "now"),
        ({"EMBEDDING_CACHE_L1_BYTES": "0"}, "now"),
    ],
    ids=["longer", "no time", "no room"],
)
def test_flush_says_how_long_processes_believe_what_they_know(
    setting: dict[str, str], when: str, redis_url: str, invoke: Invoke
) -> None:
    """It is never complete later than told: that depends on the layer in the processes."""
    result = invoke("flush", "m", "--force", REDIS_URL=redis_url, **setting)

    assert f"Flushed 'm': complete in every process {when}.\n" == result.stdout


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (("other",), "'other' without a namespace"),
        (("m", "--namespace", "other"), "'m' in namespace 'other'"),
        (("",), "'' without a namespace"),
        (("M",), "'M' without a namespace"),
    ],
    ids=["a model", "a namespace", "TEI", "another case"],
)
def test_flush_of_what_is_not_stored(
    arguments: tuple[str, ...], where: str, redis_server: ExternalServer, invoke: Invoke
) -> None:
    """A misspelt name is told and writes nothing, unless that is asked for."""
    env = {"REDIS_URL": redis_server.url}
    assert invoke("flush", "m", "--force", **env).exit_code == 0
    before = redis_server.client().keys()
    result = invoke("flush", *arguments, **env)
    after = redis_server.client().keys()
    forced = invoke("flush", *arguments, "--force", **env)

    assert (1, "") == (result.exit_code, result.stdout)
    assert f"nothing is stored under {where}" in result.stderr
    assert "--force" in result.stderr
    assert before == after
    assert (0, 2) == (forced.exit_code, len(redis_server.client().keys()))


def test_flush_goes_where_the_vectors_are(private_server: StartServer, invoke: Invoke) -> None:
    """With a server of their own, that one is written to."""
    shared, vectors = private_server(), private_server()
    result = invoke("flush", "m", "--force", REDIS_URL=shared.url, EMBEDDING_CACHE_REDIS_URL=vectors.url)

    assert result.exit_code == 0
    assert ([], 1) == (shared.client().keys(), len(vectors.client().keys()))


def test_flush_as_the_middleware_sees_it(redis_server: ExternalServer, invoke: Invoke) -> None:
    """A prefix and a key secret are those of the settings:
    the key is the one that `flush_model` writes.
    """
    env = {"REDIS_URL": redis_server.url, "REDIS_KEY_PREFIX": "p:", "REDIS_KEY_SECRET": PASSWORD}
    env["EMBEDDING_CACHE_NAMESPACE"] = "n"

    async def flush() -> None:
        await flush_model("m", settings=Settings(**env))

    anyio.run(flush)
    keys = redis_server.client().keys()
    assert invoke("flush", "m", **env).exit_code == 0

    assert redis_server.client().keys() == keys
