"""Dialects of fields and refusals, as values, and the argument that chooses one."""

import math
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # it has no types of its own
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redis_asgi import (
    ConfigurationError,
    PolicyState,
    RateLimitMiddleware,
    rate_limit_responses,
)
from redis_asgi.ratelimit.answers.dialects import (
    DIALECTS,
    Refused,
    go_duration,
    reply,
    status_for,
    utc_time,
)

from .harness import Spy, memory

OPENAI, ANTHROPIC, MCP = (DIALECTS[name] for name in ("openai", "anthropic", "mcp"))


def state(name: str, quota: int = 60, window: int = 60, *, left: int = 59, reset: float = 0.012) -> PolicyState:
    """A policy as a client stands to it."""
    return PolicyState(name, quota, window, left, reset, 0.0, False, "fixed-window")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "0s"),
        (0.0000001, "0s"),
        (0.000001, "1ms"),
        (0.012, "12ms"),
        (0.0120001, "12ms"),
        (0.012001, "13ms"),
        (0.9991, "1s"),
        (1.0, "1s"),
        (1.5, "1.5s"),
        (7.66, "7.66s"),
        (59.9999, "1m0s"),
        (60.0, "1m0s"),
        (60.052, "1m0.052s"),
        (360.0, "6m0s"),
        (3600.0, "1h0m0s"),
        (3661.5, "1h1m1.5s"),
        (86_400.0, "24h0m0s"),
        (366 * 86_400.0, "8784h0m0s"),
    ],
)
def test_durations_are_as_go_writes_them(seconds: float, expected: str) -> None:
    """Hours, minutes and seconds from the first that is not 0 on;
    below a second whole milliseconds.
    """
    assert expected == go_duration(seconds)


@given(st.integers(0, 400 * 86_400 * 1_000_000))
def test_durations_are_never_earlier_than_the_truth(us: int) -> None:
    """Read back, a duration is what it was rounded up to the millisecond."""
    text = go_duration(us / 1_000_000)
    ms = 0.0
    for unit, scale in (("ms", 1), ("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        before, found, rest = text.partition(unit)
        if found and (unit != "m" or not rest.startswith("s") or before):
            ms, text = ms + float(before) * scale, rest

    assert ("", math.ceil(us / 1000)) == (text, round(ms))


@pytest.mark.parametrize(
    ("unix", "expected"),
    [
        (0.0, "1970-01-01T00:00:00Z"),
        (1_795_953_600.0, "2026-11-29T12:00:00Z"),
        (1_795_953_600.1, "2026-11-29T12:00:01Z"),
    ],
)
def test_times_are_in_utc(unix: float, expected: str) -> None:
    """RFC 3339 with a Z, rounded up to a second."""
    assert expected == utc_time(unix)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([], None),
        ([state("other"), state("tokens2"), state("tokens-per-key"), state("tokens-61s")], None),
        ([state("tokens")], "tokens"),
        ([state("tokens-60s", left=9), state("tokens-86400s", 1000, 86_400, left=8)], "tokens-86400s"),
        ([state("tokens-60s", left=9), state("tokens-86400s", 1000, 86_400, left=10)], "tokens-60s"),
        ([state("tokens-60s", left=0, reset=5.0), state("tokens-1s", 9, 1, left=0, reset=0.5)], "tokens-60s"),
    ],
)
def test_of_several_windows_the_one_with_the_least_left_is_told(
    states: list[PolicyState], expected: str | None
) -> None:
    """Of policies of one rule, and of no other, the one with the fewest units;
    of equals the one that is full last.
    """
    found = dict(OPENAI.fields(states, 0.0))
    told = next((each for each in states if each.name == expected), None)

    assert (None if told is None else b"%d" % told.quota) == found.get(b"x-ratelimit-limit-tokens")
    assert (None if told is None else b"%d" % told.remaining) == found.get(b"x-ratelimit-remaining-tokens")


def test_fields_of_openai() -> None:
    """Three of each rule called requests or tokens; the reset until the quota is full."""
    states = [state("requests"), state("tokens", 150_000, left=149_984, reset=0.006), state("input-tokens")]

    assert {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"12ms",
        b"x-ratelimit-limit-tokens": b"150000",
        b"x-ratelimit-remaining-tokens": b"149984",
        b"x-ratelimit-reset-tokens": b"6ms",
    } == dict(OPENAI.fields(states, 0.0))


def test_fields_of_anthropic() -> None:
    """Three of each of four rules; the reset as a time."""
    found = dict(ANTHROPIC.fields([state("requests"), state("output-tokens", 8000, left=7000)], 1_795_953_600.0))

    assert {
        b"anthropic-ratelimit-requests-limit": b"60",
        b"anthropic-ratelimit-requests-remaining": b"59",
        b"anthropic-ratelimit-requests-reset": b"2026-11-29T12:00:01Z",
        b"anthropic-ratelimit-output-tokens-limit": b"8000",
        b"anthropic-ratelimit-output-tokens-remaining": b"7000",
        b"anthropic-ratelimit-output-tokens-reset": b"2026-11-29T12:00:01Z",
    } == found
    assert [] == MCP.fields([state("requests")], 0.0)


@pytest.mark.parametrize(
    ("wait", "expected"),
    [
        (0.0, {b"retry-after-ms": b"1"}),
        (0.0121, {b"retry-after-ms": b"13"}),
        (60.0, {b"retry-after-ms": b"60000"}),
        (60.001, {b"retry-after-ms": b"60001", b"x-should-retry": b"false"}),
        (None, {b"x-should-retry": b"false"}),
    ],
)
def test_clients_are_kept_from_sleeping_for_long(wait: float | None, expected: dict[bytes, bytes]) -> None:
    """A wait of more than a minute, or one without an end, is no reason to ask again."""
    assert expected == dict(OPENAI.refusal_fields(wait)) == dict(ANTHROPIC.refusal_fields(wait))
    assert [] == MCP.refusal_fields(wait)


