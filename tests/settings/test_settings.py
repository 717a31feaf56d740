"""Settings: what is read from the environment, and how values stand to one another."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from redis_asgi import Settings
from redis_asgi.settings.locations import read_address

from .values import FILES, SECRET


@pytest.fixture
def pem(tmp_path: Path) -> str:
    """A readable file."""
    path = tmp_path / "some.pem"
    path.write_text("PEM")
    return str(path)


ACCEPTED: list[tuple[str, str, object]] = [
    ("REDIS_HOST", "redis.test", "redis.test"),
    ("REDIS_HOST", "fd00::1", "fd00::1"),
    ("REDIS_PORT", "6380", 6380),
    ("REDIS_DB", "3", 3),
    ("REDIS_USERNAME", "app", "app"),
    ("REDIS_PASSWORD", SECRET, SecretStr(SECRET)),
    ("REDIS_URL", "redis://redis.test:6380/2", SecretStr("redis://redis.test:6380/2")),
    ("REDIS_POOL_SIZE", "7", 7),
    ("REDIS_TIMEOUT", "2.5", 2.5),
    ("REDIS_RETRY_ATTEMPTS", "0", 0),
    ("REDIS_SSL", "true", True),
    ("REDIS_SENTINEL_MASTER", "mymaster", "mymaster"),
    ("REDIS_SENTINEL_USERNAME", "app", "app"),
    ("REDIS_SENTINEL_PASSWORD", SECRET, SecretStr(SECRET)),
    ("REDIS_CLUSTER", "1", True),
    ("REDIS_BATCH", "key", "key"),
    ("REDIS_KEY_PREFIX", "my app:".replace(" ", "-"), "my-app:"),
    ("REDIS_KEY_SECRET", SECRET, SecretStr(SECRET)),
    ("RATE_LIMIT_WINDOW", "10", 10),
    ("MAX_REQUESTS_PER_WINDOW", "5", 5),
    ("RATE_LIMITS", "20/second; 1000/hour", "20/second; 1000/hour"),
    ("RATE_LIMIT_STRATEGY", "gcra", "gcra"),
    ("RATE_LIMIT_PARTITION", "header:x-api-key", "header:x-api-key"),
    ("RATE_LIMIT_MISSING_IDENTITY", "refuse", "refuse"),
    ("RATE_LIMIT_TRUSTED_PROXIES", "10.0.0.0/8, 192.0.2.7,::1", ("10.0.0.0/8", "192.0.2.7", "::1")),
    ("RATE_LIMIT_TRUSTED_PROXIES", "unix, UNIX,10.0.0.1", ("unix", "unix", "10.0.0.1")),
    ("RATE_LIMIT_TRUSTED_PROXIES", "::ffff:10.0.0.0/104, ::FFFF:192.0.2.7", ("10.0.0.0/8", "192.0.2.7/32")),
    ("RATE_LIMIT_TRUSTED_PROXIES", "::/0, ::ffff:0:0/96", ("::/0", "0.0.0.0/0")),
    ("RATE_LIMIT_FORWARDED_HEADER", "forwarded", "forwarded"),
    ("RATE_LIMIT_FORWARDED_HEADER", "CF-Connecting-IP", "cf-connecting-ip"),
    ("RATE_LIMIT_IPV6_PREFIX", "56", 56),
    ("RATE_LIMIT_EXEMPT_PATHS", " /health/* ,/metrics/*,", ("/health/*", "/metrics/*")),
    ("RATE_LIMIT_ON_REDIS_ERROR", "closed", "closed"),
    ("RATE_LIMIT_FALLBACK_DIVISOR", "4", 4),
    ("RATE_LIMIT_LOCAL_MAX_PARTITIONS", "10", 10),
    ("RATE_LIMIT_TIMEOUT", "0.5", 0.5),
    ("RATE_LIMIT_BODY_CAP", "0", 0),
    ("RATE_LIMIT_HEADERS", "both", "both"),
    ("RATE_LIMIT_DRY_RUN", "yes", True),
    ("EMBEDDING_CACHE_TTL", "86400", 86400),
    ("EMBEDDING_CACHE_TTL_JITTER", "0", 0.0),
    ("EMBEDDING_CACHE_NAMESPACE", "bge-m3@5617a9f", "bge-m3@5617a9f"),
    ("EMBEDDING_CACHE_ROUTES", "openai, tei:/my/path", ("openai", "tei:/my/path")),
    ("EMBEDDING_CACHE_SHARE", "true", True),
    ("EMBEDDING_CACHE_LEASE", "off", "off"),
    ("EMBEDDING_CACHE_CREDENTIAL_HEADERS", "Authorization, X-Key", ("authorization", "x-key")),
    ("EMBEDDING_CACHE_KEYED_HEADERS", "User-Agent, X-Acme-*", ("user-agent", "x-acme-*")),
    ("EMBEDDING_CACHE_IGNORED_HEADERS", "X-Pod", ("x-pod",)),
    ("EMBEDDING_CACHE_IGNORED_FIELDS", "rid,metadata.trace_id", ("rid", "metadata.trace_id")),
    ("EMBEDDING_CACHE_REQUEST_LISTS", "tags, metadata.tags", ("tags", "metadata.tags")),
    ("EMBEDDING_CACHE_BODY_SECONDS", "5", 5.0),
    ("EMBEDDING_CACHE_USAGE", "billed", "billed"),
    ("EMBEDDING_CACHE_DTYPE", "float16", "float16"),
    ("EMBEDDING_CACHE_L1_BYTES", "0", 0),
    ("EMBEDDING_CACHE_L1_SECONDS", "1.5", 1.5),
    ("EMBEDDING_CACHE_MAX_REQUEST_BYTES", "1024", 1024),
    ("EMBEDDING_CACHE_MAX_RESPONSE_BYTES", "2048", 2048),
    ("EMBEDDING_CACHE_MAX_INPUTS", "96", 96),
    ("EMBEDDING_CACHE_TIMEOUT", "0.1", 0.1),
    ("EMBEDDING_CACHE_STATUS", "false", False),
    ("EMBEDDING_CACHE_REDIS_URL", "redis://vectors:6379/1", SecretStr("redis://vectors:6379/1")),
]


NEED_COMPANY = ("REDIS_SENTINELS", "REDIS_CLUSTER_NODES")


@pytest.mark.parametrize(("name", "text", "expected"), ACCEPTED, ids=[name for name, _, _ in ACCEPTED])
def test_variable_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, expected: object
) -> None:
    """Every variable parses from text to the value it means."""
    monkeypatch.setenv(name, text)

    assert expected == getattr(Settings(), name)


@pytest.mark.parametrize("name", FILES)
def test_certificate_file_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, name: str, pem: str) -> None:
    """A certificate's path is kept when the file can be read."""
    monkeypatch.setenv(name, pem)

    assert pem == getattr(Settings(), name)


