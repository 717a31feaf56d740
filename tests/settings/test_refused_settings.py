"""Settings that cannot work: errors name the variable and a value that works, and show no secret."""

import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from redis_asgi import ConfigurationError, RedisASGIError, Settings
from redis_asgi.settings.locations import redact, weakened_by

from .values import FILES, SECRET

REFUSED: list[tuple[str, str]] = [
    ("REDIS_HOST", "redis://localhost"),
    ("REDIS_HOST", "user:pw@localhost"),
    ("REDIS_HOST", "redis.test:6380"),
    ("REDIS_HOST", "[::1]"),
    ("REDIS_HOST", "[::1]:6379"),
    ("REDIS_PORT", "0"),
    ("REDIS_PORT", "65536"),
    ("REDIS_PORT", "tcp://10.0.0.1"),
    ("REDIS_PORT", "tcp://[::1:6379"),
    ("REDIS_PORT", "http://10.0.0.1:6379"),
    ("REDIS_DB", "-1"),
    ("REDIS_DB", "zero"),
    ("REDIS_URL", "http://localhost"),
    ("REDIS_URL", "localhost:6379"),
    ("REDIS_URL", "redis://localhost:port"),
    ("REDIS_URL", "redis://localhost:0"),
    ("REDIS_URL", "redis://localhost:99999"),
    ("REDIS_URL", "redis://localhost/db"),
    ("REDIS_URL", "redis://[::1"),
    ("REDIS_URL", "redis://localhost?colour=red"),
    ("REDIS_URL", "redis://localhost?socket_timeout=soon"),
    ("REDIS_URL", "unix://"),
    ("REDIS_POOL_SIZE", "0"),
    ("REDIS_TIMEOUT", "0"),
    ("REDIS_TIMEOUT", "-1"),
    ("REDIS_TIMEOUT", "nan"),
    ("REDIS_TIMEOUT", "inf"),
    ("REDIS_TIMEOUT", "10s"),
    ("REDIS_RETRY_ATTEMPTS", "-1"),
    ("REDIS_SSL", "maybe"),
    ("REDIS_SSL_CA_CERTS", "/no/such/file.pem"),
    ("REDIS_SSL_CERTFILE", "/no/such/file.pem"),
    ("REDIS_SSL_KEYFILE", "/no/such/file.pem"),
    ("REDIS_SENTINELS", "sentinel-1"),
    ("REDIS_SENTINELS", "sentinel-1:0"),
    ("REDIS_SENTINELS", "sentinel-1:x"),
    ("REDIS_SENTINELS", ":26379"),
    ("REDIS_SENTINELS", "::1:26379"),
    ("REDIS_SENTINELS", "[::1]"),
    ("REDIS_SENTINELS", "[a]:26379"),
    ("REDIS_SENTINELS", "[]:26379"),
    ("REDIS_SENTINELS", "redis://a:26379"),
    ("REDIS_SENTINELS", "a b:26379"),
    ("REDIS_SENTINELS", "a:²"),
    ("REDIS_CLUSTER_NODES", "::1:6379"),
    ("REDIS_CLUSTER_NODES", "node-1"),
    ("REDIS_CLUSTER", "3"),
    ("REDIS_BATCH", "slot"),
    ("REDIS_KEY_PREFIX", "a{b}"),
    ("REDIS_KEY_PREFIX", "a b"),
    ("REDIS_KEY_PREFIX", "a\tb"),
    ("REDIS_KEY_PREFIX", "a\x7fb"),
    ("REDIS_KEY_PREFIX", "a" * 201),
    ("RATE_LIMIT_WINDOW", "0"),
    ("RATE_LIMIT_WINDOW", "1.5"),
    ("RATE_LIMIT_WINDOW", str(366 * 86400 + 1)),
    ("MAX_REQUESTS_PER_WINDOW", "0"),
    ("MAX_REQUESTS_PER_WINDOW", "-5"),
    ("MAX_REQUESTS_PER_WINDOW", str(10**9 + 1)),
    ("RATE_LIMITS", "often"),
    ("RATE_LIMITS", "0/second"),
    ("RATE_LIMITS", "10/0 seconds"),
    ("RATE_LIMIT_STRATEGY", "fixed_window"),
    ("RATE_LIMIT_PARTITION", "cookie"),
    ("RATE_LIMIT_PARTITION", "header:"),
    ("RATE_LIMIT_PARTITION", "header:x api key"),
    ("RATE_LIMIT_MISSING_IDENTITY", "allow"),
    ("RATE_LIMIT_TRUSTED_PROXIES", "10.0.0.0/33"),
    ("RATE_LIMIT_TRUSTED_PROXIES", "10.0.0.1/8"),
    ("RATE_LIMIT_TRUSTED_PROXIES", "*"),
    ("RATE_LIMIT_TRUSTED_PROXIES", "64:ff9b::/96"),
    ("RATE_LIMIT_TRUSTED_PROXIES", "unix:"),
    ("RATE_LIMIT_FORWARDED_HEADER", "x real ip"),
    ("RATE_LIMIT_EXEMPT_PATHS", "/items/{id}"),
    ("RATE_LIMIT_IPV6_PREFIX", "0"),
    ("RATE_LIMIT_IPV6_PREFIX", "129"),
    ("RATE_LIMIT_EXEMPT_PATHS", "health"),
    ("RATE_LIMIT_ON_REDIS_ERROR", "ignore"),
    ("RATE_LIMIT_FALLBACK_DIVISOR", "0"),
    ("RATE_LIMIT_LOCAL_MAX_PARTITIONS", "0"),
    ("RATE_LIMIT_TIMEOUT", "0"),
    ("RATE_LIMIT_TIMEOUT", "nan"),
    ("RATE_LIMIT_BODY_CAP", "-1"),
    ("RATE_LIMIT_BODY_CAP", "1MiB"),
    ("RATE_LIMIT_HEADERS", "x-ratelimit"),
    ("RATE_LIMIT_DRY_RUN", "perhaps"),
    ("EMBEDDING_CACHE_TTL", "0"),
    ("EMBEDDING_CACHE_TTL_JITTER", "1"),
    ("EMBEDDING_CACHE_NAMESPACE", "n" * 201),
    ("EMBEDDING_CACHE_ROUTES", "openai:my/path"),
    ("EMBEDDING_CACHE_SHARE", "perhaps"),
    ("EMBEDDING_CACHE_LEASE", "-1"),
    ("EMBEDDING_CACHE_CREDENTIAL_HEADERS", "x api key"),
    ("EMBEDDING_CACHE_KEYED_HEADERS", "x-tenant:"),
    ("EMBEDDING_CACHE_KEYED_HEADERS", "*"),
    ("EMBEDDING_CACHE_IGNORED_HEADERS", "x-*-id"),
    ("EMBEDDING_CACHE_IGNORED_HEADERS", "authorization"),
    ("EMBEDDING_CACHE_IGNORED_HEADERS", "x-*"),
    ("EMBEDDING_CACHE_IGNORED_HEADERS", "content-type"),
    ("EMBEDDING_CACHE_IGNORED_FIELDS", ".user"),
    ("EMBEDDING_CACHE_REQUEST_LISTS", "metadata..tags"),
    ("EMBEDDING_CACHE_BODY_SECONDS", "0"),
    ("EMBEDDING_CACHE_USAGE", "free"),
    ("EMBEDDING_CACHE_DTYPE", "int8"),
    ("EMBEDDING_CACHE_L1_BYTES", "-1"),
    ("EMBEDDING_CACHE_L1_SECONDS", "nan"),
    ("EMBEDDING_CACHE_MAX_REQUEST_BYTES", "0"),
    ("EMBEDDING_CACHE_MAX_RESPONSE_BYTES", "0"),
    ("EMBEDDING_CACHE_MAX_INPUTS", "0"),
    ("EMBEDDING_CACHE_TIMEOUT", "0"),
    ("EMBEDDING_CACHE_STATUS", "perhaps"),
    ("EMBEDDING_CACHE_REDIS_URL", "http://vectors"),
]


