"""Header fields: pure functions, one per style; `dialects` has what services of models add.

``RateLimit`` and ``RateLimit-Policy`` follow draft-ietf-httpapi-ratelimit-headers-11 (May 2026):
structured-field lists (RFC 9651) of named policies.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from starlette.types import Message

from ...settings import HeaderStyle
from ..counting.verdict import Verdict
from ..limits.charge import Charges
from ..limits.clock import CLOCK
from ..limits.decision import Decision, PolicyState, merged
from ..limits.policy import MICROSECONDS, Policy, PolicySet
from ..limits.reply import place_of
from .dialects import FIELDS_OF_DIALECTS, AnswerStyle, Dialect, Fields


def whole_seconds(seconds: float) -> int:
    """Seconds as a header may say them: rounded up,
    so never earlier than the truth, and at least 1.
    """
    return max(1, math.ceil(seconds))


class Members:
    """The policies that ``RateLimit-Policy`` and ``RateLimit`` tell of,
    a member each (draft-11, sections 3 and 4).

    Args:
        policies: Each with the place of its numbers: remaining, and reset and retry in us, where 0
            is "now", and less is "never". Shadows are left out. Names need no escapes in a
            structured-field string.
    """

    __slots__ = ("_policies", "_shown", "_template")

    def __init__(self, policies: "Iterable[tuple[int, Policy | PolicyState]]") -> None:
        shown = [(place, policy) for place, policy in policies if not policy.shadow]
        members = ", ".join(f'"{policy.name}";q={policy.quota};{_unit(policy)}' for _, policy in shown)
        self._policies = (b"ratelimit-policy", members.encode())
        # The end of those in flight cannot be known.
        told = (f'"{policy.name}";r=%d;t=%d' if policy.window else f'"{policy.name}";r=%d' for _, policy in shown)
        self._template = ", ".join(told).encode()
        self._shown = tuple((place, policy.strategy == "fixed-window", policy.window) for place, policy in shown)

    def fields(self, numbers: Sequence[int]) -> Fields:
        """The fields that say *numbers*; none when all policies are shadows.

        The draft's ``t`` is the seconds within which no more than the remaining units can be used:
        to a fixed window's end; for the others until more is admitted when nothing is left, else
        the window.
        """
        values: tuple[int, ...] = ()
        for at, is_fixed, window in self._shown:
            remaining = numbers[at]
            if not window:
                values += (remaining,)
                continue
            left = numbers[at + 1] if is_fixed else 0 if remaining else numbers[at + 2]
            values += remaining, (left + 999_999) // 1_000_000 or window
        return [self._policies, (b"ratelimit", self._template % values)] if values else []


def _unit(policy: Policy | PolicyState) -> str:
    """The unit of *policy*'s quota: the draft's default in a window,
    or its unit for requests in flight.
    """
    return f"w={policy.window}" if policy.window else 'qu="concurrent-requests"'


def ietf_fields(states: Sequence[PolicyState]) -> Fields:
    """``RateLimit-Policy`` and ``RateLimit`` of what a decision says."""
    numbers: list[int] = []
    for state in states:
        numbers += (
            state.remaining,
            round(state.reset * MICROSECONDS),
            round((state.retry_after or 0.0) * MICROSECONDS),
        )
    return Members((3 * i, state) for i, state in enumerate(states)).fields(numbers)


@lru_cache(maxsize=4096)
def _members(sets: tuple[PolicySet, ...]) -> Members:
    policies = (policy for policies in sets for policy in policies)
    return Members((place_of(i), policy) for i, policy in enumerate(policies))


def renderer(charges: Charges) -> Callable[[Sequence[int]], Fields]:
    """A function that makes the fields of a reply to *charges*."""
    return _members(charges.sets).fields


def renderer_of(style: HeaderStyle) -> Callable[[Charges], Callable[[Sequence[int]], Fields]] | None:
    """`renderer`, for a *style* whose fields depend on the reply alone;
    others are made when they are sent.
    """
    return renderer if style == "ietf" else None


def fields_of(first: Verdict, style: AnswerStyle) -> Fields:
    """The header fields of a request's *first* verdict and all more,
    in the configured style. Do not change them.
    """
    if first.rendered is not None and not first.more and style.is_plain:
        alone: Fields = first.rendered
        return alone
    fields = _standard_fields(first, style.headers)
    if style.dialect is None:
        return fields
    if first.reply is not None and not first.more and first.source != "none":
        return fields + _teller(style.dialect, first.charges.sets)(first.reply, CLOCK.unix())
    return fields + dialect_fields(merged([verdict.decision for verdict in first.all]), style.dialect)


def dialect_fields(decision: Decision, dialect: Dialect | None) -> Fields:
    """The fields of a decision that *dialect* adds to the standard ones."""
    if dialect is None or decision.source == "none":
        return []
    return dialect.fields(decision.policies, CLOCK.unix())


@lru_cache(maxsize=4096)
def _teller(dialect: Dialect, sets: tuple[PolicySet, ...]) -> Callable[[Sequence[int], float], Fields]:
    policies = (policy for policies in sets for policy in policies)
    return dialect.teller((place_of(i), policy) for i, policy in enumerate(policies))


def _standard_fields(first: Verdict, style: HeaderStyle) -> Fields:
    told: list[Fields] = []
    for verdict in first.all:
        if style != "ietf" or verdict.reply is None:
            return limit_fields(merged([verdict.decision for verdict in first.all]), style)
        if verdict.rendered is None:
            verdict.rendered = renderer(verdict.charges)(verdict.reply)
        if verdict.rendered:
            told.append(verdict.rendered)
    if len(told) < 2:
        return told[0] if told else []
    # The members of each, in lists of the same names.
    return [(same[0][0], b", ".join([members for _, members in same])) for same in zip(*told, strict=True)]


def legacy_fields(states: Sequence[PolicyState], violated: Sequence[str], *, now: float) -> Fields:
    """``X-RateLimit-Limit``, ``-Remaining`` and ``-Reset`` of the one policy that matters most.

    The violated one with the longest wait,
    else the one with the least of its quota left. The reset is epoch seconds.
    """
    if not states:
        return []
    refusing = [state for state in states if state.name in violated]
    if refusing:
        state = max(refusing, key=lambda s: math.inf if s.retry_after is None else s.retry_after)
        until = state.retry_after or state.reset
    else:
        state = min(states, key=lambda s: s.remaining / max(1, s.quota))
        until = state.reset
    return [
        (b"x-ratelimit-limit", str(state.quota).encode()),
        (b"x-ratelimit-remaining", str(state.remaining).encode()),
        (b"x-ratelimit-reset", str(math.ceil(now + until)).encode()),
    ]


def limit_fields(decision: Decision, style: HeaderStyle) -> Fields:
    """The fields of a decision in the configured style;
    none for shadow policies or when no engine decided.
    """
    if style == "none" or decision.source == "none":
        return []
    states = [state for state in decision.policies if not state.shadow]
    fields = ietf_fields(states) if style != "legacy" else []
    if style != "ietf":
        fields += legacy_fields(states, decision.violated, now=CLOCK.unix())
    return fields


def with_fields(message: Message, fields: Fields) -> Message:
    """The start of a response with *fields* after its own headers;
    one whose name it has already is left out.
    """
    theirs = message.get("headers") or ()
    if type(theirs) is not list:
        theirs = list(theirs)  # an app may pass what can be read only once
    for name, _ in theirs:
        if name in _OURS:
            names = dict(theirs)
            fields = [field for field in fields if field[0] not in names]
            break
    with_ours = {**message}
    with_ours["headers"] = theirs + fields
    return with_ours


_OURS = frozenset(
    (
        b"ratelimit-policy",
        b"ratelimit",
        b"x-ratelimit-limit",
        b"x-ratelimit-remaining",
        b"x-ratelimit-reset",
        b"cache-control",
        b"retry-after",
        *FIELDS_OF_DIALECTS,
    )
)


def refusal_fields(decision: Decision, dialect: Dialect | None = None) -> Fields:
    """``Retry-After``, if waiting helps, and ``Cache-Control``:
    RFC 6585 forbids caches to store a 429.

    And what *dialect* adds.
    """
    fields = [(b"cache-control", b"no-store")]
    if decision.retry_after is not None:
        fields.append((b"retry-after", str(whole_seconds(decision.retry_after)).encode()))
    return fields if dialect is None else fields + dialect.refusal_fields(decision.retry_after)
