"""The command line as an operator runs it: what it prints, where, with which exit code; and never a secret."""

import asyncio
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest
from typer.testing import CliRunner, Result

import redis_asgi
from redis_asgi import RateLimiter, Settings
from redis_asgi.cli import output
from redis_asgi.cli.commands import app
from redis_asgi.cli.session import _interruptible
from redis_asgi.inspection.quotas import partition_of
from redis_asgi.inspection.rights import rights_of
from redis_asgi.maintenance import flush_model

from ..conftest import StartServer
from ..kit.documents import section
from ..kit.fair_time import fair_time
from ..kit.processes import clean_environment, run_python
from ..kit.servers import Cluster, ExternalServer, SentinelTrio, Server, wait_until
from ..test_layout import MODULES, _targets

PASSWORD = "s3cr3t-of-a-test"
CREDENTIAL = "sk-live-0123456789"
# A busy machine is no finding.
PATIENT = {"RATE_LIMIT_TIMEOUT": "5", "EMBEDDING_CACHE_TIMEOUT": "5"}
COMMANDS = ("check", "settings", "rules", "peek", "reset", "flush", "memory", "acl", "persist", "explain")

Run = subprocess.CompletedProcess[str]


def run(*arguments: str, env: Mapping[str, str] | None = None, text: str | None = None) -> Run:
    """``python -m redis_asgi`` in a process of its own, under ``-W error -X dev``."""
    command = [sys.executable, "-W", "error", "-X", "dev", "-m", "redis_asgi", *arguments]
    environment = clean_environment(**PATIENT, **(env or {}))
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, env=environment, check=False, input=text or ""
    )
    # What asyncio says in development mode of a machine that is busy.
    done.stderr = re.sub(r"^Executing <.* took \d\.\d+ seconds\n", "", done.stderr, flags=re.MULTILINE)
    return done


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The same in this process, which is quicker: ``invoke("peek", "1.2.3.4", REDIS_URL=...)``."""

    def call(*arguments: str, text: str | None = None, **env: str | None) -> Result:
        for name, value in {**PATIENT, **env}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        result = CliRunner().invoke(app, list(arguments), input=text)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


Invoke = Callable[..., Result]


def counted(server: ExternalServer, client: str, limits: str = "100/minute", **how: Any) -> None:
    """Count one request of *client*, by a limiter in a process of its own loop."""

    async def consume() -> None:
        manager = redis_asgi.RedisManager(Settings(REDIS_URL=server.url))
        decision = await RateLimiter(manager).consume(client, limits, **how)
        await manager.close()
        assert decision.source == "redis"

    anyio.run(consume)


# help, and what is missing


def test_help_says_what_there_is() -> None:
    """The help names each command and each exit code."""
    done = run("--help")

    assert (0, "") == (done.returncode, done.stderr)
    for command in COMMANDS:
        assert re.search(rf"^  {command}  +\S.*[^.]\.$", done.stdout, re.MULTILINE), command
    words = " ".join(done.stdout.split())
    for code in ("0 done", "1 something failed", "2 an argument", "3 check --strict", "130 interrupted"):
        assert code in words


def test_start_is_quick() -> None:
    """No command's start imports what only some work needs."""
    code = "import sys, redis_asgi.cli.commands; print(sorted({'numpy', 'rich', 'fastapi'} & set(sys.modules)))"
    done = run_python(code, flags=())

    assert ("[]\n", "") == (done.stdout, done.stderr)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, invoke: Invoke) -> None:
    """Each command says what it does without any setting."""
    result = invoke(command, "--help")

    assert result.exit_code == 0
    assert f"redis-asgi {command}" in result.stdout or f"{command} [OPTIONS]" in result.stdout


def test_no_argument_shows_the_help(invoke: Invoke) -> None:
    """Without a command the help is shown, and it is an error."""
    result = invoke()

    assert (2, True) == (result.exit_code, "Commands:" in result.output)


def test_version(invoke: Invoke) -> None:
    """The version is that of the package."""
    assert (0, f"redis-asgi {redis_asgi.__version__}\n") == ((it := invoke("--version")).exit_code, it.stdout)


@pytest.mark.parametrize("command", [(), *((command,) for command in COMMANDS)], ids=" ".join)
def test_h_is_help(command: tuple[str, ...], invoke: Invoke) -> None:
    """As everybody types it."""
    assert invoke(*command, "-h").stdout == invoke(*command, "--help").stdout


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("redis-asgi pe", ["peek", "persist"]), ("redis-asgi settings --m", ["--markdown"])],
)
def test_shell_completion(typed: str, expected: list[str]) -> None:
    """What the shell asks for when somebody presses the tabulator."""
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_REDIS_ASGI_COMPLETE": "complete_bash"}
    done = run(env=words)

    assert (expected, "") == (done.stdout.split(), done.stderr)


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra(missing: str) -> None:
    """Without its libraries the command line says in one line what to install, and exits with 2."""
    code = f"""
import runpy, sys
sys.modules[{missing!r}] = None
sys.argv = ["redis-asgi", "check"]
runpy.run_module("redis_asgi", run_name="__main__")
"""
    done = run_python(code, flags=(), env={"REDIS_URL": "redis://127.0.0.1:1"})

    assert (2, "") == (done.returncode, done.stdout)
    assert done.stderr == "redis-asgi needs its command line's libraries: pip install 'redis-asgi[cli]'\n"


