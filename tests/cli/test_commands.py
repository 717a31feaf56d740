"""The command line: its help, what is missing, and what all commands do alike."""

import asyncio
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

import redis_asgi
from redis_asgi import RateLimiter, Settings
from redis_asgi.cli import output
from redis_asgi.cli.session import _interruptible
from redis_asgi.inspection.quotas import partition_of
from redis_asgi.inspection.rights import rights_of

from ..conftest import StartServer
from ..kit.documents import section
from ..kit.fair_time import fair_time
from ..kit.processes import ENDS_WITHIN, clean_environment, run_python
from ..kit.servers import ExternalServer, Server, wait_until
from .shell import PASSWORD, Invoke, counted, run

COMMANDS = ("check", "settings", "rules", "peek", "reset", "flush", "memory", "acl", "persist", "explain")


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
    """Unreachable, wrong password, no right, TLS where there is none:
    exit code 1, what to do, and no password.
    """
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
            # A shell starts what runs in its background with this signal ignored, and children
            # inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - no threads
        ) as process:
            wait_until(lambda: _connections(server.port) > before, "it has connected")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=ENDS_WITHIN)
    finally:
        server.resume()

    assert (130, "", "") == (process.returncode, out, err)


def test_an_interrupt_that_is_lost_is_said_again() -> None:
    """What swallows a cancellation, as Python 3.11's `asyncio.wait_for` may,
    does not keep the user waiting.
    """
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
        process.communicate(timeout=ENDS_WITHIN)
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
        out, _ = process.communicate(timeout=ENDS_WITHIN)
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
    """*text* without what differs from run to run: numbers,
    which server it is, how columns are laid out.
    """
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
