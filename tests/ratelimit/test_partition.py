"""Who shares a counter: by address, header, user, or a callable of one's own."""

import base64
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.security.utils import get_authorization_scheme_param
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.authentication import BaseUser, SimpleUser, UnauthenticatedUser
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import Scope

from redis_asgi import (
    ConfigurationError,
    RateLimitMiddleware,
    RedisManager,
    Rule,
    Settings,
    by_header,
    by_user,
    client_ip,
    rate_limit,
)
from redis_asgi.asgi.offer import OFFER, Offer
from redis_asgi.asgi.scope import Addressing
from redis_asgi.ratelimit.limits.policy import Partition, make_partition
from redis_asgi.ratelimit.rules.partition import LONGEST_CACHED, MissingIdentity, Partitioner

from .harness import drive, http_scope, memory

pytestmark = pytest.mark.anyio
ADDRESS = "203.0.113.7"
BY_ADDRESS = make_partition("ip", ADDRESS, plain=True)


def request(*headers: tuple[str, str], client: Any = (ADDRESS, 50_000), user: Any = None) -> Scope:
    """An ASGI scope from an address, with headers and perhaps a user."""
    scope: Scope = {"type": "http", "method": "GET", "path": "/", "client": client}
    scope["headers"] = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    if user is not None:
        scope["user"] = user
    return scope


async def partition(by: Any, scope: Scope, **values: Any) -> Partition | None:
    """The partition of that request."""
    settings = Settings(REDIS_URL="memory://", **values)
    addressing = Addressing(settings)
    # A request of its own, behind a door that has said whose addresses are believed.
    return await ask(Partitioner(by, settings, addressing), {**scope, OFFER: Offer(addressing=addressing)})


async def ask(partitioner: Partitioner, scope: Scope) -> Partition | None:
    """What a plan makes of it."""
    read: Any = partitioner.by
    said = partitioner.read(scope) if partitioner.read is not None else read(HTTPConnection(scope))
    name = await partitioner.settle(said, scope)
    return None if name is None else partitioner.of(name)


@pytest.mark.parametrize(
    ("client", "key"),
    [
        pytest.param(("203.0.113.7", 1), b"rate_limit:{203.0.113.7}", id="IPv4"),
        pytest.param(("::ffff:203.0.113.7", 1), b"rate_limit:{203.0.113.7}", id="IPv4 in IPv6"),
        pytest.param(("2001:db8:1:2:3::4", 1), b"rate_limit:{2001:db8:1:2::/64}", id="IPv6 by network"),
        pytest.param(None, b"rate_limit:{unknown}", id="no address"),
        pytest.param(("", 0), b"rate_limit:{unknown}", id="empty address"),
    ],
)
async def test_client_is_counted_by_address(client: Any, key: bytes) -> None:
    """One counter per IPv4 address or IPv6 network; those without an address share one."""
    found = await partition(client_ip, request(client=client))

    assert found is not None
    assert key == found.key


@pytest.mark.parametrize("host", ["testclient", "a}b{c", "x" * 100_000, "203.0.113.7 "])
async def test_host_that_is_no_address_is_hashed(host: str) -> None:
    """Whatever a server puts there, the key is short and has our braces only."""
    found = await partition(client_ip, request(client=(host, 1)))

    assert found is not None
    assert make_partition("ip", host).key == found.key


async def test_address_of_a_trusted_proxy_gives_way_to_the_clients() -> None:
    """The header is believed from the proxies named, and from nobody else."""
    scope = request(("x-forwarded-for", "198.51.100.9"))
    trusted = await partition(client_ip, scope, RATE_LIMIT_TRUSTED_PROXIES=(ADDRESS,))

    assert [b"rate_limit:{198.51.100.9}", BY_ADDRESS] == [
        trusted and trusted.key,
        await partition(client_ip, scope),
    ]


async def test_header_is_an_identity() -> None:
    """The kind says which header, so that equal values of two headers are two clients."""
    one = await partition(by_header("X-API-Key"), request(("x-api-key", "hunter2")))
    other = await partition(by_header("x-other"), request(("x-other", "hunter2")))

    assert make_partition("header:x-api-key", "hunter2") == one
    assert one != other


async def test_header_that_looks_like_an_address_is_none() -> None:
    """Nobody spends the quota of an address by sending it as a key."""
    found = await partition(by_header("x-api-key"), request(("x-api-key", ADDRESS)))

    assert found is not None
    assert found.key != BY_ADDRESS.key


async def test_first_field_line_counts() -> None:
    """As Starlette reads it; spaces around it do not matter."""
    found = await partition(by_header("x-key"), request(("x-key", " a "), ("x-key", "b")))

    assert make_partition("header:x-key", "a") == found