@pytest.mark.parametrize(("name", "text"), REFUSED, ids=[f"{n}={t[:24]!r}" for n, t in REFUSED])
def test_bad_value_names_the_variable_and_one_that_works(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    """One error on one line: variable, what was given, what is wrong,
    and an example that is accepted.
    """
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigurationError) as caught:
        Settings()
    message = str(caught.value)

    assert message.startswith(f"{name}=")
    assert "\n" not in message
    assert "Try " in message
    assert caught.value.__cause__ is None
    if "secret" not in name.lower() and "@" not in text and len(text) < 80 and not re.search(r"=|:port|\[::", text):
        assert repr(text) in message


WORKING_EXAMPLES = [name for name in Settings.model_fields if name not in FILES]


@pytest.mark.parametrize("name", WORKING_EXAMPLES)
def test_the_example_of_every_setting_works(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What an error tells the operator to try is accepted."""
    examples = Settings.model_fields[name].examples or []
    monkeypatch.setenv(name, str(examples[0]))
    if name == "REDIS_SENTINELS":
        monkeypatch.setenv("REDIS_SENTINEL_MASTER", "mymaster")
    if name == "REDIS_CLUSTER_NODES":
        monkeypatch.setenv("REDIS_CLUSTER", "true")

    assert getattr(Settings(), name) is not None


def test_error_is_a_value_error_and_ours() -> None:
    """Both a reader of our tree and one of built-ins catches it; it is not pydantic's."""
    with pytest.raises(ConfigurationError) as caught:
        Settings(REDIS_PORT=0)

    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RedisASGIError)
    assert not isinstance(caught.value, ValidationError)


