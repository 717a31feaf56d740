"""Rules: which requests a limit covers, who shares it, what a request costs; and how they become policies."""

import difflib
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, TypeAlias, get_args

from starlette.requests import HTTPConnection, Request

from ...asgi.paths import path_patterns
from ...errors import ArgumentError, ConfigurationError
from ...misuse import Uncalled, check_callable, constructor_says_what_was_meant, shown
from ...settings import OnRedisError, StrategyName
from ...settings.notation import MAX_QUOTA, parse_limits
from ..budgets.tokens import Tokens, tokens
from .partition import PartitionBy, check_partition_by

Limits: TypeAlias = str | Callable[[HTTPConnection], str | None | Awaitable[str | None]]
Cost: TypeAlias = int | Tokens | Callable[[Request], int | Awaitable[int]]
CountIf: TypeAlias = Callable[[int], bool]
Concurrency: TypeAlias = int | Callable[[HTTPConnection], int | None | Awaitable[int | None]]

DEFAULT_NAME = "default"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_METHOD = re.compile(r"[A-Z]{1,20}")
# IANA's "HTTP Method Registry", what caches and UPnP add, and a handshake; a name that is like none is an app's own.
_METHODS = (
    "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY", "WEBSOCKET",
    "PURGE", "BAN", "NOTIFY", "SUBSCRIBE", "UNSUBSCRIBE", "MSEARCH", "ACL", "BIND", "CHECKIN", "CHECKOUT",
    "COPY", "LABEL", "LINK", "LOCK", "MERGE", "MKACTIVITY", "MKCALENDAR", "MKCOL", "MKREDIRECTREF",
    "MKWORKSPACE", "MOVE", "ORDERPATCH", "PRI", "PROPFIND", "PROPPATCH", "REBIND", "REPORT", "SEARCH", "UNBIND",
    "UNCHECKOUT", "UNLINK", "UNLOCK", "UPDATE", "UPDATEREDIRECTREF",
)  # fmt: skip
_METHODS_ELSEWHERE = {
    "ALL": "Leave it out for all methods.",
    "ANY": "Leave it out for all methods.",
    "WS": "Did you mean 'WEBSOCKET'?",
}
_NO_DEPENDENCY = Uncalled("Rule is no dependency. Write Depends(RateLimit('5/minute')).")


# What other packages call a strategy, or what to do without Redis.
_ELSEWHERE = {
    "allow": "open",
    "deny": "closed",
    "leaky-bucket": "gcra",
    "memory": "local",
    "raise": "closed",
    "refuse": "closed",
    "sliding-log": "moving-window",
    "token-bucket": "gcra",
}


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a *value* that is none of *choices*.

    Raises:
        ConfigurationError: Lists the choices.
    """
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        meant = _ELSEWHERE.get(str(value).replace("_", "-").lower(), near[0] if near else "")
        example = meant if meant in choices else choices[0]
        raise ConfigurationError(f"{name}={shown(value)} is not one of {', '.join(choices)}. Try {example!r}.")


def check_name(name: object) -> str:
    """A name fit for a rule: it stands in header fields, Redis fields and metric labels.

    Raises:
        ConfigurationError: If it does not fit.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(f"name={name!r} is not 1 to 40 of A-Z a-z 0-9 _ . -. Try 'search'.")
    return name


def check_cost(cost: object) -> int:
    """A cost is a whole number of units, 0 or more.

    Raises:
        ValueError: If it is not; ``True`` is no number.
    """
    if not isinstance(cost, int) or isinstance(cost, bool) or cost < 0:
        raise ValueError(f"cost={cost!r} is not a whole number of units, 0 or more.")
    return cost


