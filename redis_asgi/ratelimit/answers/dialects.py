"""Dialects: what a limit says, in the fields and bodies that clients of language models and of
tools read.

``openai`` and ``anthropic`` tell of the rules that are called as those services call theirs, and
refuse with the bodies that their SDKs make exceptions of; ``mcp`` refuses with a JSON-RPC error.
All of it is pure functions of what was decided, the time of day given.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, ClassVar, Literal, TypeAlias

import orjson

from ...settings import HeaderStyle
from ..limits.decision import PolicyState
from ..limits.policy import MICROSECONDS, Policy

Fields: TypeAlias = list[tuple[bytes, bytes]]
DialectName = Literal["openai", "anthropic", "mcp"]

# The SDKs wait for as long as they are told, asleep,
# or ask three times where they are told nothing (s).
LONGEST_RETRY = 60.0
# The answer of a remembered refusal that says milliseconds is made anew this often (s).
SHORTEST_KEPT = 0.1
NUMBERS = ("limit", "remaining", "reset")
RETRY_AFTER_MS, SHOULD_RETRY = b"retry-after-ms", b"x-should-retry"
_JSON_RPC_ERROR = -32000
_NO_ID = b'"id":null}'
# The first revision of MCP whose clients take a 429 for the answer to one request,
# not for the end of their session.
_STATUS_SINCE = "2026-07-28"
_REVISION = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True, slots=True)
class Refused:
    """The words to a client that gets an answer in place of the app's.

    Attributes:
        status: 429, 503 or 400.
        message: A sentence or two for a person; never who asked.
        limit: The name of the rule that refuses; ``None`` where no limit does.
        retry_after: Seconds until it is worth another try; ``None`` = never.
    """

    status: int
    message: str
    limit: str | None = None
    retry_after: float | None = None

    @property
    def text(self) -> str:
        """The message, and which limit it is about."""
        return self.message if self.limit is None else f"{self.message} Limit: {self.limit}."


class Dialect:
    """One dialect.

    Attributes:
        name: How it is chosen.
        pattern: The name of its fields,
            of the ``number`` that one tells and the ``kind`` of rule that it is about.
        kinds: The names of the rules that its fields tell of.
        names_request: Whether its bodies name the request that they answer,
            which stands in the request's body.
    """

    name: ClassVar[DialectName]
    pattern: ClassVar[str] = ""
    kinds: ClassVar[tuple[str, ...]] = ()
    names_request: ClassVar[bool] = False

    def __init__(self) -> None:
        self.field_names = {
            kind: tuple(self.pattern.format(kind=kind, number=number) for number in NUMBERS) for kind in self.kinds
        }
        self._told = tuple((kind, tuple(name.encode() for name in names)) for kind, names in self.field_names.items())

    def __repr__(self) -> str:
        return f"<dialect {self.name}>"

    def fields(self, states: Sequence[PolicyState], now: float) -> Fields:
        """The fields that tell of *states*; *now* is Unix time in seconds."""
        numbers: list[int] = []
        for state in states:
            numbers += state.remaining, round(state.reset * MICROSECONDS)
        return self.teller((2 * i, state) for i, state in enumerate(states))(numbers, now)

    def teller(
        self, policies: "Iterable[tuple[int, Policy | PolicyState]]"
    ) -> Callable[[Sequence[int], float], Fields]:
        """A function that makes the fields of numbers.

        Args:
            policies: Each with the place of its numbers: what remains,
                and the reset in us. Shadows are left out.
        """
        enforcing = [(place, policy) for place, policy in policies if not policy.shadow]
        told = [
            (names, [(place, b"%d" % policy.quota) for place, policy in enforcing if kind in _names_of(policy)])
            for kind, names in self._told
        ]
        kept = [(names, places) for names, places in told if places]

        def fields(numbers: Sequence[int], now: float) -> Fields:
            found: Fields = []
            for names, places in kept:
                # The fewest units; of equals the one that is full last.
                left, later, quota = min((numbers[place], -numbers[place + 1], quota) for place, quota in places)
                found += (
                    (names[0], quota),
                    (names[1], b"%d" % left),
                    (names[2], self._reset(-later / MICROSECONDS, now).encode()),
                )
            return found

        return fields

    def _reset(self, seconds: float, now: float) -> str:
        raise NotImplementedError

    def refusal_fields(self, retry_after: float | None) -> Fields:
        """The fields of a refusal beside ``Retry-After``;
        *retry_after* is in seconds, ``None`` = never.
        """
        found: Fields = []
        if retry_after is not None:
            found.append((RETRY_AFTER_MS, b"%d" % max(1, _milliseconds(retry_after))))
        if retry_after is None or retry_after > LONGEST_RETRY:
            found.append((SHOULD_RETRY, b"false"))
        return found

    def body(self, refused: Refused) -> bytes:
        """The body of a refusal, as ``application/json``."""
        return orjson.dumps(self._body(refused))

    def _body(self, refused: Refused) -> Mapping[str, Any]:
        raise NotImplementedError


class OpenAI(Dialect):
    """The reset, until the quota is full, is a duration as Go has it."""

    name = "openai"
    pattern = "x-ratelimit-{number}-{kind}"
    kinds = ("requests", "tokens")

    def _reset(self, seconds: float, now: float) -> str:
        del now
        return go_duration(seconds)

    def _body(self, refused: Refused) -> Mapping[str, Any]:
        kinds = {429: (refused.limit, "rate_limit_exceeded"), 503: ("server_error", None)}
        kind, code = kinds.get(refused.status, ("invalid_request_error", None))
        return {"error": {"message": refused.text, "type": kind, "param": None, "code": code}}


class Anthropic(Dialect):
    """The reset is a time in UTC."""

    name = "anthropic"
    pattern = "anthropic-ratelimit-{kind}-{number}"
    kinds = ("requests", "tokens", "input-tokens", "output-tokens")

    def _reset(self, seconds: float, now: float) -> str:
        return utc_time(now + seconds)

    def _body(self, refused: Refused) -> Mapping[str, Any]:
        kind = {429: "rate_limit_error", 503: "api_error"}.get(refused.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": refused.text}}


class MCP(Dialect):
    """A JSON-RPC error with the request's id, see `reply`; no fields of its own."""

    name = "mcp"
    names_request = True

    def refusal_fields(self, retry_after: float | None) -> Fields:
        del retry_after
        return []

    def _body(self, refused: Refused) -> Mapping[str, Any]:
        wait = None if refused.retry_after is None else max(1, math.ceil(refused.retry_after))
        error = {"code": _JSON_RPC_ERROR, "message": refused.text, "data": {"retry_after": wait}}
        return {"jsonrpc": "2.0", "error": error, "id": None}