REFUSED = Refused(429, "Rate limit exceeded: 9 per 60 s. Retry in 7 s.", "tokens", 6.2)


TEXT = "Rate limit exceeded: 9 per 60 s. Retry in 7 s. Limit: tokens."


UNDECIDED = Refused(503, "Later.", None, 1.0)


MISSING = Refused(400, "This request needs the header 'x-api-key'.")


@pytest.mark.parametrize(
    ("dialect", "refused", "expected"),
    [
        (
            "openai",
            REFUSED,
            {"error": {"message": TEXT, "type": "tokens", "param": None, "code": "rate_limit_exceeded"}},
        ),
        (
            "openai",
            UNDECIDED,
            {"error": {"message": "Later.", "type": "server_error", "param": None, "code": None}},
        ),
        (
            "openai",
            MISSING,
            {"error": {"message": MISSING.message, "type": "invalid_request_error", "param": None, "code": None}},
        ),
        ("anthropic", REFUSED, {"type": "error", "error": {"type": "rate_limit_error", "message": TEXT}}),
        ("anthropic", UNDECIDED, {"type": "error", "error": {"type": "api_error", "message": "Later."}}),
        (
            "anthropic",
            MISSING,
            {"type": "error", "error": {"type": "invalid_request_error", "message": MISSING.message}},
        ),
        (
            "mcp",
            REFUSED,
            {"jsonrpc": "2.0", "error": {"code": -32000, "message": TEXT, "data": {"retry_after": 7}}, "id": None},
        ),
        (
            "mcp",
            MISSING,
            {
                "jsonrpc": "2.0",
                "error": {"code": -32000, "message": MISSING.message, "data": {"retry_after": None}},
                "id": None,
            },
        ),
    ],
)
def test_bodies(dialect: str, refused: Refused, expected: dict[str, Any]) -> None:
    """The body of each status in each dialect."""
    assert expected == orjson.loads(DIALECTS[dialect].body(refused))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("refused", [REFUSED, UNDECIDED, MISSING])
def test_bodies_are_as_documented(dialect: Any, refused: Refused) -> None:
    """The schema that OpenAPI is given is true of each."""
    content = rate_limit_responses(dialect=dialect)[429]["content"]

    jsonschema.validate(orjson.loads(DIALECTS[dialect].body(refused)), content["application/json"]["schema"])


@given(st.one_of(st.text(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False, allow_infinity=False)))
def test_an_id_is_told_as_it_came(request_id: object) -> None:
    """Text and numbers, whatever they are."""
    try:
        orjson.dumps(request_id)
    except orjson.JSONEncodeError:  # half of a surrogate pair, which no JSON in UTF-8 has
        return
    answer = orjson.loads(reply(MCP.body(REFUSED), request_id))

    assert request_id == answer["id"]
    assert TEXT == answer["error"]["message"]


@pytest.mark.parametrize("request_id", [None, True, [1], {"id": 1}])
def test_what_is_no_id_is_null(request_id: object) -> None:
    """A bool is no number, and a list no name."""
    assert orjson.loads(reply(MCP.body(REFUSED), request_id))["id"] is None


@pytest.mark.parametrize(
    ("method", "revision", "status", "expected"),
    [
        ("POST", "2025-06-18", 429, 200),
        ("POST", "2026-07-27", 503, 200),
        ("POST", "", 400, 200),
        ("POST", "latest", 429, 200),
        ("POST", "DRAFT-2026-v1", 429, 200),
        ("POST", "2026-07-28", 429, 429),
        ("POST", "2027-01-01", 503, 503),
        ("GET", "2025-06-18", 429, 429),
        ("DELETE", "", 429, 429),
    ],
)
def test_older_clients_of_mcp_keep_their_session(method: str, revision: str, status: int, expected: int) -> None:
    """A status other than 200 would end it; who does not POST waits for no JSON-RPC answer."""
    assert expected == status_for(method, revision, status)


# the argument


@pytest.mark.parametrize(
    ("dialect", "words"),
    [
        ("open-ai", ["dialect='open-ai'", "openai, anthropic, mcp", "Try 'openai'"]),
        ("", ["dialect=''", "openai, anthropic, mcp"]),
        ({}, ["dialect={}", "openai, anthropic, mcp", "/v1/*"]),
        (3, ["dialect=3", "openai, anthropic, mcp"]),
        (["openai"], ["dialect=['openai']", "mapping"]),
        ({"/v1/*": "gemini"}, ["dialect['/v1/*']='gemini'", "openai, anthropic, mcp"]),
        ({"/v1/*": None}, ["dialect['/v1/*']=None", "openai, anthropic, mcp"]),
        ({"v1": "openai"}, ["'v1'", "does not start with '/'"]),
        ({"/{id}": "openai"}, ["'/{id}'", "/*"]),
        ({3: "openai"}, ["3", "no path pattern"]),
    ],
)
def test_what_cannot_be_a_dialect_is_told(dialect: Any, words: list[str]) -> None:
    """The value, and what it could be."""
    with pytest.raises(ConfigurationError) as caught:
        RateLimitMiddleware(Spy(), "1/minute", dialect=dialect, settings=memory())

    assert [] == [word for word in words if word not in str(caught.value)]
