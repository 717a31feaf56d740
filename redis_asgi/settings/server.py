"""The ``REDIS_*`` settings: where Redis is, how it is reached,
and which of them contradict each other.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, SecretStr, model_validator
from redis.asyncio.connection import parse_url

from .environment import FromEnvironment, note_origin
from .locations import read_address, redact
from .types import Addresses, Host, KeyPrefix, Readable, Url

# What Kubernetes, and Docker before it, sets for a Service of a setting's name.
_SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://(.+)")


class ServerSettings(FromEnvironment):
    """The address of Redis, the way to reach it, and the names of its keys."""

    REDIS_HOST: Host = Field(
        default="localhost", examples=["localhost"], description="host name or address of the server"
    )
    REDIS_PORT: int = Field(
        default=6379,
        ge=1,
        le=65535,
        examples=[6379],
        description="its port; `tcp://host:port`, which Kubernetes sets for a Service named `redis`, is taken "
        "apart, and ignored beside `REDIS_URL`",
    )
    REDIS_DB: int = Field(default=0, ge=0, examples=[0], description="database number; a cluster has only 0")
    REDIS_USERNAME: str | None = Field(default=None, examples=["app"], description="ACL user")
    REDIS_PASSWORD: SecretStr | None = Field(
        default=None,
        examples=["(the password)"],
        description="password of that user, or the `requirepass` of the server",
    )
    REDIS_URL: Url | None = Field(
        default=None,
        examples=["redis://localhost:6379/0"],
        description="`redis://`, `rediss://` (TLS), `unix://` or `memory://`, also `valkey://` and `valkeys://`; "
        "what it says wins over the five above",
    )
    REDIS_POOL_SIZE: int = Field(
        default=20,
        ge=1,
        le=10_000,
        examples=[20],
        description="connections per process and loop; who finds none free waits for one; one (of two or more) is "
        "kept back from the app's own commands, which may block",
    )
    REDIS_TIMEOUT: float = Field(
        default=10.0,
        gt=0,
        le=3600,
        allow_inf_nan=False,
        examples=[10],
        description="seconds for connecting and for administrative commands; checks have `RATE_LIMIT_TIMEOUT`, "
        "lookups `EMBEDDING_CACHE_TIMEOUT`",
    )
    REDIS_RETRY_ATTEMPTS: int = Field(
        default=3,
        ge=0,
        le=100,
        examples=[3],
        description="more attempts of `RedisManager.initialize_pool()`; checks are never retried",
    )
    REDIS_SSL: bool = Field(default=False, examples=["true"], description="TLS; certificate and host name are verified")
    REDIS_SSL_CA_CERTS: Readable | None = Field(
        default=None,
        examples=["/etc/ssl/certs/ca-certificates.crt"],
        description="file of the authorities to trust, instead of the system's",
    )
    REDIS_SSL_CERTFILE: Readable | None = Field(
        default=None, examples=["/etc/redis/client.crt"], description="file of the client's certificate"
    )
    REDIS_SSL_KEYFILE: Readable | None = Field(
        default=None, examples=["/etc/redis/client.key"], description="file of the private key of that certificate"
    )
    REDIS_SENTINELS: Addresses = Field(
        default=(),
        examples=["sentinel-1:26379,sentinel-2:26379"],
        description="addresses of the sentinels; of IPv6 as `[::1]:26379`",
    )
    REDIS_SENTINEL_MASTER: str | None = Field(
        default=None, min_length=1, examples=["mymaster"], description="name of the master they watch"
    )
    REDIS_SENTINEL_USERNAME: str | None = Field(
        default=None, examples=["app"], description="ACL user of the sentinels themselves"
    )
    REDIS_SENTINEL_PASSWORD: SecretStr | None = Field(
        default=None, examples=["(the password)"], description="its password, or the `requirepass` of the sentinels"
    )
    REDIS_CLUSTER: bool = Field(default=False, examples=["true"], description="the server is a node of a Redis Cluster")
    REDIS_CLUSTER_NODES: Addresses = Field(
        default=(),
        examples=["node-1:6379,node-2:6379"],
        description="addresses of several nodes of it, instead of `REDIS_HOST` or `REDIS_URL`",
    )
    REDIS_BATCH: Literal["auto", "key"] = Field(
        default="auto",
        examples=["key"],
        description="whether keys of different slots share a command: `auto` until a server refuses that; `key` "
        "never, for proxies that shard by key and say nothing",
    )
    REDIS_KEY_PREFIX: KeyPrefix = Field(
        default="",
        max_length=200,
        examples=["myapp:"],
        description="stands before every key as it is; no braces, blanks or control characters",
    )
    REDIS_KEY_SECRET: SecretStr | None = Field(
        default=None,
        min_length=1,
        examples=["(a random string)"],
        description="keys the digests of identities in Redis keys, and hashes addresses too",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_service_link(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Take ``REDIS_PORT=tcp://10.0.0.1:6379`` apart,
        or out where something else says where Redis is.
        """
        port = values.get("REDIS_PORT")
        link = _SERVICE_LINK.fullmatch(port.strip()) if isinstance(port, str) else None
        if link is None:
            return values
        others = {name: value for name, value in values.items() if name != "REDIS_PORT"}
        # Redis is spoken over TCP: another protocol's link leads to something else of that name.
        if others.get("REDIS_URL") is not None or link[1] != "tcp":
            return others
        try:
            host, number = read_address(link[2].rstrip("/"))
        except ValueError:
            return values  # the field says so
        note_origin("REDIS_HOST", of="REDIS_PORT")
        return {"REDIS_HOST": host, **others, "REDIS_PORT": number}

    def conflicts(self) -> Iterator[str]:
        url = self.REDIS_URL.get_secret_value() if self.REDIS_URL else ""
        shown = f"REDIS_URL={redact(url)}"
        if self.REDIS_SSL and url and not url.startswith("rediss:"):
            yield f"REDIS_SSL=True, but {shown} is not encrypted. Try a rediss:// URL."
        if self.REDIS_SENTINELS and not self.REDIS_SENTINEL_MASTER:
            yield "REDIS_SENTINELS needs REDIS_SENTINEL_MASTER. Try REDIS_SENTINEL_MASTER=mymaster."
        if self.REDIS_SENTINELS and self.REDIS_CLUSTER:
            yield "REDIS_SENTINELS and REDIS_CLUSTER exclude each other. Unset one of them."
        if self.REDIS_SENTINELS and url and not self.is_memory:
            yield f"REDIS_SENTINELS says where Redis is, and so does {shown}. Unset one of them."
        if self.REDIS_CLUSTER_NODES and not self.REDIS_CLUSTER:
            yield "REDIS_CLUSTER_NODES needs REDIS_CLUSTER. Try REDIS_CLUSTER=true."
        if self.REDIS_CLUSTER_NODES and url and not self.is_memory:
            yield f"REDIS_CLUSTER_NODES says where Redis is, and so does {shown}. Unset one of them."
        if self.REDIS_CLUSTER and self.REDIS_DB:
            yield f"REDIS_DB={self.REDIS_DB}: Redis Cluster has only database 0. Unset REDIS_DB."
        if self.REDIS_CLUSTER and url.startswith("unix:"):
            yield f"{shown}: REDIS_CLUSTER needs TCP. Try redis://localhost:6379."
        if self.REDIS_CLUSTER and url.startswith("redis") and parse_url(url).get("db"):
            yield f"{shown}: Redis Cluster has only database 0. Try it without."

    @property
    def is_memory(self) -> bool:
        """Whether ``REDIS_URL`` is ``memory://``: counters in this process, no Redis at all."""
        return self.REDIS_URL is not None and self.REDIS_URL.get_secret_value().startswith("memory:")

    @property
    def is_encrypted(self) -> bool:
        """Whether connections speak TLS."""
        return self.REDIS_SSL or (
            self.REDIS_URL is not None and self.REDIS_URL.get_secret_value().startswith("rediss:")
        )

    @property
    def key_secret(self) -> str | None:
        """``REDIS_KEY_SECRET`` in the clear, for the key scheme only."""
        return self.REDIS_KEY_SECRET.get_secret_value() if self.REDIS_KEY_SECRET else None

    @property
    def names_redis(self) -> bool:
        """Whether anything says where Redis is, by argument or environment:
        else it is ``redis://localhost:6379``.
        """
        return not self.model_fields_set.isdisjoint(_WHERE)


_WHERE = (
    "REDIS_HOST",
    "REDIS_PORT",
    "REDIS_DB",
    "REDIS_USERNAME",
    "REDIS_PASSWORD",
    "REDIS_URL",
    "REDIS_SSL",
    "REDIS_SENTINELS",
    "REDIS_CLUSTER",
    "REDIS_CLUSTER_NODES",
)
# Nothing that says where the shared server is,
# and none of its secrets: for settings of another one.
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