@pytest.mark.parametrize("name", ["Authorization", "proxy-authorization"])
@pytest.mark.parametrize(
    "value", ["Bearer K", "bearer K", "BEARER K", "bEaReR \t  K", "\tBearer\tK  ", "Bearer\x85\xa0K\x1f"]
)
async def test_credentials_have_one_spelling(name: str, value: str) -> None:
    """A scheme's case and the blanks behind it say nothing: one key is one client."""
    found = await partition(by_header(name), request((name.lower(), value)))

    assert make_partition(f"header:{name.lower()}", "bearer K") == found


@pytest.mark.parametrize(
    ("name", "value", "identity"),
    [
        pytest.param("authorization", "Bearer k", "bearer k", id="a key's case"),
        pytest.param("authorization", "Sk-Key", "Sk-Key", id="a key without a scheme"),
        pytest.param("authorization", "Bearer K  L", "bearer K  L", id="blanks within the key"),
        pytest.param("authorization", "Basic a", "basic a", id="no base64"),
        pytest.param("authorization", "Bearer ey.a.b!", "bearer ey.a.b!", id="no signature"),
        pytest.param("x-api-key", "Bearer  K", "Bearer  K", id="another header"),
        pytest.param("x-api-key", "\t K \t", "K", id="blanks around"),
        pytest.param("x-api-key", "\xa0K\x85\x1f", "\xa0K\x85\x1f", id="what only Python calls blank"),
    ],
)
async def test_everything_else_is_another_identity(name: str, value: str, identity: str) -> None:
    """Nobody shares a counter with somebody whose key differs."""
    found = await partition(by_header(name), request((name, value)))

    assert make_partition(f"header:{name}", identity) == found


def _bearer(value: str) -> str:
    scheme, credentials = get_authorization_scheme_param(value)
    assert scheme.lower() == "bearer"
    return credentials


def _basic(value: str) -> bytes:
    scheme, credentials = get_authorization_scheme_param(value)
    assert scheme.lower() == "basic"
    return base64.b64decode(credentials)


def _web_token(value: str) -> tuple[str, bytes]:
    signed, _, signature = _bearer(value).rpartition(".")
    return signed, base64.urlsafe_b64decode(signature.encode() + b"==")


@pytest.mark.parametrize(
    ("plain", "read"),
    [
        pytest.param("Bearer sk-1", _bearer, id="bearer"),
        pytest.param("Basic YWxpY2U6cHc=", _basic, id="basic"),
        pytest.param("Bearer eyJhIjoxfQ.eyJiIjoyfQ.c2lnbmF0dXI", _web_token, id="web token"),
    ],
)
@given(st.data())
def test_what_an_app_takes_for_one_credential_is_one_client(
    plain: str, read: Callable[[str], object], data: st.DataObject
) -> None:
    """Whatever FastAPI, and decoders of base64, forgive gives no further counter."""
    value = plain
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(value)))
        put = data.draw(st.text(st.characters(max_codepoint=255) | st.sampled_from(" \t\xa0=!-_."), max_size=3))
        value = value[:at] + put + value[at + data.draw(st.integers(0, 1)) :]
    try:
        same = read(value.strip(" \t")) == read(plain)
    except (AssertionError, ValueError):
        same = False

    assert not same or by_header("authorization").fold(plain) == by_header("authorization").fold(value)


@pytest.mark.parametrize(
    ("plain", "value"),
    [
        pytest.param("Basic YWxpY2U6cHc=", "Basic YWxpY2U6cHd=", id="spare bits of basic"),
        pytest.param("Basic YWxpY2U6cHc=", "basic YWxp!Y2U6cHc", id="foreign characters in basic"),
        pytest.param(
            "Bearer eyJhIjoxfQ.eyJiIjoyfQ.c2ln_2E", "bearer eyJhIjoxfQ.eyJiIjoyfQ.c2\xffln_2F=", id="web token"
        ),
    ],
)
def test_base64_is_read(plain: str, value: str) -> None:
    """A Basic credential, and a web token's signature, is its bytes, in whatever letters."""
    header = by_header("authorization")

    assert header.fold(plain) == header.fold(value)


@pytest.mark.parametrize("value", ["\xff\x00", "a" * (LONGEST_CACHED + 1), "a" * 1_000_000, "{}"])
async def test_any_header_value_has_a_partition(value: str) -> None:
    """Bytes that are no text, a megabyte, braces."""
    found = await partition(by_header("x-key"), request(("x-key", value)))

    assert make_partition("header:x-key", value) == found


async def test_long_values_are_not_kept() -> None:
    """A cache of identities must not hold a megabyte per entry."""
    settings = Settings(REDIS_URL="memory://")
    partitioner = Partitioner(by_header("x-key"), settings, Addressing(settings))
    for value in ("a" * LONGEST_CACHED, "b" * (LONGEST_CACHED + 1)):
        await ask(partitioner, request(("x-key", value)))

    assert 1 == partitioner._of_value.cache_info().currsize