@constructor_says_what_was_meant("Rule('5/minute', name='login', paths='/login')")
@dataclass(frozen=True, slots=True)
class Rule:
    """Which requests are limited, by what, and how they are counted.

    Attributes:
        limits: Notation such as ``"20/second; 1000/hour"``; or a callable that returns it for a request, or ``None``
            for "not limited". A callable's quota of 0 refuses the request; what nobody can read is logged once, and
            answered by the partition's last readable limits, else by the default ones of the settings.
        concurrency: Instead of *limits*: how many requests of a partition may be in flight at once, over all workers, 1
            to 10^9; or a callable that says it for a request (``None`` = not limited, 0 refuses it). A request is in
            flight until its last body byte is passed on, its WebSocket is closed, or the app returns or raises.
            *strategy*, *cost* and *count_if* are for limits.
        name: 1 to 40 of ``A-Z a-z 0-9 _ . -``; the counters belong to it. May be left out of an only rule
            (``default``).
        paths: Patterns where ``*`` is any run of characters; ``None`` = every path. A request is covered in whatever
            spelling of such a path an app may serve it, see `redis_asgi.paths`.
        case_sensitive: Whether *paths* tell ``/Login`` from ``/login``; ``False`` for frameworks that do not.
        methods: ``None`` = every method and WebSocket handshakes, but no CORS preflight; of a rule that counts by the
            body (`by_json`, `by_mcp_tool`) POST, PUT and PATCH. ``GET`` covers HEAD; ``WEBSOCKET`` is a handshake;
            ``OPTIONS`` counts preflights too.
        partition_by: Who shares a counter; ``None`` = the middleware's. A callable that returns ``None`` takes the
            request out of this rule. Several in a list are one partition: who differs in one of them has another
            counter.
        cost: Units a request consumes, or a callable that says so, given a ``Request`` whose ``body()``, ``json()`` and
            ``form()`` are bounded by ``RATE_LIMIT_BODY_CAP`` and replayed to the app. 0 is admitted and charges
            nothing; more than the quota is refused for good. A body over the cap, or not the JSON or form that was
            asked for, takes what remains of the rule's smallest quota, and all but one unit of that comes back when
            the answer is a 3xx or 4xx. Or `tokens`, a cost that is known after the answer.
        strategy: ``fixed-window``, ``sliding-window-counter``, ``moving-window`` or ``gcra``; ``None`` = the
            middleware's. See ``redis_asgi.ratelimit.strategies``.
        on_redis_error: ``local``, ``open`` or ``closed``; ``None`` = the middleware's.
        shadow: Count and report, never refuse.
        count_if: Given the response's status, whether the request counts; if not, its charge is given back.

    Raises:
        ConfigurationError: Names what cannot work.
    """

    limits: Annotated[Limits | None, _NO_DEPENDENCY] = None
    _: KW_ONLY
    concurrency: Concurrency | None = None
    name: str | None = None
    paths: str | Iterable[str] | None = None
    methods: str | Iterable[str] | None = None
    partition_by: PartitionBy | None = None
    cost: Cost = 1
    strategy: StrategyName | None = None
    on_redis_error: OnRedisError | None = None
    shadow: bool = False
    count_if: CountIf | None = None
    case_sensitive: bool = True

    def __post_init__(self) -> None:
        if self.name is not None:
            check_name(self.name)
        self._check_quota()
        if self.strategy is not None:
            check_choice("strategy", self.strategy, get_args(StrategyName))
        if self.on_redis_error is not None:
            check_choice("on_redis_error", self.on_redis_error, get_args(OnRedisError))
        if self.partition_by is not None:
            check_partition_by(self.partition_by)
            if not callable(self.partition_by):
                object.__setattr__(self, "partition_by", tuple(self.partition_by))
        if self.count_if is not None:
            check_callable("count_if", self.count_if, "status", "count_if=lambda status: status >= 400")
        if inspect.iscoroutinefunction(self.count_if):
            raise ConfigurationError(f"count_if={self.count_if!r} is async, but is asked while the response goes out.")
        self._check_cost()
        for label in ("shadow", "case_sensitive"):
            if not isinstance(getattr(self, label), bool):
                raise ConfigurationError(f"{label}={getattr(self, label)!r} is not True or False.")
        if self.paths is not None:
            paths = _several("paths", self.paths, "'/api/*'")
            path_patterns(paths, case_sensitive=self.case_sensitive)
            object.__setattr__(self, "paths", paths)
        if self.methods is not None:
            methods = tuple(str(method).upper() for method in _several("methods", self.methods, "'POST'"))
            for method in methods:
                _check_method(method)
            object.__setattr__(self, "methods", methods)

    def _check_quota(self) -> None:
        if self.concurrency is not None:
            self._check_concurrency(self.concurrency)
        elif self.limits is None:
            raise ArgumentError(
                "Rule needs limits or concurrency, and limits=None is neither notation nor a callable. "
                "Try Rule('5/minute', name='login', paths='/login')."
            )
        else:
            check_limits(self.limits)

    def _check_concurrency(self, concurrency: object) -> None:
        if self.limits is not None:
            raise ConfigurationError(
                "limits= and concurrency= are given together. Write two rules, which are decided together all the "
                "same: Rule('60/minute', name='requests'), Rule(concurrency=4, name='streams')."
            )
        for label, value, default in (
            ("strategy", self.strategy, None),
            ("cost", self.cost, 1),
            ("count_if", self.count_if, None),
        ):
            if value is not default and value != default:
                raise ConfigurationError(
                    f"{label}={shown(value)} is for limits: with concurrency= a request counts as one. Leave it out."
                )
        if callable(concurrency):
            check_callable("concurrency", concurrency, "conn", "concurrency=lambda conn: 4")
            return
        try:
            check_concurrency(concurrency, least=1)
        except ValueError as error:
            raise ConfigurationError(f"{error} Try concurrency=4.") from None

    def _check_cost(self) -> None:
        cost: object = self.cost
        if cost is tokens:
            raise ConfigurationError("cost=tokens is not called. Try cost=tokens().")
        if isinstance(cost, Tokens):
            if self.strategy is not None:
                check_strategy_of_tokens(self.strategy)
            if self.count_if is not None:
                raise ConfigurationError(
                    f"count_if={shown(self.count_if)} stands beside cost=tokens(), which knows what a request has "
                    "used: nothing, if it was answered 400 or more. Leave count_if out."
                )
        elif callable(cost):
            check_callable("cost", cost, "request", "cost=lambda request: 2")
        else:
            _check_constant_cost(cost, self.limits or "")


