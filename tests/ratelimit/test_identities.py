"""Whom a request is counted as, whatever its headers and its peer say."""

from typing import Any

import pytest
from starlette.requests import HTTPConnection

from redis_asgi import RateLimitMiddleware, Settings, by_header, by_user, client_ip

from .harness import Spy, drive, http_scope, memory, statuses

pytestmark = pytest.mark.anyio


async def test_partition_by_header_and_user(memory_settings: Settings) -> None:
    """Each key has its own counter, and nobody without one shares a keyed client's."""
    app = RateLimitMiddleware(Spy(), "1/minute", partition_by=by_header("X-API-Key"), settings=memory_settings)

    assert [200, 429] == await statuses(app, 2, headers={"x-api-key": "a"})
    assert [200, 429] == await statuses(app, 2, headers={"x-api-key": "b"})
    assert [200, 429] == await statuses(app, 2)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("ip", [200, 429, 200]), ("skip", [200, 200, 200]), ("shared", [200, 429, 429]), ("refuse", [400, 400, 400])],
)
async def test_missing_identity(mode: Any, expected: list[int]) -> None:
    """Requests without the header are counted by address, not at all,
    together, or refused with 400.
    """
    settings = memory(RATE_LIMIT_MISSING_IDENTITY=mode, REDIS_KEY_PREFIX=f"m-{mode}:")
    app = RateLimitMiddleware(Spy(), "1/minute", partition_by=by_header("x-api-key"), settings=settings)
    first, second = await statuses(app, 2), await statuses(app, 1, address="203.0.113.8")

    assert expected == first + second


async def test_user_partition(memory_settings: Settings) -> None:
    """An authenticated user is counted by identity, whatever address it comes from."""

    class User:
        is_authenticated = True
        identity = "ada"

    app = RateLimitMiddleware(Spy(), "1/minute", partition_by=by_user, settings=memory_settings)
    first = await drive(app, http_scope(user=User()))
    second = await drive(app, http_scope(user=User(), client=("198.51.100.1", 1)))

    assert [200, 429] == [first[0]["status"], second[0]["status"]]


async def test_custom_partition_of_none_leaves_the_rule(memory_settings: Settings) -> None:
    """A callable that returns None takes the request out of its rule; async ones are awaited."""

    async def tenant(conn: HTTPConnection) -> str | None:
        return conn.headers.get("x-tenant")

    app = RateLimitMiddleware(Spy(), "1/minute", partition_by=tenant, settings=memory_settings)

    assert [200] * 3 == await statuses(app, 3)
    assert [200, 429] == await statuses(app, 2, headers={"x-tenant": "t"})


async def test_client_ip_inside_a_callable_believes_the_same_proxies() -> None:
    """A user's callable that asks client_ip gets the address behind the trusted proxy."""
    settings = memory(RATE_LIMIT_TRUSTED_PROXIES="203.0.113.0/24", REDIS_KEY_PREFIX="inner:")
    seen: list[str | None] = []

    def partition(conn: HTTPConnection) -> str | None:
        seen.append(client_ip(conn))
        return seen[-1]

    app = RateLimitMiddleware(Spy(), "1/minute", partition_by=partition, settings=settings)
    await statuses(app, 1, headers={"x-forwarded-for": "6.6.6.6, 198.51.100.9"})

    assert ["198.51.100.9"] == seen


async def test_spoofed_header_changes_nothing_unless_trusted() -> None:
    """X-Forwarded-For from a peer that is not trusted buys no new counter;
    from a trusted one it names the client.
    """
    untrusting = RateLimitMiddleware(Spy(), "1/minute", settings=memory(REDIS_KEY_PREFIX="u:"))
    trusting = RateLimitMiddleware(
        Spy(), "1/minute", settings=memory(REDIS_KEY_PREFIX="v:", RATE_LIMIT_TRUSTED_PROXIES="203.0.113.7")
    )

    assert [200] == await statuses(untrusting, 1, headers={"x-forwarded-for": "1.1.1.1"})
    assert [429] == await statuses(untrusting, 1, headers={"x-forwarded-for": "2.2.2.2"})
    assert [200] == await statuses(trusting, 1, headers={"x-forwarded-for": "9.9.9.9, 1.1.1.1"})
    assert [429] == await statuses(trusting, 1, headers={"x-forwarded-for": "8.8.8.8, 1.1.1.1"})
    assert [200] == await statuses(trusting, 1, headers={"x-forwarded-for": "1.1.1.2"})


async def test_no_address_is_one_partition(memory_settings: Settings) -> None:
    """Clients of a unix socket share one counter, which is nobody else's."""
    app = RateLimitMiddleware(Spy(), "1/minute", settings=memory_settings)
    seen = [(await drive(app, http_scope(client=None)))[0]["status"] for _ in range(2)]

    assert [200, 429] == seen
    assert [200] == await statuses(app, 1)


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-api-key", b"\xff\xfe\x00")],
        [(b"x-api-key", b"k" * 1_000_000)],
        [(b"x-api-key", b"")],
        [(b"x-api-key", b"a:b{c}\r\nd")],
        [(b"x-forwarded-for", b"\xff, [::1, ,,,")],
    ],
    ids=["not UTF-8", "a megabyte", "empty", "separators", "broken forwarding"],
)
async def test_hostile_headers_have_a_defined_answer(
    memory_settings: Settings, headers: list[tuple[bytes, bytes]]
) -> None:
    """Whatever a header holds, the limit holds and nothing raises."""
    trusting = memory_settings.model_copy(update={"RATE_LIMIT_TRUSTED_PROXIES": ("203.0.113.7",)})
    app = RateLimitMiddleware(Spy(), "1/minute", partition_by=by_header("x-api-key"), settings=trusting)
    seen = [(await drive(app, http_scope(headers=headers)))[0]["status"] for _ in range(2)]

    assert [200, 429] == seen


@pytest.mark.parametrize("client", [None, (None, 0), ("", 0)])
async def test_peers_without_an_address_share(memory_settings: Settings, client: Any) -> None:
    """However a server says that it does not know,
    nothing raises and all of them are one partition.
    """
    trusting = memory_settings.model_copy(update={"RATE_LIMIT_TRUSTED_PROXIES": ("10.0.0.1",)})
    app = RateLimitMiddleware(Spy(), "1/minute", settings=trusting)
    scope = http_scope(client=client, headers=[(b"x-forwarded-for", b"1.1.1.1")])
    seen = [(await drive(app, dict(scope)))[0]["status"] for _ in range(2)]

    assert [200, 429] == seen


@pytest.mark.parametrize("host", ["1.2.3.4/x}{y z", "1.2.3.4/\ud800", "localhost", "::1/64"])
async def test_peer_text_that_is_no_address_is_hashed(memory_settings: Settings, host: str) -> None:
    """What a server believed of a header never stands in a key as it came."""
    app = RateLimitMiddleware(Spy(), "1/minute", settings=memory_settings)
    seen = [(await drive(app, http_scope(client=(host, 1))))[0]["status"] for _ in range(2)]
    scope = http_scope(client=(host, 1))
    charges = await app._plans.of(scope).charges(scope)

    assert [200, 429] == seen
    assert host.encode("utf-8", "replace") not in charges[0].partition.key
