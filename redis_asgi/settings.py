"""Environment variables in, one validated and frozen `Settings` out: the only reader of the environment."""

import difflib
import ipaddress
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from redis.asyncio.connection import parse_url

from .errors import ConfigurationError
from .networks import read_network
from .notation import MAX_QUOTA, MAX_WINDOW, Limit, read_limits
from .paths import pattern_problem

StrategyName = Literal["fixed-window", "sliding-window-counter", "moving-window", "gcra"]
OnRedisError = Literal["local", "open", "closed"]
HeaderStyle = Literal["ietf", "legacy", "both", "none"]
MissingIdentity = Literal["ip", "skip", "shared", "refuse"]
CacheUsage = Literal["original", "billed"]
CacheDType = Literal["float32", "float16"]

# What a URL may begin with, and what is understood by that.
_URL_SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "unix": "unix",
    "memory": "memory",
    "valkey": "redis",
    "valkeys": "rediss",
}
# Other programs with the same URL may want these; here they would undo what `connection` relies on.
URL_OPTIONS_NOT_TAKEN = frozenset(
    [
        "client_name",
        "decode_responses",
        "encoding",
        "encoding_errors",
        "lib_name",
        "lib_version",
        "protocol",
        "retry_on_error",
        "retry_on_timeout",
        "timeout",
    ]
)
_URL_OPTIONS = URL_OPTIONS_NOT_TAKEN | frozenset(
    [
        "db",
        "username",
        "password",
        "max_connections",
        "health_check_interval",
        "socket_timeout",
        "socket_connect_timeout",
        "socket_keepalive",
        "ssl_ca_certs",
        "ssl_ca_path",
        "ssl_certfile",
        "ssl_keyfile",
        "ssl_cert_reqs",
        "ssl_check_hostname",
    ]
)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# Up to the last @, scheme or not: a password may hold anything, and a host may have been given a whole URL.
_BEFORE_HOST = re.compile(r"^([a-z][a-z0-9+.-]*://)?.*@", re.IGNORECASE | re.DOTALL)
_PASSWORD_IN_QUERY = re.compile(r"((?:password|username)=)[^&]*", re.IGNORECASE)


def redact(value: object) -> str:
    """The repr of *value* for an error message: no user, no password, at most 80 characters."""
    text = _PASSWORD_IN_QUERY.sub(r"\1***", _BEFORE_HOST.sub(r"\1***@", str(value)))
    text = text if len(text) <= 80 else text[:77] + "..."
    return repr(text) if isinstance(value, str) else text


def split_list(value: object) -> object:
    """``"a, b"`` as it stands in an environment variable to ``("a", "b")``; other sequences as they are."""
    if isinstance(value, str):
        return tuple(part for part in (raw.strip() for raw in value.split(",")) if part)
    return tuple(value) if isinstance(value, list | set | frozenset) else value


def _host(value: str) -> str:
    if not value or re.search(r"[\s/@]", value):
        raise ValueError("not a host name or address; a URL belongs into REDIS_URL")
    return value


def _url(value: SecretStr) -> SecretStr:
    url = value.get_secret_value()
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("the port is not a number between 1 and 65535") from None
    if parts.scheme not in _URL_SCHEMES:
        raise ValueError("not a redis://, rediss://, valkey://, valkeys://, unix:// or memory:// URL")
    if port == 0:
        raise ValueError("the port is not a number between 1 and 65535")
    if parts.scheme == "unix" and not parts.path:
        raise ValueError("a unix:// URL needs the path of a socket")
    scheme = _URL_SCHEMES[parts.scheme]
    if scheme in ("redis", "rediss") and not re.fullmatch(r"/?\d*", parts.path):
        raise ValueError("the path of the URL is not a database number")
    unknown = sorted(set(parse_qs(parts.query, keep_blank_values=True)) - _URL_OPTIONS)
    if "@" in parts.fragment or (unknown and "@" in parts.query):
        raise ValueError("in a user name or password /, ? and # are written %2F, %3F and %23")
    if unknown:
        raise ValueError(f"{unknown[0][:40]!r} is no option of a Redis URL")
    # One spelling of each for all who read it.
    url = scheme + url.strip()[len(parts.scheme) :]
    if scheme != "memory":
        options = parse_url(url)  # a ValueError names the option whose value has a wrong type
        if options.get("ssl_cert_reqs", "required") not in ("none", "optional", "required"):
            raise ValueError("ssl_cert_reqs is not none, optional or required")
    return SecretStr(url)