# check


def test_check_of_a_good_server(redis_url: str) -> None:
    """A gate lets a good server pass: exit code 0, one line per check, plain text when nobody looks."""
    done = run("check", env={"REDIS_URL": redis_url})

    assert (0, "") == (done.returncode, done.stderr)
    lines = done.stdout.splitlines()
    assert len(lines) > 8
    assert all(re.match(r"ok    [a-z]+ +\S", line) for line in lines), done.stdout
    assert "\x1b" not in done.stdout


def test_check_as_json(redis_url: str, invoke: Invoke) -> None:
    """The same for machines."""
    result = invoke("check", "--json", REDIS_URL=redis_url)
    told = json.loads(result.stdout)

    assert (0, True) == (result.exit_code, told["ok"])
    assert {"check", "level", "text", "fix", "server"} == set(told["findings"][0])
    assert ["settings", "connection", "version"] == [finding["check"] for finding in told["findings"][:3]]


def test_check_of_no_server() -> None:
    """A server that is not there fails the gate with what to do, and no traceback."""
    done = run("check", env={"REDIS_URL": f"redis://app:{PASSWORD}@127.0.0.1:1"})

    assert (1, "") == (done.returncode, done.stderr)
    assert "fail  connection" in done.stdout
    assert "-> Check REDIS_URL" in done.stdout
    assert PASSWORD not in done.stdout


