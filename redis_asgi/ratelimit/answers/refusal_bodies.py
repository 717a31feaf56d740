"""The bodies of refusals: problem documents, or what a dialect says in their place.

Problem types are those of draft-ietf-httpapi-ratelimit-headers-11 (May 2026); their format is
RFC 9457.
"""

from functools import lru_cache

from ...asgi.problem import CONTENT_TYPE, problem
from ..limits.decision import Decision, PolicyState, policy_state, refusal_of
from ..limits.policy import Policy
from .dialects import AnswerStyle, Fields, Refused, rule_of
from .headers import dialect_fields, limit_fields, refusal_fields, whole_seconds

UNDECIDED = "The rate limit cannot be checked right now. Retry in 1 s."
_TYPES = "https://iana.org/assignments/http-problem-types#"


def refusal_detail(decision: Decision) -> str:
    """One sentence or two for a person: limit, window and wait; never who asked."""
    state = _worst(decision)
    if state is None:
        return "Rate limit exceeded."
    if state.retry_after is None:
        if state.quota == 0:
            return "The quota is 0: no request is admitted."
        return f"The cost of this request is more than the quota of {state.quota} and can never fit."
    wait = whole_seconds(decision.retry_after or 0.0)
    quota = f"{state.quota} per {state.window} s" if state.window else f"{state.quota} requests in flight"
    return f"Rate limit exceeded: {quota}. Retry in {wait} s."


def _worst(decision: Decision) -> PolicyState | None:
    """The policy that refuses for the longest."""
    refusing = [state for state in decision.policies if state.name in decision.violated]
    never = [state for state in refusing if state.retry_after is None]
    if never:
        return min(never, key=lambda s: s.quota)
    return max(refusing, key=lambda s: s.retry_after or 0.0, default=None)


def refusal_body(decision: Decision, style: AnswerStyle, held: str = "") -> bytes:
    """The body of a 429; *held* as of `quota_exceeded`."""
    if style.dialect is None:
        return quota_exceeded(decision, held)
    return style.dialect.body(refused_by(decision, refusal_detail(decision) + held))


def refused_by(decision: Decision, message: str) -> Refused:
    """The words of a dialect about a 429 by *decision*."""
    worst = _worst(decision)
    return Refused(429, message, None if worst is None else rule_of(worst), decision.retry_after)


def quota_exceeded(decision: Decision, held: str = "") -> bytes:
    """The body of a 429: the draft's ``quota-exceeded`` problem.

    Args:
        held: What is to be said of who holds the quota, see `held_words`.
    """
    return _quota_exceeded(refusal_detail(decision) + held, decision.violated)


def held_words(units: int) -> str:
    """The words about *units* that requests hold whose cost is known after their answers: some may
    come back.
    """
    return f" Requests in flight in this process hold {units} of it." if units else ""


def content_fields(body: bytes, style: AnswerStyle) -> Fields:
    """The fields that say how to read the body of a refusal."""
    kind = CONTENT_TYPE if style.dialect is None else b"application/json"
    return [(b"content-type", kind), (b"content-length", b"%d" % len(body))]


def rendered_refusal(
    policy: Policy, remaining: int, reset: int, retry: int, style: AnswerStyle, held: str = ""
) -> tuple[Fields, bytes]:
    """All header fields and the body of a 429 by one policy;
    *reset* and *retry* in us, *held* as `held_words` says.
    """
    state = policy_state(policy, remaining, reset, retry)
    decision = refusal_of((state,), (state,), "redis")
    body = refusal_body(decision, style, held)
    fields = limit_fields(decision, style.headers) + dialect_fields(decision, style.dialect)
    return fields + refusal_fields(decision, style.dialect) + content_fields(body, style), body


@lru_cache(maxsize=1024)
def _quota_exceeded(detail: str, violated: tuple[str, ...]) -> bytes:
    return problem(429, detail, _TYPES + "quota-exceeded", violated_policies=violated)


def reduced_capacity(style: AnswerStyle) -> bytes:
    """The body of a 503 while a rule that fails closed cannot be decided:
    ``temporary-reduced-capacity``.
    """
    if style.dialect is not None:
        return style.dialect.body(Refused(503, UNDECIDED, None, 1.0))
    return problem(503, UNDECIDED, _TYPES + "temporary-reduced-capacity")


def identity_missing(what: str, style: AnswerStyle) -> bytes:
    """The body of a 400: a rule counts by *what*, the request has none,
    and the setting says to refuse.
    """
    kind, _, name = what.partition(":")
    needed = f"the header {name!r}" if kind == "header" else "an authenticated user"
    detail = f"This request needs {needed}."
    if style.dialect is not None:
        return style.dialect.body(Refused(400, detail))
    return problem(400, detail)