DIALECTS: Mapping[str, Dialect] = {each.name: each for each in (OpenAI(), Anthropic(), MCP())}


# Whatever a dialect may add to an answer.
FIELDS_OF_DIALECTS = frozenset(
    [RETRY_AFTER_MS, SHOULD_RETRY]
    + [name.encode() for each in DIALECTS.values() for names in each.field_names.values() for name in names]
)


@dataclass(frozen=True, slots=True)
class AnswerStyle:
    """The style in which a middleware speaks to the client of one request.

    Attributes:
        headers: Which of the standard fields it writes.
        dialect: Adds fields of its own and writes the bodies of refusals; ``None`` = problem
            documents.
        body_cap: The most that is read of a request's body for the name that the client gives it,
            in bytes.
        is_plain: Whether its fields are those that are made ready with every reply, and no others.
        names_request: As of its dialect.
    """

    headers: HeaderStyle
    dialect: Dialect | None = None
    body_cap: int = 0
    is_plain: bool = field(init=False, compare=False)
    names_request: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names_request", self.dialect is not None and self.dialect.names_request)
        object.__setattr__(self, "is_plain", self.headers == "ietf" and self.dialect is None)


@lru_cache(maxsize=4)
def plain_style(headers: HeaderStyle) -> AnswerStyle:
    """The style without a dialect."""
    return AnswerStyle(headers)


def rule_of(policy: Policy | PolicyState) -> str:
    """The rule's name that a policy has its own from: one of several windows is ``name-<window>s``."""
    return policy.name.removesuffix(f"-{policy.window}s")


def _names_of(policy: Policy | PolicyState) -> tuple[str, str]:
    return policy.name, rule_of(policy)


def _milliseconds(seconds: float) -> int:
    # By way of the microseconds that they were: 0.012 is 12 ms.
    return -(-round(seconds * MICROSECONDS) // 1000)


def go_duration(seconds: float) -> str:
    """*seconds*, 0 or more, as Go writes them, rounded up to a millisecond:
    ``0s``, ``12ms``, ``1m0.052s``.
    """
    whole, rest = divmod(_milliseconds(seconds), 1000)
    if whole == 0 and rest:
        return f"{rest}ms"
    minutes, last = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{last}.{rest:03d}".rstrip("0") if rest else str(last)
    before = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{before}{text}s"


def utc_time(unix: float) -> str:
    """A Unix time in seconds as RFC 3339 has it, rounded up to a second: ``2026-11-29T12:00:00Z``."""
    return datetime.fromtimestamp(math.ceil(unix), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def reply(body: bytes, request_id: object) -> bytes:
    """The *body* of a JSON-RPC error as the answer to the request of that id:
    text or a number, else ``null``.
    """
    if not isinstance(request_id, str | int | float) or isinstance(request_id, bool):
        return body
    return body.removesuffix(_NO_ID) + b'"id":%b}' % orjson.dumps(request_id)


def status_for(method: str, revision: str, status: int) -> int:
    """The *status* of a JSON-RPC error for a client of that *revision* of MCP.

    An older one ends its session at any status but 200. What it does not POST, such as its waiting
    for events, is no JSON-RPC request and is told by the status.
    """
    if method == "POST" and not (_REVISION.fullmatch(revision) and revision >= _STATUS_SINCE):
        return 200
    return status
