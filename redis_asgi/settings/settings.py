"""Environment variables in, one validated and frozen `Settings` out.

How they are read is in `environment`, where Redis is in `server`, what a value may be in `types`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ..errors import ConfigurationError
from .locations import redact
from .notation import MAX_QUOTA, MAX_WINDOW, Limit
from .server import NO_SERVER, ServerSettings
from .types import (
    CacheDType,
    CacheUsage,
    FieldNames,
    HeaderName,
    HeaderNames,
    HeaderStyle,
    Networks,
    Notation,
    OnMissingIdentity,
    OnRedisError,
    PartitionName,
    Paths,
    RouteNames,
    StrategyName,
    Url,
    overlap,
)

__all__ = ["NO_SERVER", "HeaderStyle", "OnRedisError", "Settings", "StrategyName", "check_settings"]

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


class Settings(ServerSettings):
    """Everything the package can be told from outside;
    each field is an environment variable of that name.

    ``Settings()`` reads the environment once; keyword arguments win over it. Empty variables are
    unset ones. ``Settings(_env_file=".env")``, and subclasses with an ``env_file`` or
    ``env_prefix``, do what they do in every class of pydantic-settings; foreign variables in the
    file are no error. Instances are frozen and hashable. No secret is shown by ``repr`` or in an
    error.

    Raises:
        ConfigurationError: Names each variable that cannot work,
            its (redacted) value and a value that works.
    """

    RATE_LIMIT_WINDOW: int = Field(
        default=60, ge=1, le=MAX_WINDOW, examples=[60], description="seconds of the default limit"
    )
    MAX_REQUESTS_PER_WINDOW: int = Field(
        default=100, ge=1, le=MAX_QUOTA, examples=[100], description="units of the default limit"
    )
    RATE_LIMITS: Notation | None = Field(
        default=None, examples=["20/second; 1000/hour"], description="limits in their notation; wins over the two above"
    )
    RATE_LIMIT_STRATEGY: StrategyName = Field(
        default="fixed-window", examples=["fixed-window"], description="how limits are counted"
    )
    RATE_LIMIT_PARTITION: PartitionName = Field(
        default="ip", examples=["header:x-api-key"], description="who shares a counter: `ip`, `user` or `header:NAME`"
    )
    RATE_LIMIT_MISSING_IDENTITY: OnMissingIdentity = Field(
        default="ip",
        examples=["ip"],
        description="what a request without that header or user is counted by: its address, nothing, one counter "
        "that all of them share; or `refuse`, a 400",
    )
    RATE_LIMIT_TRUSTED_PROXIES: Networks = Field(
        default=(),
        examples=["10.0.0.0/8,192.0.2.7"],
        description="addresses and networks whose forwarding header is believed; `unix`: a peer without an address",
    )
    RATE_LIMIT_FORWARDED_HEADER: HeaderName = Field(
        default="x-forwarded-for", examples=["x-forwarded-for"], description="the one header that is believed from them"
    )
    RATE_LIMIT_IPV6_PREFIX: int = Field(
        default=64, ge=1, le=128, examples=[64], description="bits of an IPv6 address that share a counter"
    )
    RATE_LIMIT_EXEMPT_PATHS: Paths = Field(
        default=(), examples=["/health/*,/metrics/*"], description="path patterns that are never counted"
    )
    RATE_LIMIT_ON_REDIS_ERROR: OnRedisError = Field(
        default="local",
        examples=["local"],
        description="while Redis does not answer: the same limits in each process (`local`), none (`open`), or "
        "503 (`closed`)",
    )
    RATE_LIMIT_FALLBACK_DIVISOR: int = Field(
        default=1,
        ge=1,
        le=100_000,
        examples=[4],
        description="while Redis is gone each process admits `ceil(quota / divisor)`; set it to the number of workers",
    )
    RATE_LIMIT_LOCAL_MAX_PARTITIONS: int = Field(
        default=100_000,
        ge=1,
        le=100_000_000,
        examples=[100_000],
        description="clients that are counted in the process at most",
    )
    RATE_LIMIT_TIMEOUT: float = Field(
        default=0.25,
        gt=0,
        le=60,
        allow_inf_nan=False,
        examples=[0.25],
        description="seconds that a request waits for Redis at most; more than 1.25 round trips",
    )
    RATE_LIMIT_BODY_CAP: int = Field(
        default=8 * 1024 * 1024,
        ge=0,
        examples=[1048576],
        description="bytes of a body that is read for a rule: by a `cost` callable, `by_json()` or `by_mcp_tool()`",
    )
    RATE_LIMIT_HEADERS: HeaderStyle = Field(
        default="ietf",
        examples=["ietf"],
        description="`ietf` is `RateLimit` and `RateLimit-Policy`, `legacy` is `X-RateLimit-*`",
    )
    RATE_LIMIT_DRY_RUN: bool = Field(
        default=False, examples=["true"], description="every rule is a shadow: counted, never refused"
    )

    EMBEDDING_CACHE_TTL: int = Field(
        default=3600,
        ge=1,
        le=MAX_WINDOW,
        examples=[3600],
        description="seconds that a vector is kept, from when it is stored: a lower one does not end what is "
        "there, a flush does; what is re-indexed every night wants days",
    )
    EMBEDDING_CACHE_TTL_JITTER: float = Field(
        default=0.1,
        ge=0,
        le=0.9,
        allow_inf_nan=False,
        examples=[0.1],
        description="the TTL is shortened by up to this share of it, as the key's own hash says",
    )
    EMBEDDING_CACHE_NAMESPACE: str = Field(
        default="", max_length=200, examples=["bge-m3@5617a9f"], description="in every key: your model and its revision"
    )
    EMBEDDING_CACHE_ROUTES: RouteNames = Field(
        default=("openai", "ollama", "cohere", "tei"),
        examples=["openai,openai:/my/path"],
        description="wire formats at their usual paths, and `NAME:/path` for others",
    )
    EMBEDDING_CACHE_SHARE: bool = Field(
        default=False, examples=["true"], description="all credentials share their vectors"
    )
    EMBEDDING_CACHE_LEASE: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)] | Literal["off"] = Field(
        default=300.0,
        examples=[300, "off"],
        description="seconds for which the app's own answer lets such requests have full hits, of which 300 count "
        "at most",
    )
    EMBEDDING_CACHE_CREDENTIAL_HEADERS: HeaderNames = Field(
        default=tuple(_CREDENTIAL_HEADERS.split()),
        examples=["authorization,x-api-key,x-auth-request-*"],
        description="the headers that say who asks: always in leases, and in keys unless callers share; `*` at "
        "the end stands for anything",
    )
    EMBEDDING_CACHE_KEYED_HEADERS: HeaderNames = Field(
        default=(),
        examples=["user-agent,baggage"],
        description="headers that are not in the key by themselves, and shall be",
    )
    EMBEDDING_CACHE_IGNORED_HEADERS: HeaderNames = Field(
        default=(),
        examples=["x-session,x-pod-*"],
        description="headers that choose no tenant, no model and no permission: in no key and no lease",
    )
    EMBEDDING_CACHE_IGNORED_FIELDS: FieldNames = Field(
        default=("user", "request_id", "priority"),
        examples=["user,request_id,priority,metadata.trace_id"],
        description="body fields, dotted where one is inside of another, that are in no key and no lease",
    )
    EMBEDDING_CACHE_REQUEST_LISTS: FieldNames = Field(
        default=(
            "tags",
            "metadata.tags",
            "fallbacks",
            "models",
            "stop",
            "guardrails",
            "provider.order",
            "embedding_types",
        ),
        examples=["tags,metadata.tags,fallbacks"],
        description="body fields, dotted where one is inside of another, whose lists belong to the whole request "
        "and not to its inputs one by one",
    )
    EMBEDDING_CACHE_BODY_SECONDS: float = Field(
        default=30.0,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        examples=[30],
        description="seconds that the cache waits for the rest of a body; then the request passes through",
    )
    EMBEDDING_CACHE_USAGE: CacheUsage = Field(
        default="original",
        examples=["original"],
        description="`usage` of an answer: what the app would have reported (`original`), or what it did for the "
        "inputs it saw (`billed`)",
    )
    EMBEDDING_CACHE_DTYPE: CacheDType = Field(
        default="float32", examples=["float32"], description="how vectors are stored; `float16` takes half the memory"
    )
    EMBEDDING_CACHE_L1_BYTES: int = Field(
        default=64 * 1024 * 1024, ge=0, examples=[67108864], description="memory for vectors in each process; 0 = none"
    )
    EMBEDDING_CACHE_L1_SECONDS: float = Field(
        default=5.0,
        ge=0,
        le=3600,
        allow_inf_nan=False,
        examples=[5],
        description="how long a process believes what it saw of flushes and leases without asking Redis; 0 turns "
        "that layer off",
    )
    EMBEDDING_CACHE_MAX_REQUEST_BYTES: int = Field(
        default=8 * 1024 * 1024, ge=1, examples=[8388608], description="larger bodies pass through"
    )
    EMBEDDING_CACHE_MAX_RESPONSE_BYTES: int = Field(
        default=64 * 1024 * 1024, ge=1, examples=[67108864], description="larger answers of the app are not stored"
    )
    EMBEDDING_CACHE_MAX_INPUTS: int = Field(
        default=2048, ge=1, le=100_000, examples=[2048], description="requests with more inputs pass through"
    )
    EMBEDDING_CACHE_TIMEOUT: float = Field(
        default=0.25,
        gt=0,
        le=60,
        allow_inf_nan=False,
        examples=[0.25],
        description="seconds that a lookup waits for Redis at most",
    )
    EMBEDDING_CACHE_STATUS: bool = Field(default=True, examples=["false"], description="send `cache-status`")
    EMBEDDING_CACHE_REDIS_URL: Url | None = Field(
        default=None,
        examples=["redis://vectors:6379/0"],
        description="a server of its own for vectors, so that they cannot evict counters; `REDIS_*` addresses and "
        "passwords do not apply to it",
    )

    if TYPE_CHECKING:
        # Checkers take a model's arguments for its fields' types;
        # these come in whatever way a variable may.
        def __init__(self, **values: Any) -> None: ...

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        # What is ignored opens no door and parts no tenants, so a credential cannot be.
        never = (*self.EMBEDDING_CACHE_CREDENTIAL_HEADERS, "content-type", *self.EMBEDDING_CACHE_KEYED_HEADERS)
        for name in self.EMBEDDING_CACHE_IGNORED_HEADERS:
            other = next((other for other in never if overlap(name, other)), None)
            if other is not None:
                yield (
                    f"EMBEDDING_CACHE_IGNORED_HEADERS={name!r} would ignore {other!r}, which says who asks or what. "
                    "Try x-pod, or take it out of EMBEDDING_CACHE_CREDENTIAL_HEADERS or _KEYED_HEADERS first."
                )

    @property
    def default_limits(self) -> str:
        """``RATE_LIMITS``, else the one limit of ``MAX_REQUESTS_PER_WINDOW`` and
        ``RATE_LIMIT_WINDOW``.
        """
        return self.RATE_LIMITS or str(Limit(self.MAX_REQUESTS_PER_WINDOW, self.RATE_LIMIT_WINDOW))


def check_settings(settings: object) -> None:
    """Refuse what is given for settings and is none.

    Raises:
        ConfigurationError: Says what was meant, and shows no password.
    """
    if settings is None or isinstance(settings, Settings):
        return
    meant = "settings=Settings(REDIS_URL='redis://localhost:6379')"
    if isinstance(settings, str):
        raise ConfigurationError(f"settings={redact(settings)} is a text, and no Settings. Try redis=, or {meant}.")
    what = "the class Settings itself" if settings is Settings else f"a {type(settings).__name__}, and no Settings"
    raise ConfigurationError(f"settings= is given {what}. Try {meant}.")
