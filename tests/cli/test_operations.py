"""`redis-asgi memory`, `explain`, `acl` and `persist`."""

import json
import re
import shlex
import shutil
import subprocess

import pytest

from ..conftest import StartServer
from ..kit.servers import Cluster, SentinelTrio
from .shell import PASSWORD, Invoke, run


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
