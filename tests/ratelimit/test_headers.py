"""Header fields and documents: golden values per dialect."""

import orjson
import pytest

from redis_asgi import Decision, PolicyState
from redis_asgi.ratelimit.answers import headers, refusal_bodies
from redis_asgi.ratelimit.answers.dialects import plain_style
from redis_asgi.ratelimit.limits.decision import merged
from redis_asgi.ratelimit.limits.policy import MICROSECONDS, Policy
from redis_asgi.ratelimit.limits.reply import place_of

PLAIN = plain_style("ietf")


def state(
    name: str = "default", remaining: int = 3, reset: float = 12.2, retry: float | None = 0.0, **more: object
) -> PolicyState:
    """A policy of 10 per minute as a client stands to it."""
    strategy = str(more.get("strategy", "fixed-window"))
    return PolicyState(name, 10, 60, remaining, reset, retry, bool(more.get("shadow")), strategy)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (state(), b'"default";r=3;t=13'),
        (state(remaining=10, reset=0.0), b'"default";r=10;t=60'),
        (state(remaining=0, retry=12.2), b'"default";r=0;t=13'),
        (state(strategy="gcra", remaining=3, reset=42.0), b'"default";r=3;t=60'),
        (state(strategy="gcra", remaining=0, reset=60.0, retry=5.1), b'"default";r=0;t=6'),
        (state(strategy="moving-window", remaining=0, reset=60.0, retry=0.0), b'"default";r=0;t=60'),
        (state(strategy="sliding-window-counter", remaining=0, reset=99.0, retry=0.3), b'"default";r=0;t=1'),
    ],
    ids=["open window", "untouched", "used up", "bucket with rest", "empty bucket", "peeked", "rounded up"],
)
def test_effective_window(policy: PolicyState, expected: bytes) -> None:
    """``t`` runs to a fixed window's end;
    otherwise to the next unit when none is left, else it is the window.
    """
    assert expected == dict(headers.ietf_fields([policy]))[b"ratelimit"]


def test_lists_join_with_comma_and_space() -> None:
    """Canonical structured-field lists: members joined by ", ", parameters without a space."""
    assert [
        (b"ratelimit-policy", b'"a";q=10;w=60, "b";q=10;w=60'),
        (b"ratelimit", b'"a";r=3;t=13, "b";r=0;t=13'),
    ] == headers.ietf_fields([state("a"), state("b", 0)])


def test_shadow_policies_and_nobodys_decisions_send_nothing() -> None:
    """A shadow is in no field, nor is a decision that nobody took."""
    assert [] == headers.limit_fields(Decision(True, "redis", None, (state(shadow=True),)), "both")
    assert [] == headers.limit_fields(Decision(True, "none"), "ietf")


def test_fields_from_numbers_equal_fields_from_states() -> None:
    """What a strategy's reply gives is what the states in it give;
    a shadow is no client's business.
    """
    policies = [Policy("a", 10, 60), Policy("s", 5, 1, "gcra", True), Policy("g", 10, 60, "gcra")]
    reply = [1, 1, 3, 12_200_000, 0, 0, 0, 0, 1_000_000, 200_000, 0, 1, 0, 60_000_000, 5_100_000, 0]
    states = [state("a"), state("g", 0, 60.0, 5.1, strategy="gcra")]
    members = headers.Members((place_of(i), policy) for i, policy in enumerate(policies))

    assert headers.ietf_fields(states) == members.fields(reply)
    assert (b"ratelimit-policy", b'"a";q=10;w=60, "g";q=10;w=60') == members.fields(reply)[0]


@pytest.mark.parametrize(
    ("states", "violated", "expected"),
    [
        ([state("a", 9), state("b", 2, 30.0)], (), (b"10", b"2", b"1030")),
        ([state("a", 0, 5.0, 5.0), state("b", 0, 50.0, 50.0)], ("a", "b"), (b"10", b"0", b"1050")),
        ([state("a", 4, 5.0, None), state("b", 0, 50.0, 50.0)], ("a", "b"), (b"10", b"4", b"1005")),
    ],
    ids=["least left", "longest wait", "can never fit"],
)
def test_legacy_speaks_for_one_policy(
    states: list[PolicyState], violated: tuple[str, ...], expected: tuple[bytes, ...]
) -> None:
    """The violated policy with the longest wait,
    else the one with the least left; the reset is epoch seconds.
    """
    fields = dict(headers.legacy_fields(states, violated, now=1000.0))

    assert expected == tuple(fields.values())


def test_retry_after_is_never_early_and_at_least_one() -> None:
    """Whole seconds, rounded up; a cost that can never fit has none."""
    waits = [0.0001, 1.0, 1.0001, 59.999]

    assert [1, 1, 2, 60] == [headers.whole_seconds(wait) for wait in waits]
    assert [(b"cache-control", b"no-store")] == headers.refusal_fields(Decision(False, "redis"))


def test_problem_documents() -> None:
    """The draft's types, RFC 9457's members, and no word about the client."""
    refused = Decision(False, "redis", 22.2, (state(remaining=0, retry=22.2),), ("default",))
    problem = orjson.loads(refusal_bodies.quota_exceeded(refused))

    assert {
        "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "title": "Too Many Requests",
        "status": 429,
        "detail": "Rate limit exceeded: 10 per 60 s. Retry in 23 s.",
        "violated-policies": ["default"],
    } == problem
    assert orjson.loads(refusal_bodies.reduced_capacity(PLAIN))["type"].endswith("#temporary-reduced-capacity")
    assert "header 'x-api-key'" in orjson.loads(refusal_bodies.identity_missing("header:x-api-key", PLAIN))["detail"]


def test_rendered_refusal_equals_the_long_way() -> None:
    """What a flood gets is what a first refusal gets."""
    policy = Policy("default", 10, 60)
    fields, body = refusal_bodies.rendered_refusal(policy, 0, 22_200_000, 22_200_000, PLAIN)
    refused = Decision(False, "redis", 22.2, (state(remaining=0, reset=22.2, retry=22.2),), ("default",))

    assert refusal_bodies.quota_exceeded(refused) == body
    assert (
        headers.limit_fields(refused, "ietf")
        + headers.refusal_fields(refused)
        + refusal_bodies.content_fields(body, PLAIN)
        == fields
    )
    assert 23 * MICROSECONDS >= 22_200_000


def test_merged_decisions() -> None:
    """Admitted only if all admit; the longest wait;
    degraded if one is; None once one can never fit.
    """
    yes = Decision(True, "redis", None, (state("a"),))
    no = Decision(False, "local", 5.0, (state("b", 0, 5.0, 5.0),), ("b",))
    never = Decision(False, "redis", None, (state("c", 3, 5.0, None),), ("c",))

    assert (False, 5.0, ("b",), True) == (
        merged([yes, no]).allowed,
        merged([yes, no]).retry_after,
        merged([yes, no]).violated,
        merged([yes, no]).degraded,
    )
    assert merged([no, never]).retry_after is None
    assert yes is merged([yes])