@pytest.mark.parametrize("name", ["", "x key", "x:key", "größe", "x\nkey", 5, None])
def test_header_name_must_be_one(name: Any) -> None:
    """A name no request can have would never limit anybody."""
    with pytest.raises(ConfigurationError, match="by_header"):
        by_header(name)


class Account(BaseUser):
    """A user with an identity beside the name shown."""

    def __init__(self, identity: Any) -> None:
        self._identity = identity

    @property
    def is_authenticated(self) -> bool:
        return True

    @property
    def display_name(self) -> str:
        return "Alex"

    @property
    def identity(self) -> Any:
        return self._identity


@pytest.mark.parametrize(
    ("user", "value"),
    [
        pytest.param(Account("u-17"), "u-17", id="identity"),
        pytest.param(Account(17), "17", id="number"),
        pytest.param(Account(0), "0", id="number zero"),
        pytest.param(SimpleUser("alex"), "alex", id="name, where there is no identity"),
    ],
)
async def test_user_is_an_identity(user: Any, value: str) -> None:
    """Wherever the request comes from."""
    assert make_partition("user", value) == await partition(by_user, request(user=user))


WITHOUT = [
    pytest.param(by_header("x-key"), request(), "header:x-key", id="no header"),
    pytest.param(by_header("x-key"), request(("x-key", "")), "header:x-key", id="empty header"),
    pytest.param(by_header("x-key"), request(("x-key", "  ")), "header:x-key", id="blank header"),
    pytest.param(by_user, request(), "user", id="no user"),
    pytest.param(by_user, request(user=UnauthenticatedUser()), "user", id="not logged in"),
    pytest.param(by_user, request(user=Account("")), "user", id="empty identity"),
    pytest.param(by_user, request(user=Account(None)), "user", id="no identity"),
]


@pytest.mark.parametrize(("by", "scope", "kind"), WITHOUT)
async def test_missing_identity(by: Any, scope: Scope, kind: str) -> None:
    """Counted by address, or not at all, or as one crowd, or refused: as the setting says."""
    found = {mode: await partition(by, scope, RATE_LIMIT_MISSING_IDENTITY=mode) for mode in ("ip", "skip", "shared")}

    assert {"ip": BY_ADDRESS, "skip": None, "shared": make_partition(kind, "")} == found
    with pytest.raises(MissingIdentity, match=kind):
        await partition(by, scope, RATE_LIMIT_MISSING_IDENTITY="refuse")


async def tenant_later(conn: HTTPConnection) -> str | None:
    """A callable that looks somewhere else first."""
    return conn.headers.get("x-tenant")


@pytest.mark.parametrize("by", [lambda conn: conn.headers.get("x-tenant"), tenant_later], ids=["sync", "async"])
async def test_callable_names_the_partition(by: Any) -> None:
    """Its result is awaited if it must be;
    ``None`` takes the request out of the rule, whatever the setting.
    """
    assert make_partition("custom", "acme") == await partition(by, request(("x-tenant", "acme")))
    assert await partition(by, request(), RATE_LIMIT_MISSING_IDENTITY="refuse") is None


@pytest.mark.parametrize("returned", [5, b"acme", ("a",)])
async def test_callable_that_returns_no_string_is_a_type_error(returned: Any) -> None:
    """Never silently "not limited"."""
    with pytest.raises(TypeError, match=type(returned).__name__):
        await partition(lambda _conn: returned, request())


async def test_error_of_a_callable_is_the_apps() -> None:
    """It goes to the app's error handling like any other."""

    def broken(_conn: HTTPConnection) -> str:
        raise LookupError("no such tenant")

    with pytest.raises(LookupError, match="no such tenant"):
        await partition(broken, request())


async def test_client_ip_inside_a_callable_believes_the_same_proxies() -> None:
    """Composing the ready callables keeps their meaning."""
    scope = request(("x-forwarded-for", "198.51.100.9"))
    found = await partition(lambda conn: f"web:{client_ip(conn)}", scope, RATE_LIMIT_TRUSTED_PROXIES=(ADDRESS,))

    assert make_partition("custom", "web:198.51.100.9") == found


BEHIND = {"RATE_LIMIT_TRUSTED_PROXIES": "10.0.0.0/8"}
FORWARDED = [(b"x-forwarded-for", b"203.0.113.9")]


async def _ask(app: Any, **changes: Any) -> int:
    sent = await drive(app, http_scope(client=("10.0.0.5", 1), headers=FORWARDED, **changes))
    status: int = sent[0]["status"]
    return status