def test_check_with_warnings(private_server: StartServer, invoke: Invoke) -> None:
    """Warnings pass, unless they are asked to count."""
    server = private_server("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    passing = invoke("check", REDIS_URL=server.url)
    strict = invoke("check", "--strict", "--json", REDIS_URL=server.url)
    server.kill()
    failing = invoke("check", "--strict", REDIS_URL=server.url)

    assert (0, 3, 1) == (passing.exit_code, strict.exit_code, failing.exit_code)
    assert "warn  eviction" in passing.stdout
    assert json.loads(strict.stdout)["ok"] is True


@pytest.mark.parametrize(
    ("env", "says"),
    [
        pytest.param({"REDIS_PORT": "x"}, "REDIS_PORT='x'", id="a setting that cannot work"),
        pytest.param({"REDIS_URL": "memory://"}, "memory://", id="memory"),
        pytest.param({"REDIS_PORT": "0", "REDIS_PASSWORD": PASSWORD}, "REDIS_PORT", id="beside a password"),
    ],
)
def test_check_of_settings(env: dict[str, str], says: str, invoke: Invoke) -> None:
    """Settings that cannot work fail the gate as any other finding does, in JSON too."""
    plain, as_json = invoke("check", **env), invoke("check", "--json", **env)

    assert (1, 1) == (plain.exit_code, as_json.exit_code)
    assert "fail  settings" in plain.stdout
    (finding,) = json.loads(as_json.stdout)["findings"]
    assert says in finding["text"]
    assert PASSWORD not in plain.output + as_json.output


def test_check_of_a_cluster(cluster: Cluster, invoke: Invoke) -> None:
    """Each node has lines of its own."""
    result = invoke("check", REDIS_URL=cluster.url, REDIS_CLUSTER="true")

    assert result.exit_code == 0
    for node in cluster.nodes:
        assert f"redis 127.0.0.1:{node.port}  rights" in result.stdout


def test_check_tells_all_bad_settings_at_once(invoke: Invoke) -> None:
    """A finding for each, and for what looks like a setting and is none."""
    result = invoke("check", "--json", REDIS_PORT="x", REDIS_DB="y", RATE_LIMTS="5/minute")

    findings = json.loads(result.stdout)["findings"]
    assert ["REDIS_PORT", "REDIS_DB='", "RATE_LIMTS"] == [finding["text"][:10] for finding in findings]


def test_check_names_near_misses(redis_url: str, invoke: Invoke) -> None:
    """A variable that looks like ours is a warning, so that a strict gate stops it; its value is not shown."""
    env = {"REDIS_URL": redis_url, "RATE_LIMTS": CREDENTIAL, "redis_port": "1", "REDIS_PORT_6379_TCP": "tcp://h:1"}
    plain, strict = invoke("check", **env), invoke("check", "--strict", **env)

    assert (0, 3) == (plain.exit_code, strict.exit_code), plain.output
    assert "warn  settings     RATE_LIMTS is no setting and changes nothing\n" in plain.stdout
    assert "-> Is REDIS_PORT meant? Rename it." in plain.stdout
    assert 2 == plain.stdout.count("warn ")
    assert CREDENTIAL not in plain.stdout


# settings


def test_settings(invoke: Invoke, tmp_path: Path) -> None:
    """Name, value, source, default and meaning; secrets are stars, and what looks like a setting is noted."""
    file = tmp_path / "prod.env"
    file.write_text(f"REDIS_DB=2\nREDIS_PASSWORD={PASSWORD}\nOTHER=x\nEMBEDING_CACHE_TTL=1\n")
    env = {"RATE_LIMITS": "5/minute", "RATE_LIMIT_DRY_RUN": ""}
    result = invoke("--env-file", str(file), "settings", "--url", f"redis://app:{PASSWORD}@h/1", **env)
    lines = result.stdout.splitlines()

    assert 0 == result.exit_code
    for line in (
        "REDIS_URL = redis://***@h/1  (argument, default none)",
        "RATE_LIMITS = 5/minute  (environment, default none)",
        "RATE_LIMIT_DRY_RUN = false  (default)",
        "EMBEDDING_CACHE_LEASE = 300  (default)",
    ):
        assert line in lines
    meaning = lines[lines.index("RATE_LIMITS = 5/minute  (environment, default none)") + 1]
    assert f"    {Settings.model_fields['RATE_LIMITS'].description}" == meaning
    assert all(len(line) < 250 for line in lines)
    assert "EMBEDING_CACHE_TTL is no setting" in result.stderr
    assert PASSWORD not in result.output


def test_settings_of_a_file(invoke: Invoke, tmp_path: Path) -> None:
    """What an app reads from its file, every command can; one that is not there is a mistake."""
    file = tmp_path / ".env"
    file.write_text(f"REDIS_DB=2\nREDIS_PASSWORD={PASSWORD}://x\nREDIS_PORT=tcp://10.0.0.1:6380\n")
    told = json.loads(invoke("--env-file", str(file), "settings", "--json").stdout)
    rows = {row["name"]: (row["value"], row["default"], row["source"]) for row in told["settings"]}
    absent = invoke("--env-file", str(tmp_path / "absent"), "settings")

    assert list(Settings.model_fields) == list(rows)
    assert ("2", "0", ".env") == rows["REDIS_DB"]
    assert ("***", None, ".env") == rows["REDIS_PASSWORD"]
    assert [("10.0.0.1", "localhost", ".env"), ("6380", "6379", ".env")] == [rows["REDIS_HOST"], rows["REDIS_PORT"]]
    assert (None, None, "default") == rows["REDIS_URL"]
    assert {} == told["misspelt"]
    assert (2, True) == (absent.exit_code, "does not exist" in absent.output)
    assert "2" not in json.loads(invoke("settings", "--json").stdout)["settings"][2]["value"]


def test_settings_by_name(invoke: Invoke) -> None:
    """Those that are asked for, in any case; a name that is none is told with the one that was meant."""
    result = invoke("settings", "redis_db", "RATE_LIMITS", "--json")
    none = invoke("settings", "RATE_LIMTS", "x")

    assert ["REDIS_DB", "RATE_LIMITS"] == [row["name"] for row in json.loads(result.stdout)["settings"]]
    assert (2, "") == (none.exit_code, none.stdout)
    assert "Error: RATE_LIMTS is not a setting. Did you mean RATE_LIMITS?" in none.stderr
    assert "Error: x is not a setting. `redis-asgi settings` lists every one." in none.stderr


def test_settings_that_cannot_work(invoke: Invoke) -> None:
    """A line each, and exit code 2; the documentation's table needs no environment."""
    result = invoke("settings", REDIS_PORT="x", REDIS_DB="y")

    assert (2, "") == (result.exit_code, result.stdout)
    assert ["Error: REDIS_PORT='x'", "Error: REDIS_DB='y': "] == [line[:21] for line in result.stderr.splitlines()]
    assert 0 == invoke("settings", "--markdown").exit_code


# peek and reset


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
    """What somebody else has written into Redis is not shown, and nothing is with control characters."""
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
    """What finds out and does knows nothing of a terminal; nothing but ``__main__`` imports the command line."""
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
    """A prefix and a key secret are those of the settings: the key is the one that `flush_model` writes."""
    env = {"REDIS_URL": redis_server.url, "REDIS_KEY_PREFIX": "p:", "REDIS_KEY_SECRET": PASSWORD}
    env["EMBEDDING_CACHE_NAMESPACE"] = "n"

    async def flush() -> None:
        await flush_model("m", settings=Settings(**env))

    anyio.run(flush)
    keys = redis_server.client().keys()
    assert invoke("flush", "m", **env).exit_code == 0

    assert redis_server.client().keys() == keys


# memory


def test_memory_needs_no_redis() -> None:
    """An estimate asks nobody."""
    done = run("memory", "--dims", "1536", "--count", "1000000", "--clients", "1000000")

    assert (0, "") == (done.returncode, done.stderr)
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["what", "how", "many", "each", "in", "Redis"],
        ["vectors", "of", "1536", "float32", "numbers", "1,000,000", "7,381", "B", "6.9", "GiB"],
        ["clients", "of", "1", "fixed-window", "policy", "1,000,000", "197", "B", "187.9", "MiB"],
        ["together", "7.1", "GiB"],
    ]