def test_sentinels_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentinels come as host:port, IPv6 addresses too."""
    monkeypatch.setenv("REDIS_SENTINELS", "a:26379, b:26380,[::1]:26379")
    monkeypatch.setenv("REDIS_SENTINEL_MASTER", "mymaster")

    assert ("a:26379", "b:26380", "[::1]:26379") == Settings().REDIS_SENTINELS


def test_cluster_nodes_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes come as sentinels do."""
    monkeypatch.setenv("REDIS_CLUSTER_NODES", "a:6379, [::1]:6379")
    monkeypatch.setenv("REDIS_CLUSTER", "true")

    assert ("a:6379", "[::1]:6379") == Settings().REDIS_CLUSTER_NODES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:26379", ("a", 26379)),
        ("192.0.2.1:1", ("192.0.2.1", 1)),
        ("[::1]:26379", ("::1", 26379)),
        ("[2001:db8::1]:65535", ("2001:db8::1", 65535)),
    ],
)
def test_address(text: str, expected: tuple[str, int]) -> None:
    """A name or an address, and a port; brackets are around an IPv6 address and no part of it."""
    assert expected == read_address(text)


def test_every_setting_is_tested_here() -> None:
    """A new setting needs a row above."""
    assert set(Settings.model_fields) == {name for name, _, _ in ACCEPTED} | {*FILES, *NEED_COMPANY}


