"""Rules: which requests a limit covers, who shares it,
what a request costs; and how they become policies.
"""

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, TypeAlias, get_args

from starlette.requests import HTTPConnection, Request

from ...asgi.paths import path_patterns
from ...errors import ArgumentError, ConfigurationError
from ...misuse import Uncalled, check_callable, check_flag, constructor_says_what_was_meant, shown
from ...settings import OnRedisError, StrategyName
from ...settings.notation import parse_limits
from ..budgets.tokens import Tokens, tokens
from .checks import (
    check_choice,
    check_concurrency,
    check_cost,
    check_method,
    check_name,
    check_strategy_of_tokens,
    several,
)
from .partition import PartitionBy, check_partition_by

Limits: TypeAlias = str | Callable[[HTTPConnection], str | None | Awaitable[str | None]]
Cost: TypeAlias = int | Tokens | Callable[[Request], int | Awaitable[int]]
CountIf: TypeAlias = Callable[[int], bool]
Concurrency: TypeAlias = int | Callable[[HTTPConnection], int | None | Awaitable[int | None]]

DEFAULT_NAME = "default"
_NO_DEPENDENCY = Uncalled("Rule is no dependency. Write Depends(RateLimit('5/minute')).")


@constructor_says_what_was_meant("Rule('5/minute', name='login', paths='/login')")
@dataclass(frozen=True, slots=True)
class Rule:
    """A limit: the requests that it covers, by what they are limited, and how they are counted.

    Attributes:
        limits: Notation such as ``"20/second; 1000/hour"``; or a callable that returns it for a
            request, or ``None`` for "not limited". A callable's quota of 0 refuses the request;
            what cannot be read is logged once, and answered by the partition's last readable
            limits, else by the default ones of the settings.
        concurrency: Instead of *limits*: how many requests of a partition may be in flight at once,
            over all workers, 1 to 10^9; or a callable that says it for a request (``None`` = not
            limited, 0 refuses it). A request is in flight until its last body byte is passed on,
            its WebSocket is closed, or the app returns or raises. *strategy*, *cost* and *count_if*
            are for limits.
        name: 1 to 40 of ``A-Z a-z 0-9 _ . -``; the counters belong to it.
            May be left out of an only rule (``default``).
        paths: Patterns where ``*`` is any run of characters; ``None`` = every path. A request is
            covered in whatever spelling of such a path an app may serve it, see
            `redis_asgi.asgi.paths`.
        case_sensitive: Whether *paths* tell ``/Login`` from ``/login``;
            ``False`` for frameworks that do not.
        methods: ``None`` = every method and WebSocket handshakes, but no CORS preflight; of a rule
            that counts by the body (`by_json`, `by_mcp_tool`) POST, PUT and PATCH. ``GET`` covers
            HEAD; ``WEBSOCKET`` is a handshake; ``OPTIONS`` counts preflights too.
        partition_by: Who shares a counter; ``None`` = the middleware's. A callable that returns
            ``None`` takes the request out of this rule. Several in a list are one partition: who
            differs in one of them has another counter.
        cost: Units a request consumes, or a callable that says so, given a ``Request`` whose
            ``body()``, ``json()`` and ``form()`` are bounded by ``RATE_LIMIT_BODY_CAP`` and
            replayed to the app. 0 is admitted and charges nothing; more than the quota is refused
            for good. A body over the cap, or not the JSON or form that was asked for, takes what
            remains of the rule's smallest quota, and all but one unit of that comes back when the
            answer is a 3xx or 4xx. Or `tokens`, a cost that is known after the answer.
        strategy: ``fixed-window``, ``sliding-window-counter``, ``moving-window`` or ``gcra``;
            ``None`` = the middleware's. See ``redis_asgi.ratelimit.strategies``.
        on_redis_error: ``local``, ``open`` or ``closed``; ``None`` = the middleware's.
        shadow: Count and report, never refuse.
        count_if: Given the response's status, whether the request counts;
            if not, its charge is given back.

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
            check_flag(label, getattr(self, label))
        if self.paths is not None:
            paths = several("paths", self.paths, "'/api/*'")
            path_patterns(paths, case_sensitive=self.case_sensitive)
            object.__setattr__(self, "paths", paths)
        if self.methods is not None:
            methods = tuple(str(method).upper() for method in several("methods", self.methods, "'POST'"))
            for method in methods:
                check_method(method)
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