def test_memory_as_json(invoke: Invoke) -> None:
    """Bytes for machines; limits and strategy of the options or the settings."""
    arguments = (
        "memory",
        "--clients",
        "10",
        "--limits",
        "100/minute; 1000/hour",
        "--strategy",
        "moving-window",
        "--json",
    )
    told = json.loads(invoke(*arguments).stdout)
    half = json.loads(invoke("memory", "--dims", "8", "--count", "2", "--json", EMBEDDING_CACHE_DTYPE="float16").stdout)

    assert told["fits"] is None
    assert told["bytes"] == told["parts"][0]["bytes"] == 10 * told["parts"][0]["each"]
    assert told["parts"][0]["each"] > 11_000
    assert half["parts"][0]["what"] == "vectors of 8 float16 numbers"


def test_memory_against_a_server(private_server: StartServer, invoke: Invoke) -> None:
    """What does not fit into maxmemory is said, with exit code 1."""
    server = private_server("--maxmemory", "100mb")
    fits = invoke("memory", "--dims", "1536", "--count", "1000", "--live", REDIS_URL=server.url)
    too_much = invoke("memory", "--dims", "1536", "--count", "1000000", "--live")
    as_json = invoke("memory", "--dims", "1536", "--count", "1000000", "--live", "--json")
    server.command("CONFIG", "SET", "maxmemory", "0")
    endless = invoke("memory", "--clients", "1000000", "--live")

    assert (0, 1, 1, 0) == (fits.exit_code, too_much.exit_code, as_json.exit_code, endless.exit_code)
    assert re.search(r"redis: 7\.0 MiB fits in maxmemory of 100\.0 MiB; [\d.]+ \w+ are in use now\n", fits.stdout)
    assert "does not fit" in too_much.stdout
    assert (False, 100 * 1024**2) == (
        json.loads(as_json.stdout)["fits"],
        json.loads(as_json.stdout)["parts"][0]["maxmemory"],
    )
    assert "maxmemory is 0" in endless.stdout


def test_memory_of_a_cluster_and_two_servers(cluster: Cluster, private_server: StartServer, invoke: Invoke) -> None:
    """The primaries of a cluster count together; vectors are compared with the server they are on."""
    for node in cluster.nodes:
        node.command("CONFIG", "SET", "maxmemory", "10mb")
    vectors = private_server("--maxmemory", "1mb")
    env = {"REDIS_URL": cluster.url, "REDIS_CLUSTER": "true", "EMBEDDING_CACHE_REDIS_URL": vectors.url}
    ask = ("memory", "--dims", "1536", "--count", "1000", "--clients", "1000", "--live", "--json")
    told = json.loads(invoke(*ask, **env).stdout)
    for node in cluster.nodes:
        node.command("CONFIG", "SET", "maxmemory", "0")

    assert [("redis", 30 * 1024**2, True), ("vectors", 1024**2, False)] == sorted(
        (part["server"], part["maxmemory"], part["fits"]) for part in told["parts"]
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(("memory",), "Nothing to estimate", id="nothing to estimate"),
        pytest.param(("memory", "--dims", "8"), "--dims and --count", id="dimensions without a number"),
        pytest.param(("memory", "--dims", "0", "--count", "1"), "dims=0", id="no dimensions"),
        pytest.param(("memory", "--dims", "8", "--count", "-1"), "-1", id="fewer than none"),
        pytest.param(("memory", "--dims", "8", "--count", "1", "--dtype", "int8"), "dtype='int8'", id="unknown type"),
        pytest.param(("memory", "--clients", "1", "--limits", "often"), "limits='often'", id="unknown notation"),
        pytest.param(("memory", "--clients", "1", "--strategy", "x"), "--strategy='x'", id="unknown strategy"),
        pytest.param(("peek", "1.2.3.4", "--strategy", "x"), "--strategy='x'", id="peek by an unknown strategy"),
        pytest.param(("peek", "1.2.3.4", "--name", "a b"), "name='a b'", id="a name no rule has"),
        pytest.param(("reset", "1.2.3.4", "--name", "a b"), "name='a b'", id="reset of a name no rule has"),
        pytest.param(("peek", "x", "--by", "y"), "--by='y'", id="an unknown kind"),
        pytest.param(("acl", "--user", "two words"), "--user='two words'", id="a user of two words"),
        pytest.param(("acl", "--user", ""), "--user=''", id="a user without a name"),
        pytest.param(("acl", "--user", "a", "--password-stdin"), "empty", id="an empty password"),
        pytest.param(("peek", "x", "--url", "http://localhost"), "REDIS_URL", id="no URL of Redis"),
        pytest.param(("check", "--timeout", "0"), "--timeout", id="no time"),
        pytest.param(("peek",), "CLIENT", id="no client"),
        pytest.param(("nonsense",), "nonsense", id="no such command"),
    ],
)
def test_misuse(arguments: tuple[str, ...], says: str, redis_url: str, invoke: Invoke) -> None:
    """What cannot work is told in a line on stderr, and exits with 2."""
    result = invoke(*arguments, text="", REDIS_URL=redis_url)

    assert (2, "") == (result.exit_code, result.stdout)
    assert says in result.stderr
    assert "Traceback" not in result.output


