"""`redis-asgi check` and `redis-asgi settings`."""

import json
import re
from pathlib import Path

import pytest

from redis_asgi import Settings

from ..conftest import StartServer
from ..kit.servers import Cluster
from .shell import CREDENTIAL, PASSWORD, Invoke, run


def test_check_of_a_good_server(redis_url: str) -> None:
    """A gate lets a good server pass: exit code 0,
    one line per check, plain text when nobody looks.
    """
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
    """A variable that looks like ours is a warning,
    so that a strict gate stops it; its value is not shown.
    """
    env = {"REDIS_URL": redis_url, "RATE_LIMTS": CREDENTIAL, "redis_port": "1", "REDIS_PORT_6379_TCP": "tcp://h:1"}
    plain, strict = invoke("check", **env), invoke("check", "--strict", **env)

    assert (0, 3) == (plain.exit_code, strict.exit_code), plain.output
    assert "warn  settings     RATE_LIMTS is no setting and changes nothing\n" in plain.stdout
    assert "-> Is REDIS_PORT meant? Rename it." in plain.stdout
    assert 2 == plain.stdout.count("warn ")
    assert CREDENTIAL not in plain.stdout


# settings


def test_settings(invoke: Invoke, tmp_path: Path) -> None:
    """Name, value, source, default and meaning; secrets are stars,
    and what looks like a setting is noted.
    """
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
    """Those that are asked for, in any case;
    a name that is none is told with the one that was meant.
    """
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