def _everything_said(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + str(error) + repr(error)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"REDIS_PASSWORD": SECRET, "REDIS_PORT": 0}, id="password beside another error"),
        pytest.param({"REDIS_PASSWORD": [SECRET]}, id="password of a wrong type"),
        pytest.param({"REDIS_KEY_SECRET": [SECRET]}, id="key secret of a wrong type"),
        pytest.param({"REDIS_URL": f"http://app:{SECRET}@host"}, id="password in a bad URL"),
        pytest.param({"REDIS_URL": f"redis://app:{SECRET}@host:port"}, id="password in a URL with a bad port"),
        pytest.param({"REDIS_URL": f"redis://{SECRET}@host/db"}, id="user in a URL with a bad database"),
        pytest.param({"REDIS_URL": f"redis://:{SECRET}/1@host/db"}, id="slash in the password"),
        pytest.param({"REDIS_URL": f"redis://:a@b{SECRET}@host/db"}, id="at sign in the password"),
        pytest.param({"REDIS_URL": f"redis://:a {SECRET}@host/db"}, id="blank in the password"),
        pytest.param({"REDIS_URL": f"http://host?password={SECRET}"}, id="password in the query of a bad URL"),
        pytest.param({"REDIS_URL": SecretStr(f"http://a:{SECRET}@host")}, id="bad URL given as a secret"),
        pytest.param({"REDIS_URL": f"app:{SECRET}@host:6379"}, id="URL without a scheme"),
        pytest.param({"REDIS_HOST": f"app:{SECRET}@host"}, id="credentials in the host"),
        pytest.param({"REDIS_HOST": f"redis://app:{SECRET}@host"}, id="URL in the host"),
        pytest.param({"REDIS_SSL": True, "REDIS_URL": f"redis://:{SECRET}@host"}, id="conflict of TLS and URL"),
        pytest.param({"REDIS_PASSWORD": SECRET, "REDIS_CLUSTER": True, "REDIS_DB": 1}, id="conflict elsewhere"),
        pytest.param({"REDIS_PASSWORD": SECRET, "REDIS_PASSWROD": "x"}, id="unknown keyword beside it"),
    ],
)
def test_no_error_shows_a_secret(values: dict[str, Any]) -> None:
    """Neither the message nor the traceback nor what it is chained to holds a password."""
    with pytest.raises(ConfigurationError) as caught:
        Settings(**values)

    # Source lines of this file are part of a traceback; the parameters are not in them.
    assert SECRET not in _everything_said(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_no_error_shows_a_secret_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same when the values come from variables."""
    monkeypatch.setenv("REDIS_PASSWORD", SECRET)
    monkeypatch.setenv("REDIS_URL", f"redis://app:{SECRET}@host:port")
    with pytest.raises(ConfigurationError) as caught:
        Settings()

    assert SECRET not in _everything_said(caught.value)
    assert str(caught.value).startswith("REDIS_URL='redis://***@host:port': ")


@pytest.mark.parametrize("show", [repr, str, Settings.model_dump_json], ids=["repr", "str", "JSON"])
def test_settings_do_not_show_secrets(show: Callable[[Settings], str]) -> None:
    """Printing settings shows no password, key secret or URL."""
    shown = show(Settings(REDIS_PASSWORD=SECRET, REDIS_KEY_SECRET=SECRET, REDIS_URL=f"redis://:{SECRET}@host"))

    assert SECRET not in shown
    assert "6379" in shown


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        pytest.param("redis://app:pw@host:1/2", "'redis://***@host:1/2'", id="user and password"),
        pytest.param("redis://host/0?password=pw&x=1", "'redis://host/0?password=***&x=1'", id="query"),
        pytest.param("redis://host", "'redis://host'", id="nothing to hide"),
        pytest.param("app:pw@host:6379", "'***@host:6379'", id="no scheme"),
        pytest.param("x" * 100, "'" + "x" * 77 + "...'", id="long"),
        pytest.param(7, "7", id="number"),
    ],
)
def test_redaction(given: object, shown: str) -> None:
    """Credentials become stars, long values are cut, the rest stays readable."""
    assert shown == redact(given)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        pytest.param("REDIS_HOTS", "Did you mean REDIS_HOST?", id="near"),
        pytest.param("RATE_LIMIT_STRATGY", "Did you mean RATE_LIMIT_STRATEGY?", id="near and long"),
        pytest.param("redis_port", "Did you mean REDIS_PORT?", id="lower case"),
        pytest.param("nonsense", "`redis-asgi settings` lists every one.", id="far"),
    ],
)
def test_unknown_keyword_suggests(name: str, hint: str) -> None:
    """A misspelt keyword is answered with the setting that was meant."""
    with pytest.raises(ConfigurationError) as caught:
        Settings(**{name: "x"})

    assert f"{name} is not a setting. {hint}" == str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param(
            {"REDIS_SSL": True, "REDIS_URL": "redis://host"},
            "REDIS_SSL=True, but REDIS_URL='redis://host' is not encrypted. Try a rediss:// URL.",
            id="TLS asked for, URL without",
        ),
        pytest.param(
            {"REDIS_SENTINELS": "a:1"},
            "REDIS_SENTINELS needs REDIS_SENTINEL_MASTER. Try REDIS_SENTINEL_MASTER=mymaster.",
            id="sentinels without a master's name",
        ),
        pytest.param(
            {"REDIS_SENTINELS": "a:1", "REDIS_SENTINEL_MASTER": "m", "REDIS_CLUSTER": True},
            "REDIS_SENTINELS and REDIS_CLUSTER exclude each other. Unset one of them.",
            id="sentinels and cluster",
        ),
        pytest.param(
            {"REDIS_CLUSTER_NODES": "a:1"},
            "REDIS_CLUSTER_NODES needs REDIS_CLUSTER. Try REDIS_CLUSTER=true.",
            id="nodes of no cluster",
        ),
        pytest.param(
            {"REDIS_CLUSTER_NODES": "a:1", "REDIS_CLUSTER": True, "REDIS_URL": "redis://:hunter2@h"},
            "REDIS_CLUSTER_NODES says where Redis is, and so does REDIS_URL='redis://***@h'. Unset one of them.",
            id="nodes and a URL",
        ),
        pytest.param(
            {"REDIS_CLUSTER": True, "REDIS_DB": 1},
            "REDIS_DB=1: Redis Cluster has only database 0. Unset REDIS_DB.",
            id="cluster with a database",
        ),
        pytest.param(
            {"REDIS_CLUSTER": True, "REDIS_URL": "redis://host/1"},
            "REDIS_URL='redis://host/1': Redis Cluster has only database 0. Try it without.",
            id="cluster with a database in the URL",
        ),
        pytest.param(
            {"REDIS_CLUSTER": True, "REDIS_URL": "unix:///run/redis.sock"},
            "REDIS_URL='unix:///run/redis.sock': REDIS_CLUSTER needs TCP. Try redis://localhost:6379.",
            id="cluster on a unix socket",
        ),
    ],
)
def test_conflicting_settings_say_which(values: dict[str, Any], message: str) -> None:
    """Settings that cannot work together name each other and the way out."""
    with pytest.raises(ConfigurationError) as caught:
        Settings(**values)

    assert message == str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", None),
        ("?ssl_cert_reqs=required", None),
        ("?ssl_cert_reqs=optional&ssl_check_hostname=true", None),
        ("?ssl_cert_reqs=none", "ssl_cert_reqs=none"),
        ("?ssl_cert_reqs=%6eone", "ssl_cert_reqs=none"),
        ("?ssl_check_hostname=false", "ssl_check_hostname=false"),
        ("?ssl_check_hostname=No", "ssl_check_hostname=false"),
        ("?ssl_check_hostname=0", "ssl_check_hostname=false"),
        ("?db=1&ssl%5Fcheck_hostname=F", "ssl_check_hostname=false"),
    ],
)
def test_what_weakens_tls_is_read_as_the_client_reads_it(options: str, expected: str | None) -> None:
    """Whatever the spelling of an option, what it does is what counts."""
    url = Settings(REDIS_URL=f"valkeys://host{options}").REDIS_URL

    assert url is not None
    assert expected == weakened_by(url.get_secret_value())


def test_unknown_demand_of_a_certificate_is_refused() -> None:
    """What no connection could be made with is told at construction."""
    with pytest.raises(ConfigurationError, match="ssl_cert_reqs is not none, optional or required"):
        Settings(REDIS_URL="rediss://host?ssl_cert_reqs=NONE")


@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile", "ssl_keyfile"])
@pytest.mark.parametrize("where", ["nowhere.pem", ""], ids=["no file", "a folder"])
def test_a_file_that_cannot_be_read_is_refused(option: str, where: str, tmp_path: Path) -> None:
    """In a URL as in a variable of its own."""
    path = tmp_path / where
    with pytest.raises(ConfigurationError, match=f"REDIS_URL=.*{option} names no readable file"):
        Settings(REDIS_URL=f"rediss://host?{option}={path}")
    with pytest.raises(ConfigurationError, match=r"REDIS_SSL_\w+=.*no readable file"):
        Settings(**{f"REDIS_{option.upper()}": str(path)})


def test_sentinels_and_a_url_contradict_each_other() -> None:
    """Two settings that say where Redis is are an error that names both and shows no password."""
    with pytest.raises(ConfigurationError, match="REDIS_SENTINELS says where Redis is") as raised:
        Settings(REDIS_SENTINELS="a:1", REDIS_SENTINEL_MASTER="m", REDIS_URL="redis://:hunter2@h")

    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cr3t",
        "redis://:s3cr3t/0",
        "redis://user:s3cr3t",
        "redis//:s3cr3t:x",
        "user:s3cr3t@host",
        "redis://:s3cr3t@host:99999",
        "redis://:s3@cr3t@host:port",
        "redis://host:1/0?p%61ssword=s3cr3t&x=1",
        "http://u:s3cr3t@host",
    ],
)
@pytest.mark.parametrize("name", ["REDIS_URL", "EMBEDDING_CACHE_REDIS_URL"])
def test_malformed_url_shows_no_password(name: str, url: str) -> None:
    """Wherever a password was put in a URL that cannot be read, the error does not repeat it."""
    with pytest.raises(ConfigurationError) as caught:
        Settings(**{name: url})

    assert "cr3t" not in str(caught.value)