# explain


@pytest.mark.parametrize("word", ["redis_asgi.redis_back", "redis_back"])
def test_explain(word: str, invoke: Invoke) -> None:
    """An event is told with its level, what it means and what to do; its prefix may be left out."""
    result = invoke("explain", word)

    assert 0 == result.exit_code
    assert [
        "redis_asgi.redis_back (warning)",
        "    Redis (ADDRESS) answers again, and is used again.",
        "    -> Nothing is left to do.",
    ] == result.stdout.splitlines()


def test_explain_a_health_code(invoke: Invoke) -> None:
    """What a health check says can be looked up too, and as JSON."""
    said = json.loads(invoke("explain", "redis_busy", "--json").stdout)

    assert {
        "word": "redis_busy",
        "where": "health",
        "cause": "A script blocks Redis.",
        "fix": "SCRIPT KILL ends it.",
    } == said


def test_explain_all(invoke: Invoke) -> None:
    """Without an argument, all there is, whatever the settings are."""
    plain = invoke("explain", REDIS_PORT="none")
    told = json.loads(invoke("explain", "--json").stdout)

    assert 0 == plain.exit_code
    assert [each["word"] for each in told] == re.findall(r"^(\S+) \(", plain.stdout, re.MULTILINE)
    assert {"redis_asgi.defect", "redis_timeout", "breaker_open"} < {each["word"] for each in told}


def test_explain_what_is_not_there(invoke: Invoke) -> None:
    """A near miss is guessed; what is nothing at all is only refused."""
    near, far = invoke("explain", "mounted_twise"), invoke("explain", "xyzzy")

    assert (2, 2) == (near.exit_code, far.exit_code)
    assert "Did you mean redis_asgi.mounted_twice" in near.stderr
    assert "'xyzzy' is no event" in far.stderr
    assert "Did you mean" not in far.stderr


# acl


def test_acl(private_server: StartServer, invoke: Invoke) -> None:
    """The line can be piped into redis-cli as it is; the user then passes the check."""
    server = private_server()
    env = {"REDIS_URL": server.url, "REDIS_KEY_PREFIX": "app:"}
    done = run("acl", "--user", "app", "--password-stdin", env=env, text=f"{PASSWORD}\n")
    assert (0, "") == (done.returncode, done.stderr)
    assert done.stdout.startswith("ACL SETUSER app reset on #")
    assert "~app:rate_limit:*" in done.stdout
    assert PASSWORD not in done.stdout

    server.command(*shlex.split(done.stdout))
    checked = invoke("check", "--strict", **env, REDIS_USERNAME="app", REDIS_PASSWORD=PASSWORD)
    assert checked.exit_code == 0, checked.stdout