def weakened_by(url: str) -> str | None:
    """The option of a ``rediss://`` URL that gives up verifying who answers; ``None`` when it is verified."""
    options = parse_url(url) if url.startswith("rediss:") else {}
    if options.get("ssl_cert_reqs") == "none":
        return "ssl_cert_reqs=none"
    return None if options.get("ssl_check_hostname", True) else "ssl_check_hostname=false"


def read_address(text: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or, for an IPv6 address, ``[host]:port``.

    Raises:
        ValueError: If it is neither.
    """
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
        ipaddress.IPv6Address(host)
    if (
        not host
        or re.search(r"[\s/@\[\]]", host)
        or not re.fullmatch(r"[0-9]{1,5}", port)
        or not 1 <= int(port) <= 65535
    ):
        raise ValueError("not host:port")
    if ":" in host and not bracketed:
        raise ValueError("an IPv6 address without brackets")
    return host, int(port)


def _addresses(value: tuple[str, ...]) -> tuple[str, ...]:
    for address in value:
        try:
            read_address(address)
        except ValueError:
            raise ValueError("not a list of host:port, or [host]:port for an IPv6 address") from None
    return value


def _key_prefix(value: str) -> str:
    if re.search(r"[{}\s\x00-\x1f\x7f]", value) or not value.isprintable():
        raise ValueError("braces, blanks and control characters are refused")
    return value


def _limits(value: str) -> str:
    read_limits(value)
    return value


def _partition(value: str) -> str:
    kind, _, name = value.partition(":")
    if value in ("ip", "user") or (kind == "header" and _TOKEN.fullmatch(name)):
        return value
    raise ValueError("not ip, user or header:NAME")


def _networks(value: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(read_network, value))


def _header_name(value: str) -> str:
    if not _TOKEN.fullmatch(value):
        raise ValueError("not a header name")
    return value.lower()


def _paths(value: tuple[str, ...]) -> tuple[str, ...]:
    for path in value:
        problem = pattern_problem(path)
        if problem:
            raise ValueError(f"{path!r} {problem}")
    return value


def _readable(value: str) -> str:
    if not os.access(value, os.R_OK):
        raise ValueError("no readable file")
    return value


_File = Annotated[str, AfterValidator(_readable)]


def _header_names(value: tuple[str, ...]) -> tuple[str, ...]:
    for name in value:
        if not _TOKEN.fullmatch(name) or "*" in name[:-1] or name == "*":
            raise ValueError(f"{redact(name)} is not a header name, nor the beginning of some and a *")
    return tuple(name.lower() for name in value)


def _overlap(name: str, other: str) -> bool:
    """Whether two header names, each perhaps the beginning of some and a ``*``, can stand for the same one."""
    if name.endswith("*") and other.endswith("*"):
        return name[:-1].startswith(other[:-1]) or other[:-1].startswith(name[:-1])
    if name.endswith("*"):
        return other.startswith(name[:-1])
    return name.startswith(other[:-1]) if other.endswith("*") else name == other


def _field_names(value: tuple[str, ...]) -> tuple[str, ...]:
    for name in value:
        if not all(name.split(".")):
            raise ValueError(f"{name!r} is not a body field, dotted where it is inside of another")
    return value


def _routes(value: tuple[str, ...]) -> tuple[str, ...]:
    for route in value:
        name, colon, path = route.partition(":")
        if not re.fullmatch(r"[a-z0-9_]+", name) or (colon and not path.startswith("/")):
            raise ValueError("not a list of NAME or NAME:/path")
    return value


# Who asks, wherever clients, gateways and meshes put that.
_CREDENTIAL_HEADERS = """
authorization proxy-authorization api-key apikey x-api-key x-goog-api-key x-litellm-api-key ocp-apim-subscription-key
x-auth-token x-amz-security-token x-forwarded-authorization x-forwarded-access-token x-forwarded-user x-forwarded-email
cf-access-jwt-assertion x-goog-iap-jwt-assertion cookie x-forwarded-client-cert client-cert client-cert-chain
x-forwarded-tls-client-cert x-forwarded-tls-client-cert-info x-client-cert x-ssl-client-cert ssl-client-cert
x-ssl-client-verify x-ssl-client-s-dn x-arr-clientcert x-amzn-mtls-clientcert* x-amzn-oidc-* x-ms-client-principal*
x-ms-token-* x-goog-authenticated-user-* x-serverless-authorization cf-access-client-id cf-access-client-secret
cf-access-authenticated-user-email x-auth-request-* x-forwarded-groups x-forwarded-preferred-username x-access-token
x-consumer-* x-credential-identifier l5d-client-id x-portkey-api-key helicone-auth remote-user x-remote-user
x-authenticated-user* x-session-token x-csrf-token
"""


class Settings(BaseSettings):
    """Everything the package can be told from outside; each field is an environment variable of that name.

    ``Settings()`` reads the environment once; keyword arguments win over it. Instances are frozen and
    hashable. No secret is shown by ``repr`` or in an error.

    Raises:
        ConfigurationError: Names the variable, its (redacted) value and a value that works.
    """

    model_config = SettingsConfigDict(frozen=True, case_sensitive=True, extra="forbid", hide_input_in_errors=True)

    REDIS_HOST: Annotated[str, AfterValidator(_host)] = Field("localhost", examples=["localhost"])
    REDIS_PORT: int = Field(6379, ge=1, le=65535, examples=[6379])
    REDIS_DB: int = Field(0, ge=0, examples=[0])
    REDIS_USERNAME: str | None = Field(None, examples=["app"])
    REDIS_PASSWORD: SecretStr | None = Field(None, examples=["(the password)"])
    REDIS_URL: Annotated[SecretStr, AfterValidator(_url)] | None = Field(None, examples=["redis://localhost:6379/0"])
    REDIS_POOL_SIZE: int = Field(20, ge=1, le=10_000, examples=[20])
    REDIS_TIMEOUT: float = Field(10.0, gt=0, le=3600, allow_inf_nan=False, examples=[10])
    REDIS_RETRY_ATTEMPTS: int = Field(3, ge=0, le=100, examples=[3])
    REDIS_SSL: bool = Field(False, examples=["true"])
    REDIS_SSL_CA_CERTS: _File | None = Field(None, examples=["/etc/ssl/certs/ca-certificates.crt"])
    REDIS_SSL_CERTFILE: _File | None = Field(None, examples=["/etc/redis/client.crt"])
    REDIS_SSL_KEYFILE: _File | None = Field(None, examples=["/etc/redis/client.key"])
    REDIS_SENTINELS: Annotated[tuple[str, ...], NoDecode, AfterValidator(_addresses)] = Field(
        (), examples=["sentinel-1:26379,sentinel-2:26379"]
    )
    REDIS_SENTINEL_MASTER: str | None = Field(None, min_length=1, examples=["mymaster"])
    REDIS_SENTINEL_USERNAME: str | None = Field(None, examples=["app"])
    REDIS_SENTINEL_PASSWORD: SecretStr | None = Field(None, examples=["(the password)"])
    REDIS_CLUSTER: bool = Field(False, examples=["true"])
    REDIS_CLUSTER_NODES: Annotated[tuple[str, ...], NoDecode, AfterValidator(_addresses)] = Field(
        (), examples=["node-1:6379,node-2:6379"]
    )
    REDIS_BATCH: Literal["auto", "key"] = Field("auto", examples=["key"])
    REDIS_KEY_PREFIX: Annotated[str, AfterValidator(_key_prefix)] = Field("", max_length=200, examples=["myapp:"])
    REDIS_KEY_SECRET: SecretStr | None = Field(None, min_length=1, examples=["(a random string)"])

    RATE_LIMIT_WINDOW: int = Field(60, ge=1, le=MAX_WINDOW, examples=[60])
    MAX_REQUESTS_PER_WINDOW: int = Field(100, ge=1, le=MAX_QUOTA, examples=[100])
    RATE_LIMITS: Annotated[str, AfterValidator(_limits)] | None = Field(None, examples=["20/second; 1000/hour"])
    RATE_LIMIT_STRATEGY: StrategyName = Field("fixed-window", examples=["fixed-window"])
    RATE_LIMIT_PARTITION: Annotated[str, AfterValidator(_partition)] = Field("ip", examples=["header:x-api-key"])
    RATE_LIMIT_MISSING_IDENTITY: MissingIdentity = Field("ip", examples=["ip"])
    RATE_LIMIT_TRUSTED_PROXIES: Annotated[tuple[str, ...], NoDecode, AfterValidator(_networks)] = Field(
        (), examples=["10.0.0.0/8,192.0.2.7"]
    )
    RATE_LIMIT_FORWARDED_HEADER: Annotated[str, AfterValidator(_header_name)] = Field(
        "x-forwarded-for", examples=["x-forwarded-for"]
    )
    RATE_LIMIT_IPV6_PREFIX: int = Field(64, ge=1, le=128, examples=[64])
    RATE_LIMIT_EXEMPT_PATHS: Annotated[tuple[str, ...], NoDecode, AfterValidator(_paths)] = Field(
        (), examples=["/health/*,/metrics/*"]
    )
    RATE_LIMIT_ON_REDIS_ERROR: OnRedisError = Field("local", examples=["local"])
    RATE_LIMIT_FALLBACK_DIVISOR: int = Field(1, ge=1, le=100_000, examples=[4])
    RATE_LIMIT_LOCAL_MAX_PARTITIONS: int = Field(100_000, ge=1, le=100_000_000, examples=[100_000])
    RATE_LIMIT_TIMEOUT: float = Field(0.25, gt=0, le=60, allow_inf_nan=False, examples=[0.25])
    RATE_LIMIT_BODY_CAP: int = Field(1024 * 1024, ge=0, examples=[1048576])
    RATE_LIMIT_HEADERS: HeaderStyle = Field("ietf", examples=["ietf"])
    RATE_LIMIT_DRY_RUN: bool = Field(False, examples=["true"])

    EMBEDDING_CACHE_TTL: int = Field(3600, ge=1, le=MAX_WINDOW, examples=[3600])
    EMBEDDING_CACHE_TTL_JITTER: float = Field(0.1, ge=0, le=0.9, allow_inf_nan=False, examples=[0.1])
    EMBEDDING_CACHE_NAMESPACE: str = Field("", max_length=200, examples=["bge-m3@5617a9f"])
    EMBEDDING_CACHE_ROUTES: Annotated[tuple[str, ...], NoDecode, AfterValidator(_routes)] = Field(
        ("openai", "ollama", "cohere", "tei"), examples=["openai,openai:/my/path"]
    )
    EMBEDDING_CACHE_SHARE: bool = Field(False, examples=["true"])
    EMBEDDING_CACHE_LEASE: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] | Literal["off"] = Field(
        300.0, examples=[300, "off"]
    )
    EMBEDDING_CACHE_CREDENTIAL_HEADERS: Annotated[tuple[str, ...], NoDecode, AfterValidator(_header_names)] = Field(
        tuple(_CREDENTIAL_HEADERS.split()), examples=["authorization,x-api-key,x-auth-request-*"]
    )
    EMBEDDING_CACHE_KEYED_HEADERS: Annotated[tuple[str, ...], NoDecode, AfterValidator(_header_names)] = Field(
        (), examples=["user-agent,baggage"]
    )
    EMBEDDING_CACHE_IGNORED_HEADERS: Annotated[tuple[str, ...], NoDecode, AfterValidator(_header_names)] = Field(
        (), examples=["x-session,x-pod-*"]
    )
    EMBEDDING_CACHE_IGNORED_FIELDS: Annotated[tuple[str, ...], NoDecode, AfterValidator(_field_names)] = Field(
        ("user", "request_id", "priority"), examples=["user,request_id,priority,metadata.trace_id"]
    )
    EMBEDDING_CACHE_REQUEST_LISTS: Annotated[tuple[str, ...], NoDecode, AfterValidator(_field_names)] = Field(
        ("tags", "metadata.tags", "fallbacks", "models", "stop", "guardrails", "provider.order", "embedding_types"),
        examples=["tags,metadata.tags,fallbacks"],
    )
    EMBEDDING_CACHE_BODY_SECONDS: float = Field(30.0, gt=0, le=3600, allow_inf_nan=False, examples=[30])
    EMBEDDING_CACHE_USAGE: CacheUsage = Field("original", examples=["original"])
    EMBEDDING_CACHE_DTYPE: CacheDType = Field("float32", examples=["float32"])
    EMBEDDING_CACHE_L1_BYTES: int = Field(64 * 1024 * 1024, ge=0, examples=[67108864])
    EMBEDDING_CACHE_L1_SECONDS: float = Field(5.0, ge=0, le=3600, allow_inf_nan=False, examples=[5])
    EMBEDDING_CACHE_MAX_REQUEST_BYTES: int = Field(8 * 1024 * 1024, ge=1, examples=[8388608])
    EMBEDDING_CACHE_MAX_RESPONSE_BYTES: int = Field(64 * 1024 * 1024, ge=1, examples=[67108864])
    EMBEDDING_CACHE_MAX_INPUTS: int = Field(2048, ge=1, le=100_000, examples=[2048])
    EMBEDDING_CACHE_TIMEOUT: float = Field(0.25, gt=0, le=60, allow_inf_nan=False, examples=[0.25])
    EMBEDDING_CACHE_STATUS: bool = Field(True, examples=["false"])
    EMBEDDING_CACHE_REDIS_URL: Annotated[SecretStr, AfterValidator(_url)] | None = Field(
        None, examples=["redis://vectors:6379/0"]
    )

    def __init__(self, **values: Any) -> None:
        unknown = [name for name in values if name not in type(self).model_fields]
        if unknown:
            near = difflib.get_close_matches(unknown[0], type(self).model_fields, n=1)
            hint = f" Did you mean {near[0]}?" if near else " README.md lists every setting."
            raise ConfigurationError(f"{unknown[0]} is not a setting.{hint}")
        try:
            super().__init__(**values)
        except ValidationError as error:
            # pydantic would chain the rejected input into the traceback.
            problem = _explain(type(self), error, values)
            raise ConfigurationError(problem) from None

    @model_validator(mode="before")
    @classmethod
    def _split_lists(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {name: split_list(value) if name in _LISTS else value for name, value in values.items()}

    @model_validator(mode="after")
    def _agree(self) -> Self:
        url = self.REDIS_URL.get_secret_value() if self.REDIS_URL else ""
        if self.REDIS_SSL and url and not url.startswith("rediss:"):
            raise ValueError(f"REDIS_SSL=True, but REDIS_URL={redact(url)} is not encrypted. Try a rediss:// URL.")
        if self.REDIS_SENTINELS and not self.REDIS_SENTINEL_MASTER:
            raise ValueError("REDIS_SENTINELS needs REDIS_SENTINEL_MASTER. Try REDIS_SENTINEL_MASTER=mymaster.")
        if self.REDIS_SENTINELS and self.REDIS_CLUSTER:
            raise ValueError("REDIS_SENTINELS and REDIS_CLUSTER exclude each other. Unset one of them.")
        if self.REDIS_SENTINELS and url and not self.is_memory:
            raise ValueError(
                f"REDIS_SENTINELS says where Redis is, and so does REDIS_URL={redact(url)}. Unset one of them."
            )
        if self.REDIS_CLUSTER_NODES and not self.REDIS_CLUSTER:
            raise ValueError("REDIS_CLUSTER_NODES needs REDIS_CLUSTER. Try REDIS_CLUSTER=true.")
        if self.REDIS_CLUSTER_NODES and url and not self.is_memory:
            raise ValueError(
                f"REDIS_CLUSTER_NODES says where Redis is, and so does REDIS_URL={redact(url)}. Unset one of them."
            )
        if self.REDIS_CLUSTER and self.REDIS_DB:
            raise ValueError(f"REDIS_DB={self.REDIS_DB}: Redis Cluster has only database 0. Unset REDIS_DB.")
        if self.REDIS_CLUSTER and url.startswith("unix:"):
            raise ValueError(f"REDIS_URL={redact(url)}: REDIS_CLUSTER needs TCP. Try redis://localhost:6379.")
        if self.REDIS_CLUSTER and url.startswith("redis") and parse_url(url).get("db"):
            raise ValueError(f"REDIS_URL={redact(url)}: Redis Cluster has only database 0. Try it without.")
        self._check_ignored_headers()
        return self

    def _check_ignored_headers(self) -> None:
        """What is ignored opens no door and parts no tenants, so a credential cannot be."""
        never = (*self.EMBEDDING_CACHE_CREDENTIAL_HEADERS, "content-type", *self.EMBEDDING_CACHE_KEYED_HEADERS)
        for name in self.EMBEDDING_CACHE_IGNORED_HEADERS:
            other = next((other for other in never if _overlap(name, other)), None)
            if other is not None:
                raise ValueError(
                    f"EMBEDDING_CACHE_IGNORED_HEADERS={name!r} would ignore {other!r}, which says who asks or what. "
                    "Try x-pod, or take it out of EMBEDDING_CACHE_CREDENTIAL_HEADERS or _KEYED_HEADERS first."
                )

    @property
    def is_memory(self) -> bool:
        """Whether ``REDIS_URL`` is ``memory://``: counters in this process, no Redis at all."""
        return self.REDIS_URL is not None and self.REDIS_URL.get_secret_value().startswith("memory:")

    @property
    def key_secret(self) -> str | None:
        """``REDIS_KEY_SECRET`` in the clear, for the key scheme only."""
        return self.REDIS_KEY_SECRET.get_secret_value() if self.REDIS_KEY_SECRET else None

    @property
    def default_limits(self) -> str:
        """``RATE_LIMITS``, else the one limit of ``MAX_REQUESTS_PER_WINDOW`` and ``RATE_LIMIT_WINDOW``."""
        return self.RATE_LIMITS or str(Limit(self.MAX_REQUESTS_PER_WINDOW, self.RATE_LIMIT_WINDOW))


# Nothing that says where the shared server is, and none of its secrets: for settings of another one.
NO_SERVER: Mapping[str, Any] = {
    "REDIS_USERNAME": None,
    "REDIS_PASSWORD": None,
    "REDIS_DB": 0,
    "REDIS_SSL": False,
    "REDIS_SENTINELS": (),
    "REDIS_SENTINEL_MASTER": None,
    "REDIS_SENTINEL_USERNAME": None,
    "REDIS_SENTINEL_PASSWORD": None,
    "REDIS_CLUSTER_NODES": (),
}


def _redact_url(url: str) -> str:
    """The repr of a URL that could not be read, without what may be a password.

    That is what stands before an ``@``; where there is none, after a colon that no port follows; and an option's value.
    """
    scheme, slashes, rest = url.partition("//")
    rest = rest if slashes else scheme
    host = rest.rpartition("@")[2]
    rest = f"***@{host}" if "@" in rest else re.sub(r":(?!\d{1,5}(?:[/?]|$))[^/?]*", ":***", rest)
    rest = re.sub(r"=[^&]*", "=***", rest)
    return redact(scheme + slashes + rest if slashes else rest)


_LISTS = (
    "REDIS_SENTINELS",
    "REDIS_CLUSTER_NODES",
    "RATE_LIMIT_TRUSTED_PROXIES",
    "RATE_LIMIT_EXEMPT_PATHS",
    "EMBEDDING_CACHE_ROUTES",
    "EMBEDDING_CACHE_CREDENTIAL_HEADERS",
    "EMBEDDING_CACHE_KEYED_HEADERS",
    "EMBEDDING_CACHE_IGNORED_HEADERS",
    "EMBEDDING_CACHE_IGNORED_FIELDS",
    "EMBEDDING_CACHE_REQUEST_LISTS",
)


def _explain(model: type[Settings], error: ValidationError, given: Mapping[str, object]) -> str:
    """One line for the first problem: variable, redacted value, what is wrong, a value that works."""
    first = error.errors(include_context=False, include_url=False)[0]
    why = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # of several variables together
        return why
    name = str(first["loc"][0])
    field = model.model_fields[name]
    secret = "SecretStr" in str(field.annotation) and not name.endswith("REDIS_URL")
    value = given.get(name, os.environ.get(name))
    value = value.get_secret_value() if isinstance(value, SecretStr) else value
    shown = "'***'" if secret else _redact_url(str(value)) if name.endswith("REDIS_URL") else redact(value)
    example = field.examples[0] if field.examples else field.default
    return f"{name}={shown}: {why[:1].lower()}{why[1:]}. Try {example}."
