"""How the environment is read: what is unset, what others put there,
what was misspelt, and what is said of it all.
"""

import copy
import logging
import pickle
from pathlib import Path

import pytest
from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import SettingsConfigDict

from redis_asgi import ConfigurationError, RateLimitMiddleware, Settings
from redis_asgi.connection.client_factory import describe
from redis_asgi.connection.redis_argument import resolve_manager

from ..ratelimit.harness import Spy

SECRET = "s3cr3t-of-a-test"
DEFAULTS = Settings.model_construct()


class AppSettings(Settings):
    """As an app with variables of its own has them."""

    model_config = SettingsConfigDict(env_prefix="APP_")

    DATABASE_URL: str = "sqlite://"


def problems(**values: object) -> tuple[str, ...]:
    """What is wrong with settings."""
    with pytest.raises(ConfigurationError) as caught:
        Settings(**values)
    assert "\n".join(caught.value.problems) == str(caught.value)
    return caught.value.problems


@pytest.fixture
def env_file(tmp_path: Path) -> Path:
    """A file as many an app has it."""
    path = tmp_path / ".env"
    path.write_text("REDIS_PORT=6381\nRATE_LIMITS=5/minute\nDATABASE_URL=postgres://u:pw@db/app\nDEBUG=1\nREDIS_DB=\n")
    return path


# empty