def test_settings_are_frozen() -> None:
    """A setting cannot change under the parts that read it, and what it was to be is not shown."""
    settings = Settings()
    with pytest.raises(ValidationError, match=r"REDIS_URL\n +Instance is frozen") as caught:
        settings.REDIS_URL = f"redis://:{SECRET}@h"  # type: ignore[assignment]  # as somebody may write it

    assert SECRET not in str(caught.value)


def test_equal_settings_are_one_dictionary_key() -> None:
    """Settings compare and hash by value, secrets included."""
    one, same = Settings(REDIS_PASSWORD="a"), Settings(REDIS_PASSWORD="a")

    assert one == same
    assert hash(one) == hash(same)
    assert one != Settings(REDIS_PASSWORD="b")


def test_keyword_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument is closer than a variable."""
    monkeypatch.setenv("REDIS_PORT", "1111")

    assert Settings(REDIS_PORT=2222).REDIS_PORT == 2222


def test_environment_is_read_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later change of a variable does not reach settings that exist."""
    monkeypatch.setenv("REDIS_PORT", "1111")
    settings = Settings()
    monkeypatch.setenv("REDIS_PORT", "2222")

    assert settings.REDIS_PORT == 1111
    assert Settings().REDIS_PORT == 2222


def test_foreign_variables_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of others, even ours misspelt or in lower case, neither fail nor count."""
    monkeypatch.setenv("REDIS_SENTINEL_KIND", "x")
    monkeypatch.setenv("redis_port", "1111")

    assert Settings().REDIS_PORT == 6379


@pytest.mark.parametrize(
    "given",
    [
        pytest.param("10.0.0.1,10.0.0.2", id="text"),
        pytest.param(["10.0.0.1", "10.0.0.2"], id="list"),
        pytest.param(("10.0.0.1", "10.0.0.2"), id="tuple"),
    ],
)
def test_lists_are_copied_to_tuples(given: Any) -> None:
    """A list may be written as in the environment or as a sequence; it is kept immutable."""
    assert ("10.0.0.1", "10.0.0.2") == Settings(RATE_LIMIT_TRUSTED_PROXIES=given).RATE_LIMIT_TRUSTED_PROXIES


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_empty_list_is_empty(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A list variable without an entry is no entry, not an empty one."""
    monkeypatch.setenv("RATE_LIMIT_EXEMPT_PATHS", text)

    assert Settings().RATE_LIMIT_EXEMPT_PATHS == ()


def test_defaults_are_those_of_the_readme() -> None:
    """Without any variable: local Redis, 100 requests a minute, nothing trusted."""
    settings = Settings()

    assert (settings.REDIS_HOST, settings.REDIS_PORT, settings.REDIS_DB) == ("localhost", 6379, 0)
    assert settings.default_limits == "100/60 seconds"
    assert settings.RATE_LIMIT_TRUSTED_PROXIES == ()
    assert not settings.is_memory
    assert settings.key_secret is None


def test_limits_win_over_the_single_limit() -> None:
    """``RATE_LIMITS`` replaces window and quota."""
    assert Settings(RATE_LIMITS="5/second", MAX_REQUESTS_PER_WINDOW=9).default_limits == "5/second"
    assert Settings(MAX_REQUESTS_PER_WINDOW=9, RATE_LIMIT_WINDOW=30).default_limits == "9/30 seconds"


def test_memory_and_key_secret_are_known_by_name() -> None:
    """``memory://`` is recognised, and the key secret is given in the clear to who asks."""
    assert Settings(REDIS_URL="memory://").is_memory
    assert Settings(REDIS_KEY_SECRET=SECRET).key_secret == SECRET


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("valkey://host:1/2", "redis://host:1/2"),
        ("valkeys://:pw@host", "rediss://:pw@host"),
        ("VALKEYS://host", "rediss://host"),
        ("REDISS://host", "rediss://host"),
        ("Memory://", "memory://"),
    ],
)
@pytest.mark.parametrize("name", ["REDIS_URL", "EMBEDDING_CACHE_REDIS_URL"])
def test_schemes_have_one_spelling_inside(name: str, url: str, meant: str) -> None:
    """Valkey's schemes are Redis's, and upper case is no other scheme: TLS is TLS for all who look."""
    found = getattr(Settings(**{name: url}), name)

    assert meant == found.get_secret_value()