@pytest.mark.parametrize("prefix", ["it's:", 'say"x":', "back\\slash:", "glob*[a]?^:"])
def test_acl_can_be_piped_into_redis_cli(prefix: str, private_server: StartServer, invoke: Invoke) -> None:
    """Whatever the prefix, redis-cli makes the user of the line, whose rights then suffice."""
    cli = shutil.which("redis-cli") or shutil.which("valkey-cli")
    if cli is None:
        pytest.skip("no redis-cli found")
    server = private_server()
    env = {"REDIS_URL": server.url, "REDIS_KEY_PREFIX": prefix}
    line = invoke("acl", "--user", "app", "--password-stdin", text=PASSWORD, **env).stdout
    done = subprocess.run([cli, "-u", server.url], input=line, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "OK", done

    checked = invoke("check", "--strict", REDIS_USERNAME="app", REDIS_PASSWORD=PASSWORD)
    assert checked.exit_code == 0, checked.output


def test_acl_without_a_password(invoke: Invoke) -> None:
    """Without a password there is a placeholder, and a word on stderr; a line for each server."""
    one = invoke("acl", "--user", "app")
    two = invoke("acl", "--user", "app", "--json", EMBEDDING_CACHE_REDIS_URL="redis://vectors")

    assert "#SHA256-OF-THE-PASSWORD" in one.stdout
    assert "--password-stdin" in one.stderr
    told = json.loads(two.stdout)
    assert ["redis", "vectors"] == [server["server"] for server in told]
    assert "mget" not in told[0]["commands"]
    assert "evalsha" not in told[1]["commands"]
    assert told[1]["line"].startswith("ACL SETUSER app ")


# persist


def test_persist(private_server: StartServer) -> None:
    """What was changed is shown, with what it was."""
    server = private_server()
    done = run("persist", env={"REDIS_URL": server.url})

    assert done.returncode == 0
    assert re.search(r'^save +"" +"900 1 300 10 60 10000"$', done.stdout, re.MULTILINE)
    assert "CONFIG REWRITE" in done.stderr
    assert server.client().config_get("save") == {"save": "900 1 300 10 60 10000"}


def test_what_sentinels_do_not_spread(sentinels: SentinelTrio, invoke: Invoke) -> None:
    """Behind sentinels, users and configuration are each server's own, and that is said."""
    env = {"REDIS_SENTINELS": ",".join(sentinels.addresses), "REDIS_SENTINEL_MASTER": "mymaster"}
    persisted, line = invoke("persist", **env), invoke("acl", "--user", "app")

    assert (0, 0) == (persisted.exit_code, line.exit_code)
    assert "each replica" in persisted.stderr
    assert "every node" in line.stderr
    assert sentinels.primary().client().config_get("save") == {"save": "900 1 300 10 60 10000"}
    assert invoke("check", "--strict").exit_code == 0
    assert "nothing is counted" in invoke("peek", "192.0.2.1").stdout


def test_persist_where_it_is_forbidden(private_server: StartServer, invoke: Invoke) -> None:
    """A managed Redis is told as that, with exit code 1."""
    result = invoke("persist", REDIS_URL=private_server("--rename-command", "CONFIG", "").url)

    assert (1, "") == (result.exit_code, result.stdout)
    assert "parameter group" in result.stderr


def test_persist_names_the_nodes(private_cluster: Cluster, invoke: Invoke) -> None:
    """On a cluster each node has lines of its own."""
    result = invoke("persist", REDIS_URL=private_cluster.url, REDIS_CLUSTER="true")

    assert all(result.stdout.count(f"127.0.0.1:{node.port} ") == 3 for node in private_cluster.nodes)


# all of them

AT_WORK = (
    ("check", "--strict"),
    ("check", "--json"),
    ("peek", "192.0.2.1"),
    ("peek", "192.0.2.1", "--json"),
    ("reset", "192.0.2.1"),
    ("flush", "m", "--force"),
    ("memory", "--clients", "10", "--live"),
    ("persist",),
)


@pytest.mark.parametrize("arguments", AT_WORK, ids=" ".join)
def test_trouble_is_told_without_a_secret(
    arguments: tuple[str, ...], private_server: StartServer, tls_server: Server, invoke: Invoke
) -> None:
    """Unreachable, wrong password, no right, TLS where there is none: exit code 1, what to do, and no password."""
    server = private_server()
    server.add_user("app", f">{PASSWORD}", "~*", "+ping")
    here = f"127.0.0.1:{server.port}"
    cases = {
        f"redis://app:{PASSWORD}@127.0.0.1:1/0": "refuses connections",
        f"redis://app:wrong-{PASSWORD}@{here}": "refuses the user name or the password",
        f"redis://app:{PASSWORD}@{here}": "ACL|acl|permission|lacks",
        f"rediss://app:{PASSWORD}@{here}": "does not speak TLS",
        f"redis://app:{PASSWORD}@127.0.0.1:{tls_server.port}": "speaks TLS",
    }
    for url, says in cases.items():
        # A server without TLS waits for the end of a line that never comes.
        for result in (invoke(*arguments, "--url", url, REDIS_TIMEOUT="0.5"), invoke(*arguments, REDIS_URL=url)):
            assert result.exit_code == 1, (url, result.output)
            assert re.search(says, result.output), (says, result.output)
            assert PASSWORD not in result.output
            assert "Traceback" not in result.output
            if "--json" in arguments and arguments[0] == "check":
                assert json.loads(result.stdout)["ok"] is False
            elif arguments[0] != "check":
                assert (1, "") == (len(result.stderr.splitlines()), result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", AT_WORK, ids=" ".join)
def test_a_server_that_hangs_is_not_waited_for(
    arguments: tuple[str, ...], private_server: StartServer, invoke: Invoke
) -> None:
    """No longer than ``REDIS_TIMEOUT`` and two seconds for finding out why, and that is said."""
    server = private_server()
    server.pause()
    try:
        started = fair_time()
        result = invoke(*arguments, REDIS_URL=server.url, REDIS_TIMEOUT="0.3")
        took = fair_time() - started
    finally:
        server.resume()

    assert (1, True) == (result.exit_code, "0.3 s" in result.output), result.output
    assert took < 4


@pytest.mark.parametrize(
    "arguments", [("reset", "tenant-1", "--by", "custom"), ("flush", "m", "--force")], ids=" ".join
)
def test_a_replica_is_told_as_one(arguments: tuple[str, ...], replica: Server, invoke: Invoke) -> None:
    """What writes fails where it may not, and says why."""
    primary = ExternalServer(f"redis://127.0.0.1:{replica.client().info('replication')['master_port']}")
    counted(primary, "tenant-1")
    wait_until(lambda: replica.client().dbsize() == 1, "the counter is in the replica")
    result = invoke(*arguments, REDIS_URL=replica.url)
    primary.stop()

    assert (1, "") == (result.exit_code, result.stdout)
    assert re.search("takes no writes|readonly", result.stderr), result.stderr


@pytest.mark.parametrize("arguments", [*AT_WORK, ("acl", "--user", "app")], ids=" ".join)
def test_success_shows_no_secret(arguments: tuple[str, ...], private_server: StartServer, invoke: Invoke) -> None:
    """With a password in the environment, in the URL, or for the keys, none is ever printed."""
    server = private_server()
    server.add_user("app", f">{PASSWORD}", "~*", "&*", "+@all")
    parts = {"REDIS_HOST": server.host, "REDIS_PORT": str(server.port), "REDIS_USERNAME": "app"}
    by_parts = invoke(*arguments, **parts, REDIS_PASSWORD=PASSWORD, REDIS_KEY_SECRET=f"pepper-{PASSWORD}")
    by_url = invoke(*arguments, "--url", f"redis://app:{PASSWORD}@{server.host}:{server.port}/0")

    for result in (by_parts, by_url):
        assert result.exit_code == 0, result.output
        assert PASSWORD not in result.output


@pytest.mark.parametrize("arguments", [*AT_WORK, ("acl", "--user", "app")], ids=" ".join)
def test_memory_has_nothing_to_look_at(arguments: tuple[str, ...], invoke: Invoke) -> None:
    """On memory:// everything is in the app's process, and that is said."""
    result = invoke(*arguments, REDIS_URL="memory://")

    assert result.exit_code == (1 if arguments[0] == "check" else 2)
    assert "in the app's process" in result.output


@pytest.mark.parametrize(
    "url",
    [
        f"http://app:{PASSWORD}@127.0.0.1",
        f"redis://app:{PASSWORD}@127.0.0.1:port",
        f"redis://app:{PASSWORD}@127.0.0.1/db",
        f"redis://127.0.0.1/0?password={PASSWORD}&nonsense=1",
        f"app:{PASSWORD}@127.0.0.1",
    ],
)
def test_a_url_that_cannot_work_shows_no_secret(url: str, invoke: Invoke) -> None:
    """A URL is named when it is wrong, but not what is in it."""
    for command, code in (("check", 1), ("peek", 2)):
        result = invoke(command, *(["192.0.2.1"] if command == "peek" else []), "--url", url)
        assert (code, True) == (result.exit_code, "REDIS_URL" in result.output)
        assert PASSWORD not in result.output


def test_a_url_takes_no_secret_along(private_server: StartServer, invoke: Invoke) -> None:
    """The configured password does not go to the server of --url."""
    server = private_server()
    env = {"REDIS_PASSWORD": PASSWORD, "REDIS_SENTINELS": "a:1", "REDIS_SENTINEL_MASTER": "m", "REDIS_DB": "3"}
    env["EMBEDDING_CACHE_REDIS_URL"] = "redis://127.0.0.1:1"
    result = invoke("check", "--strict", "--url", server.url, **env)

    assert result.exit_code == 0, result.output
    assert server.calls("auth") == 0


def test_ctrl_c_ends_cleanly(private_server: StartServer) -> None:
    """An interrupt ends a command that waits, at once and without a traceback, with 130."""
    server = private_server()
    server.pause()
    # The kernel takes connections for a stopped server.
    before = _connections(server.port)
    try:
        command = [sys.executable, "-m", "redis_asgi", "peek", "192.0.2.1"]
        environment = clean_environment(REDIS_URL=server.url)
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            # A shell starts what runs in its background with this signal ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - no threads
        ) as process:
            wait_until(lambda: _connections(server.port) > before, "it has connected")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=10)
    finally:
        server.resume()

    assert (130, "", "") == (process.returncode, out, err)