async def test_every_callable_asks_the_same_proxies() -> None:
    """Exemptions, limits, costs, partitions, refusals and the app:
    whom a request comes from is asked in one way.
    """
    seen: dict[str, str | None] = {}

    def see(name: str, result: Any) -> Any:
        def said(conn: HTTPConnection, *_decision: Any) -> Any:
            seen[name] = client_ip(conn)
            return result

        return said

    async def home(request: Request) -> PlainTextResponse:
        seen["app"] = client_ip(request)
        return PlainTextResponse("home")

    def build(*rules: Rule, **options: Any) -> RateLimitMiddleware:
        settings = memory(**BEHIND, REDIS_KEY_PREFIX=f"{len(seen)}:")
        app = Starlette(routes=[Route("/", home)])
        return RateLimitMiddleware(app, rules=rules, settings=settings, redis=RedisManager(settings), **options)

    assert 200 == await _ask(build(Rule("9/minute"), exempt=see("exempt", result=True)))
    assert 200 == await _ask(build(Rule(see("limits", "9/minute"), partition_by=see("partition", "me"))))
    assert 200 == await _ask(build(Rule("9/minute", cost=see("cost", 1))))
    refusing = build(Rule("1/minute"), on_exceeded=see("exceeded", None))
    assert [200, 429] == [await _ask(refusing), await _ask(refusing)]

    names = {"exempt", "limits", "partition", "cost", "exceeded", "app"}
    assert dict.fromkeys(names, "203.0.113.9") == seen


@pytest.mark.parametrize("options", [{}, {"redis": "memory://"}, {"settings": memory(REDIS_KEY_PREFIX="own:")}])
async def test_limits_of_routes_ask_the_middlewares_proxies(options: Any) -> None:
    """Whatever Redis or settings they have of their own."""
    seen = []

    def tell(conn: HTTPConnection) -> str:
        seen.append(client_ip(conn))
        return "9/minute"

    decided = []

    @rate_limit(tell, **options)
    async def home(request: Request) -> PlainTextResponse:
        decided.append(client_ip(request))
        return PlainTextResponse("home")

    @rate_limit("1/minute", name="once", **options)
    async def once(request: Request) -> PlainTextResponse:
        return PlainTextResponse("once")

    app = Starlette(routes=[Route("/", home), Route("/once", once)])
    settings = memory(**BEHIND)
    limited = RateLimitMiddleware(app, rules=[Rule("9/minute", paths="/none")], settings=settings)

    assert 200 == await _ask(limited)
    assert (["203.0.113.9"], ["203.0.113.9"]) == (seen, decided)
    assert [200, 429] == [await _ask(limited, path="/once") for _ in range(2)]
    others = http_scope(client=("10.0.0.5", 1), headers=[(b"x-forwarded-for", b"198.51.100.1")], path="/once")
    assert 200 == (await drive(limited, others))[0]["status"]


async def test_the_limit_of_a_route_without_a_middleware_asks_its_own() -> None:
    """Its settings say which proxies are believed, for its callables too."""
    seen = []

    def tell(conn: HTTPConnection) -> str:
        seen.append(client_ip(conn))
        return "9/minute"

    @rate_limit(tell, settings=memory(**BEHIND))
    async def home(request: Request) -> PlainTextResponse:
        seen.append(client_ip(request))
        return PlainTextResponse("home")

    assert 200 == await _ask(Starlette(routes=[Route("/", home)]))
    assert ["203.0.113.9"] * 2 == seen


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("ip", BY_ADDRESS),
        ("header:X-Key", make_partition("header:x-key", "k")),
        ("user", make_partition("user", "u-17")),
    ],
)
async def test_setting_names_the_partition(setting: str, expected: Partition) -> None:
    """``RATE_LIMIT_PARTITION`` where a rule and its middleware say nothing."""
    scope = request(("x-key", "k"), user=Account("u-17"))

    assert expected == await partition(None, scope, RATE_LIMIT_PARTITION=setting)


async def test_what_is_not_callable_is_refused() -> None:
    """With what would work."""
    with pytest.raises(ConfigurationError, match="by_user"):
        await partition("ip", request())


@pytest.mark.parametrize("by", [client_ip, by_header("x-key"), by_user])
async def test_prefix_and_secret_reach_every_key(by: Any) -> None:
    """Whatever it counts by."""
    scope = request(("x-key", "k"), user=Account("u-17"))
    plain = await partition(by, scope)
    hidden = await partition(by, scope, REDIS_KEY_PREFIX="shop:", REDIS_KEY_SECRET="s3cret")

    assert plain is not None
    assert hidden is not None
    assert hidden.key.startswith(b"shop:rate_limit:{")
    assert plain.key not in hidden.key
    assert ADDRESS.encode() not in hidden.key