@pytest.mark.parametrize("blank", ["", " ", "\t "], ids=["empty", "a blank", "blanks"])
@pytest.mark.parametrize("name", Settings.model_fields)
def test_an_empty_variable_is_unset(name: str, blank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docker compose (``${X:-}``) and Helm leave them, whatever the setting is."""
    monkeypatch.setenv(name, blank)
    settings = Settings()

    assert Settings.model_fields[name].default == getattr(settings, name)
    assert name not in settings.model_fields_set


def test_an_empty_variable_hides_no_file(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is unset in the environment is what the file says."""
    monkeypatch.setenv("REDIS_PORT", " ")

    assert Settings(_env_file=env_file).REDIS_PORT == 6381


def test_an_empty_argument_is_no_variable() -> None:
    """An argument is meant as it is: what cannot be empty says so."""
    assert Settings(REDIS_KEY_PREFIX="").REDIS_KEY_PREFIX == ""
    for name in ("REDIS_HOST", "REDIS_URL", "REDIS_SENTINEL_MASTER", "REDIS_KEY_SECRET", "RATE_LIMITS"):
        (problem,) = problems(**{name: ""})
        assert problem.startswith(f"{name}=")


def test_a_comma_is_a_list_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list whose default is not empty can be emptied."""
    monkeypatch.setenv("EMBEDDING_CACHE_IGNORED_FIELDS", ",")

    assert Settings().EMBEDDING_CACHE_IGNORED_FIELDS == ()


# Kubernetes


@pytest.mark.parametrize(
    ("link", "others", "where"),
    [
        pytest.param("tcp://10.0.0.1:6380", {}, "10.0.0.1:6380/0", id="alone"),
        pytest.param("tcp://[fd00::1]:6380", {}, "fd00::1:6380/0", id="IPv6"),
        pytest.param(" tcp://10.0.0.1:6380/ ", {"REDIS_DB": "2"}, "10.0.0.1:6380/2", id="blanks and a slash"),
        pytest.param("tcp://10.0.0.1:6380", {"REDIS_HOST": "redis"}, "redis:6380/0", id="with a host"),
        pytest.param("tcp://10.0.0.1:6380", {"REDIS_HOST": ""}, "10.0.0.1:6380/0", id="with an empty host"),
        pytest.param("tcp://10.0.0.1:6380", {"REDIS_URL": "redis://r:1"}, "'redis://r:1'", id="with a URL"),
        pytest.param("tcp://10.0.0.1:6380", {"REDIS_URL": "memory://"}, "'memory://'", id="with memory"),
        pytest.param("tcp://nonsense", {"REDIS_URL": "redis://r:1"}, "'redis://r:1'", id="nonsense with a URL"),
        pytest.param("udp://10.0.0.1:53", {}, "localhost:6379/0", id="UDP"),
        pytest.param("sctp://10.0.0.1:53", {"REDIS_HOST": "r"}, "r:6379/0", id="SCTP"),
    ],
)
def test_the_link_of_a_service_named_redis(
    link: str, others: dict[str, str], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``REDIS_PORT=tcp://host:port`` says where that Service is, unless a URL says where Redis is."""
    for name, value in {"REDIS_PORT": link, **others}.items():
        monkeypatch.setenv(name, value)

    assert where == describe(Settings())


def test_a_link_is_an_argument_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """An app may hand on what it finds."""
    settings = Settings(REDIS_PORT="tcp://10.0.0.1:6380")

    assert ("10.0.0.1", 6380) == (settings.REDIS_HOST, settings.REDIS_PORT)
    assert ["argument"] * 2 == [settings.origin_of("REDIS_HOST"), settings.origin_of("REDIS_PORT")]


def links(service: str) -> dict[str, str]:
    """What Kubernetes sets for a Service of that name, with a port that has a name."""
    name = service.upper().replace("-", "_")
    port = f"{name}_PORT_6379_TCP"
    return {
        f"{name}_SERVICE_HOST": "10.0.0.1",
        f"{name}_SERVICE_PORT": "6379",
        f"{name}_SERVICE_PORT_REDIS": "6379",
        f"{name}_PORT": "tcp://10.0.0.1:6379",
        port: "tcp://10.0.0.1:6379",
        f"{port}_PROTO": "tcp",
        f"{port}_PORT": "6379",
        f"{port}_ADDR": "10.0.0.1",
    }


# Services of every name that one of our variables could be made of.
SERVICES = sorted(
    {
        "-".join(parts[:length]).lower()
        for parts in (name.split("_") for name in Settings.model_fields)
        for length in range(1, len(parts) + 1)
    }
    | {"redis2", "rediss", "redis-1", "redis-master", "redis-replicas", "redis-cluster", "redis-sentinel"}
)


@pytest.mark.parametrize("service", SERVICES)
def test_no_service_breaks_or_is_taken_for_a_typo(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a Service is called, its variables are no settings but the one of ``redis``, and no
    misspelt ones.
    """
    for name, value in links(service).items():
        monkeypatch.setenv(name, value)
    settings = Settings()

    expected = {"REDIS_HOST", "REDIS_PORT"} if service == "redis" else set()
    assert expected == settings.model_fields_set
    assert {} == settings.near_misses


# files and subclasses


def test_a_file(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment wins over the file, and what is no setting in it is nobody's fault."""
    monkeypatch.setenv("RATE_LIMITS", "7/minute")
    settings = Settings(_env_file=env_file)

    assert (6381, "7/minute", 0) == (settings.REDIS_PORT, settings.RATE_LIMITS, settings.REDIS_DB)
    assert [".env", "environment", "default"] == [
        settings.origin_of(name) for name in ("REDIS_PORT", "RATE_LIMITS", "REDIS_DB")
    ]
    assert settings == Settings(REDIS_PORT=6381, RATE_LIMITS="7/minute")


def test_a_file_that_is_not_there_is_none(tmp_path: Path) -> None:
    """As pydantic-settings has it."""
    assert Settings(_env_file=tmp_path / "absent") == Settings()


def test_a_subclass_with_a_file(env_file: Path) -> None:
    """A class that names its file, with a field of its own."""

    class FileSettings(Settings):
        model_config = SettingsConfigDict(env_file=env_file)
        DATABASE_URL: str

    settings = FileSettings()  # type: ignore[call-arg]  # from the file

    assert (6381, "postgres://u:pw@db/app") == (settings.REDIS_PORT, settings.DATABASE_URL)


def test_a_subclass_with_aliases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields of an app may be called otherwise outside, required ones too;
    what is made of its settings keeps them.
    """

    class Aliased(Settings):
        database: str = Field(validation_alias="DATABASE_URL")
        queue: str = Field(validation_alias=AliasChoices("QUEUE_URL", "BROKER_URL"))
        debug: bool = Field(default=False, alias="DEBUG")

    with pytest.raises(ConfigurationError) as caught:
        Aliased(REDIS_PORT="x")  # type: ignore[arg-type,call-arg]  # the others are read
    assert ["REDIS_PORT='x'", "DATABASE_URL: ", "QUEUE_URL: fie"] == [each[:14] for each in caught.value.problems]
    monkeypatch.setenv("DATABASE_URL", "sqlite://")
    monkeypatch.setenv("BROKER_URL", "amqp://")
    settings = Aliased(DEBUG=True).but(REDIS_DB=2)  # type: ignore[call-arg]  # the same

    assert ("sqlite://", "amqp://", True, 2) == (settings.database, settings.queue, settings.debug, settings.REDIS_DB)


def test_a_prefix(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a prefix only what begins with it counts, in the environment and in the file."""
    env_file.write_text("APP_REDIS_PORT=6382\nREDIS_DB=3\nAPP_OTHER=x\n")
    monkeypatch.setenv("RATE_LIMITS", "5/minute")
    monkeypatch.setenv("APP_DATABASE_URL", "postgres://db")
    settings = AppSettings(_env_file=env_file)  # type: ignore[call-arg]  # one of pydantic-settings' own

    assert (6382, 0, None) == (settings.REDIS_PORT, settings.REDIS_DB, settings.RATE_LIMITS)
    assert "postgres://db" == settings.DATABASE_URL


def test_a_link_with_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Service may be called ``app-redis``."""
    for name, value in links("app-redis").items():
        monkeypatch.setenv(name, value)

    assert "10.0.0.1:6379/0" == describe(AppSettings())
    assert {} == AppSettings().near_misses


def test_errors_name_the_variable_that_was_read(env_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefix included, and the file where it came from one; an argument has no prefix."""
    env_file.write_text(f"APP_REDIS_PORT=x\nAPP_REDIS_PASSWORD={SECRET}\n")
    monkeypatch.setenv("APP_REDIS_HOST", f"redis://:{SECRET}@host")
    with pytest.raises(ConfigurationError) as caught:
        AppSettings(_env_file=env_file, REDIS_DB="y")  # type: ignore[call-arg,arg-type]  # that is the point
    host, port, db = caught.value.problems

    assert host.startswith(
        "APP_REDIS_HOST='redis://***@host': not a host name or address; a URL belongs into APP_REDIS_URL"
    )
    assert port.startswith("APP_REDIS_PORT='x' (.env): ")
    assert db.startswith("REDIS_DB='y': ")
    assert SECRET not in str(caught.value)


def test_contradictions_name_the_variables_that_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two variables say against each other, in their own names."""
    monkeypatch.setenv("APP_REDIS_SENTINELS", "a:1")
    with pytest.raises(ConfigurationError) as caught:
        AppSettings()

    assert "APP_REDIS_SENTINELS needs APP_REDIS_SENTINEL_MASTER. Try APP_REDIS_SENTINEL_MASTER=mymaster." == str(
        caught.value
    )


def test_a_case_insensitive_subclass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subclass may read names in any case,
    as pydantic-settings does by itself; they are no typos then.
    """

    class AnyCase(Settings):
        model_config = SettingsConfigDict(case_sensitive=False)

    monkeypatch.setenv("redis_port", "6390")
    settings = AnyCase()

    assert (6390, {}) == (settings.REDIS_PORT, settings.near_misses)


def test_secrets_from_files(tmp_path: Path) -> None:
    """A directory of secrets, as Docker mounts it."""
    (tmp_path / "REDIS_PASSWORD").write_text(SECRET + "\n")
    (tmp_path / "REDIS_URL").write_text("\n")
    settings = Settings(_secrets_dir=tmp_path)

    assert (SecretStr(SECRET), None) == (settings.REDIS_PASSWORD, settings.REDIS_URL)
    assert "secrets directory" == settings.origin_of("REDIS_PASSWORD")


# all at once


def test_all_bad_settings_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line each: unknown arguments, bad values,
    contradictions of the others, and what looks like ours.
    """
    for name, value in {
        "REDIS_DB": "y",
        "REDIS_TIMEOUT": "10s",
        "REDIS_SENTINELS": "a:1",
        "REDIS_CLUSTER": "true",
        "RATE_LIMTS": "5/minute",
    }.items():
        monkeypatch.setenv(name, value)
    expected = [
        "redis_host is not a setting. Did you mean REDIS_HOST?",
        "REDIS_PORT='x': ",
        "REDIS_DB='y': ",
        "REDIS_TIMEOUT='10s': ",
        "REDIS_SENTINELS needs REDIS_SENTINEL_MASTER",
        "REDIS_SENTINELS and REDIS_CLUSTER exclude each other",
        "RATE_LIMTS is not a setting. Did you mean RATE_LIMITS?",
    ]
    told = problems(REDIS_PORT="x", redis_host="h")

    assert expected == [line[: len(start)] for line, start in zip(told, expected, strict=True)]


def test_what_cannot_work_contradicts_nothing() -> None:
    """A contradiction that a bad value would have settled is not told beside it."""
    (problem,) = problems(REDIS_SENTINELS="a:1", REDIS_SENTINEL_MASTER="")

    assert problem.startswith("REDIS_SENTINEL_MASTER='': ")


# what looks like ours


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("REDIS_ULR", "REDIS_URL"),
        ("RATE_LIMTS", "RATE_LIMITS"),
        ("RATE_LIMIT", "RATE_LIMITS"),
        ("EMBEDING_CACHE_TTL", "EMBEDDING_CACHE_TTL"),
        ("REDIS_PASSWROD", "REDIS_PASSWORD"),
        ("redis_port", "REDIS_PORT"),
        ("Rate_Limit_Timeout", "RATE_LIMIT_TIMEOUT"),
        ("rate_limts", "RATE_LIMITS"),
        ("RATE_LIMIT_STRATGY", "RATE_LIMIT_STRATEGY"),
        ("MAX_REQUEST_PER_WINDOW", "MAX_REQUESTS_PER_WINDOW"),
        ("RATELIMITS", "RATE_LIMITS"),
        ("RATE_LIMIT_DRYRUN", "RATE_LIMIT_DRY_RUN"),
        ("RATE_LIMIT_TRUSTED_PROXY", "RATE_LIMIT_TRUSTED_PROXIES"),
        ("EMBEDDING_CACHE_TLL", "EMBEDDING_CACHE_TTL"),
        ("EMBEDDING_CACHE_NAME_SPACE", "EMBEDDING_CACHE_NAMESPACE"),
    ],
)
def test_a_near_miss_is_named(variable: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Misspelt or in another case, with the setting that was meant."""
    monkeypatch.setenv(variable, "1")

    assert {variable: meant} == Settings().near_misses


@pytest.mark.parametrize(
    "variable",
    [
        "REDIS_SERVER",
        "REDIS_MAX_CONNECTIONS",
        "REDIS_SENTINEL_PORT",
        "REDIS_ASGI_TEST_URL",
        "REDISMOD",
        "RATE_LIMIT_ENABLED",
        "RATE_LIMIT_STORAGE_URI",
        "EMBEDDING_CACHE",
        "EMBEDDING_CACHE_DIR",
        "EMBEDDING_CACHE_NAME",
        "EMBEDDING_CACHE_TTL_SECONDS",
        "EMBEDDING_CACHE_URL",
        "RATE_LIMIT_WINDOW_MS",
        "REDIS_CLUSTER_MODE",
        "REDIS_POOL_MAX_SIZE",
        "REDIS_SENTINEL_NAME",
        "REDIS_TIMEOUT_MS",
        "REDIS_URL_2",
        "MAX_REQUESTS_PER_CHILD",
        "MAX_WORKERS",
        "HOSTNAME",
        "PORT",
    ],
)
def test_other_programs_variables_are_no_near_misses(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that differs by a word is somebody else's."""
    monkeypatch.setenv(variable, "1")

    assert {} == Settings().near_misses


def test_an_empty_near_miss_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable is unset, so it is no typo either."""
    monkeypatch.setenv("RATE_LIMTS", "")

    assert {} == Settings().near_misses


def test_another_programs_redis_variables_are_not_named_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """``REDIS_URI`` beside ``REDIS_URL`` is another program's;
    another case of a name is told all the same.
    """
    for name in ("REDIS_URI", "REDISHOST", "REDISPORT", "REDIS_TLS", "redis_url"):
        monkeypatch.setenv(name, "x")
    alone = Settings().near_misses
    monkeypatch.setenv("REDIS_URL", "redis://h")

    assert {"REDIS_URI": "REDIS_URL", "REDISHOST": "REDIS_HOST"}.items() <= alone.items()
    assert {"redis_url": "REDIS_URL"} == Settings().near_misses


def test_a_near_miss_in_a_file_and_with_a_prefix(env_file: Path) -> None:
    """The same for files, and for names with a prefix."""
    env_file.write_text("APP_RATE_LIMTS=1\nRATE_LIMTS=1\n")

    assert {"RATE_LIMTS": "RATE_LIMITS"} == Settings(_env_file=env_file).near_misses
    settings = AppSettings(_env_file=env_file)  # type: ignore[call-arg]  # one of pydantic-settings' own
    assert {"APP_RATE_LIMTS": "APP_RATE_LIMITS"} == settings.near_misses


def test_near_misses_are_warned_of_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """When the first part of an app is built, and not when settings are; no value is in it."""
    monkeypatch.setenv("RATE_LIMIT_TIMEOUTT", SECRET)
    caplog.set_level(logging.WARNING)
    settings = Settings(REDIS_URL="memory://")
    before = len(caplog.records)
    for _ in range(2):
        RateLimitMiddleware(Spy(), settings=settings)
    (record,) = caplog.records

    assert 0 == before
    assert ("misspelt_setting", "RATE_LIMIT_TIMEOUTT") == (record.__dict__["code"], record.__dict__["variable"])
    assert "If RATE_LIMIT_TIMEOUT is meant, rename it" in record.getMessage()
    assert SECRET not in str(record.__dict__) + record.getMessage()


# settings made of settings


def test_changed_settings_read_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of an app's settings is of its class,
    and takes up no variable that it had not read.
    """
    monkeypatch.setenv("APP_REDIS_DB", "1")
    settings = AppSettings()
    monkeypatch.setenv("APP_REDIS_DB", "2")
    monkeypatch.setenv("REDIS_KEY_PREFIX", "other:")
    manager, _ = resolve_manager("redis://h", settings)
    changed = manager.settings

    assert isinstance(changed, AppSettings)
    assert (1, "") == (changed.REDIS_DB, changed.REDIS_KEY_PREFIX)
    assert ["argument", "environment", "default"] == [
        changed.origin_of(name) for name in ("REDIS_URL", "REDIS_DB", "REDIS_KEY_PREFIX")
    ]
    assert AppSettings().REDIS_DB == 2
    with pytest.raises(ConfigurationError, match="REDIS_PORT='x'"):
        settings.but(REDIS_PORT="x")


def test_origins_make_no_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal values are equal settings, wherever they came from; copies are too, and still answer."""
    monkeypatch.setenv("REDIS_PORT", "6380")
    settings = Settings()
    copies = [
        Settings(REDIS_PORT=6380),
        copy.deepcopy(settings),
        settings.model_copy(),
        pickle.loads(pickle.dumps(settings)),  # noqa: S301 - our own
    ]

    for each in copies:
        assert settings == each
        assert hash(settings) == hash(each)
        assert each.origin_of("REDIS_PORT") in ("argument", "environment")
        assert 6381 == each.but(REDIS_PORT=6381).REDIS_PORT


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, False),
        ({"REDIS_URL": "redis://h"}, True),
        ({"REDIS_URL": " "}, False),
        ({"REDIS_PORT": "tcp://10.0.0.1:6379"}, True),
        ({"REDIS_PORT": "udp://10.0.0.1:53"}, False),
        ({"REDIS_KEY_PREFIX": "a:", "REDIS_POOL_SIZE": "3"}, False),
        ({"REDIS_SERVICE_HOST": "10.0.0.1"}, False),
    ],
)
def test_whether_redis_is_named(env: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example asks before it chooses ``memory://``."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)

    assert expected == Settings().names_redis