def check_concurrency(number: object, *, least: int) -> int:
    """A number of requests in flight is a whole one, *least* to 10^9.

    Raises:
        ValueError: If it is not; ``True`` is no number.
    """
    if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= MAX_QUOTA:
        raise ValueError(f"concurrency={shown(number)} is not a whole number of requests in flight, {least} to 10^9.")
    return number


def check_strategy_of_tokens(strategy: str) -> None:
    """Refuse a *strategy* that cannot give back what was estimated too high.

    Raises:
        ConfigurationError: Says why.
    """
    why = {
        "gcra": "gives back only what has not drained",
        "moving-window": "keeps a time for each token, and 10,000 at most",
    }.get(strategy)
    if why is not None:
        raise ConfigurationError(
            f"strategy={strategy!r} {why}, so that cost=tokens() does not go with it. "
            "Try strategy='fixed-window' or 'sliding-window-counter'."
        )


def _check_method(method: str) -> None:
    """Refuse what no client sends: a rule of such a method would limit nothing, and say nothing."""
    if _METHOD.fullmatch(method):
        near = difflib.get_close_matches(method, _METHODS, n=1, cutoff=0.66)
        meant = _METHODS_ELSEWHERE.get(method, f"Did you mean {near[0]!r}?" if near else "")
        if method in _METHODS or not meant:
            return  # one of an app's own, perhaps
    else:
        several = re.findall(r"[A-Z]+", method)
        meant = (
            f"Try {tuple(several)!r}." if len(several) > 1 else "Try 'POST' or 'WEBSOCKET', or leave it out for all."
        )
    raise ConfigurationError(f"methods={method!r} is not an HTTP method. {meant}")


def check_limits(limits: object) -> None:
    """Limits are notation, or a callable that returns it for a connection.

    Raises:
        ConfigurationError: If they are neither.
    """
    if isinstance(limits, Rule):
        raise ConfigurationError("limits= is given a Rule. Try rules=[Rule(...)].")
    if isinstance(limits, str):
        parse_limits(limits)
    elif callable(limits):
        check_callable("limits", limits, "conn", "limits=lambda conn: '100/minute'")
    else:
        meant = (
            "; ".join(limits) if isinstance(limits, list | tuple) and all(isinstance(x, str) for x in limits) else ""
        )
        raise ConfigurationError(
            f"limits={shown(limits)} is neither notation nor a callable. Try {meant or '100/minute'!r}."
        )


def _check_constant_cost(cost: object, limits: Limits) -> None:
    try:
        units = check_cost(cost)
    except ValueError as error:
        raise ConfigurationError(f"{error} Try 1.") from None
    if isinstance(limits, str) and limits:
        quota = min(limit.quota for limit in parse_limits(limits))
        if units > quota:
            raise ConfigurationError(
                f"cost={cost!r} is more than the quota of {quota} in limits={limits!r}: no request would ever be "
                f"admitted. Try cost={quota} or less, or a larger quota."
            )


def _several(name: str, value: str | Iterable[str], example: str) -> tuple[str, ...]:
    """One value or several as a tuple.

    Raises:
        ConfigurationError: For none: a rule that covers nothing would be a limit silently off.
    """
    if not isinstance(value, str | Iterable):
        raise ConfigurationError(f"{name}={shown(value)} is neither text nor several. Try {name}={example}.")
    found = (value,) if isinstance(value, str) else tuple(value)
    if not found:
        raise ConfigurationError(f"{name}={value!r} covers nothing. Try {name}={example}, or None for all.")
    return found


def listed_rules(rules: object) -> list[Rule]:
    """*rules* as a list.

    Raises:
        ConfigurationError: If it is none, or holds something else.
    """
    if isinstance(rules, Rule):
        raise ConfigurationError("rules= is given one Rule, not a list of them. Try rules=[Rule(...)].")
    if isinstance(rules, str):
        raise ConfigurationError(
            f"rules={rules!r} is no list of rules. Try limits={rules!r}, or rules=[Rule({rules!r})]."
        )
    if isinstance(rules, Mapping) or not isinstance(rules, Iterable):
        example = "rules=[Rule('5/minute', name='login', paths='/login')]"
        raise ConfigurationError(f"rules={shown(rules)} is no list of rules. Try {example}.")
    listed = list(rules)
    for rule in listed:
        if not isinstance(rule, Rule):
            meant = rule if isinstance(rule, str) else "100/minute"
            raise ConfigurationError(f"rules holds {shown(rule)}, which is no Rule. Try rules=[Rule({meant!r})].")
    return listed