def test_an_interrupt_that_is_lost_is_said_again() -> None:
    """What swallows a cancellation, as Python 3.11's `asyncio.wait_for` may, does not keep the user waiting."""
    lost = 0

    async def stubborn() -> None:
        nonlocal lost
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            lost += 1
        await asyncio.sleep(60)

    async def interrupted() -> None:
        async with asyncio.timeout(0.01):
            await _interruptible(stubborn())

    with pytest.raises(TimeoutError):
        asyncio.run(interrupted())
    assert 1 == lost


def _connections(port: int) -> int:
    """How many connections of this machine lead to *port*."""
    table = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    return sum(line.split()[2].endswith(f":{port:04X}") and line.split()[3] == "01" for line in table)


@pytest.mark.parametrize(("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)], ids=["colours", "NO_COLOR"])
def test_colours_are_for_terminals(env: dict[str, str], coloured: bool, redis_url: str) -> None:
    """On a terminal failures are red, unless NO_COLOR is set."""
    main, other = pty.openpty()
    environment = clean_environment(REDIS_URL="redis://127.0.0.1:1", TERM="xterm-256color", **env)
    command = [sys.executable, "-m", "redis_asgi", "check"]
    with subprocess.Popen(command, stdout=other, stderr=subprocess.PIPE, env=environment) as process:
        os.close(other)
        shown = b""
        # EIO: the other side is closed.
        try:
            while data := os.read(main, 4096):
                shown += data
        except OSError:
            pass
        process.communicate(timeout=20)
    os.close(main)

    assert b"fail" in shown
    assert coloured == (b"\x1b[" in re.sub(rb"\x1b\[1?m", b"", shown) and b"31m" in shown)


def test_progress_is_for_terminals() -> None:
    """What is done now stands on stderr where that is a terminal, and never in the result."""
    main, other = pty.openpty()
    environment = clean_environment(REDIS_URL="redis://127.0.0.1:1", TERM="xterm-256color")
    command = [sys.executable, "-m", "redis_asgi", "check", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=other, env=environment) as process:
        os.close(other)
        out, _ = process.communicate(timeout=20)
    shown = os.read(main, 65536)
    os.close(main)

    assert json.loads(out)["ok"] is False
    assert b"connecting" in shown


# the guide


def shown() -> list[tuple[str, str]]:
    """Each command line of the guide with what stands below it."""
    text = section("## Command line") + section("## Capacity and persistence")
    blocks = re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    runs = [run for block in blocks for run in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    return [(line, said) for line, _, said in (run.partition("\n") for run in runs) if line.startswith("redis-asgi ")]


def without_numbers(text: str) -> str:
    """*text* without what differs from run to run: numbers, which server it is, how columns are laid out."""
    text = re.sub(r"redis://[a-z0-9.:]+", "redis://server", text).replace("Valkey", "Redis")
    return re.sub(r"[ \n]+", " ", re.sub(r"\d[\d,.:-]*", "N", text)).strip()


def test_guide_shows_what_is_printed(
    private_server: StartServer, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command of the guide prints what stands there, in a clone of the repository."""
    monkeypatch.chdir(Path(redis_asgi.__file__).parent.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    server = private_server("--maxmemory", "4gb", "--maxmemory-policy", "allkeys-lru")
    settings = Settings(REDIS_URL=server.url)

    async def use() -> None:
        manager = redis_asgi.RedisManager(settings)
        limiter, client = RateLimiter(manager), await partition_of("203.0.113.7", "ip", settings)
        for limits, name, cost in (("1000/hour", "default-3600s", 410), ("5/minute", "login", 5)):
            await limiter.consume(client, limits, name=name, cost=cost)
        await limiter.consume(client, "20/minute", name="default-60s", cost=2)
        await manager.close()

    anyio.run(use)
    server.command(*rights_of(settings).line("app", PASSWORD).split(), "-hset")
    commands = {line.split()[1] for line, _ in shown()}
    assert commands == set(COMMANDS)
    for line, said in shown():
        app_user = line == "redis-asgi check"
        result = invoke(
            *shlex.split(line)[1:],
            REDIS_URL=server.url,
            RATE_LIMITS="20/minute; 1000/hour",
            REDIS_USERNAME="app" if app_user else None,
            REDIS_PASSWORD=PASSWORD if app_user else None,
        )
        assert without_numbers(said) == without_numbers(result.output), line


# how it speaks


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "?"),
        (0.0, "now"),
        (0.001, "1 s"),
        (59.2, "60 s"),
        (119.5, "2 min"),
        (3600, "60 min"),
        (7260, "2 h 1 min"),
        (86400 * 3, "3 d 0 h"),
    ],
)
def test_seconds(value: float | None, text: str) -> None:
    """A wait is never told shorter than it is."""
    assert output.seconds(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 1024**3, "5.0 GiB"), (2**50, "1024.0 TiB")],
)
def test_sizes(count: int, text: str) -> None:
    """Bytes in the unit that fits."""
    assert output.size(count) == text
