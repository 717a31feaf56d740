"""Rules: which requests a limit covers, who shares it, what a request costs; and how they become policies."""

import difflib
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TypeAlias, cast, get_args

from starlette.requests import HTTPConnection, Request
from starlette.types import Scope

from ..errors import ConfigurationError
from ..misuse import check_callable, constructor_says_what_was_meant, shown
from ..notation import Limit, parse_limits
from ..paths import PathPattern, PathTemplate, Spellings, path_patterns
from ..scope import Addressing, is_preflight
from ..settings import OnRedisError, Settings, StrategyName
from .last import LastLimits
from .partition import ADDRESSING, PartitionBy, Partitioner, check_partition_by
from .policies import MOVING_WINDOW_MAX, make_policies, warns_of_cost, warns_of_small_quotas
from .policy import Charge, Partition, PolicySet

Limits: TypeAlias = str | Callable[[HTTPConnection], str | None | Awaitable[str | None]]
Cost: TypeAlias = int | Callable[[Request], int | Awaitable[int]]
CountIf: TypeAlias = Callable[[int], bool]

DEFAULT_NAME = "default"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_METHOD = re.compile(r"[A-Z]{1,20}")


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
        name: 1 to 40 of ``A-Z a-z 0-9 _ . -``; the counters belong to it. May be left out of an only rule
            (``default``).
        paths: Patterns where ``*`` is any run of characters; ``None`` = every path. A request is covered in whatever
            spelling of such a path an app may serve it, see `redis_asgi.paths`.
        case_sensitive: Whether *paths* tell ``/Login`` from ``/login``; ``False`` for frameworks that do not.
        methods: ``None`` = every method and WebSocket handshakes, but no CORS preflight. ``GET`` covers HEAD;
            ``WEBSOCKET`` is a handshake; ``OPTIONS`` counts preflights too.
        partition_by: Who shares a counter; ``None`` = the middleware's. A callable that returns ``None`` takes the
            request out of this rule.
        cost: Units a request consumes, or a callable that says so, given a ``Request`` whose ``body()``, ``json()`` and
            ``form()`` are bounded by ``RATE_LIMIT_BODY_CAP`` and replayed to the app. 0 is admitted and charges
            nothing; more than the quota is refused for good. A body over the cap, or not the JSON or form that was
            asked for, takes what remains of the rule's smallest quota, and all but one unit of that comes back when
            the answer is a 3xx or 4xx.
        strategy: ``fixed-window``, ``sliding-window-counter``, ``moving-window`` or ``gcra``; ``None`` = the
            middleware's. See ``redis_asgi.ratelimit.strategies``.
        on_redis_error: ``local``, ``open`` or ``closed``; ``None`` = the middleware's.
        shadow: Count and report, never refuse.
        count_if: Given the response's status, whether the request counts; if not, its charge is given back.

    Raises:
        ConfigurationError: Names what cannot work.
    """

    limits: Limits
    _: KW_ONLY
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
        check_limits(self.limits)
        if self.strategy is not None:
            check_choice("strategy", self.strategy, get_args(StrategyName))
        if self.on_redis_error is not None:
            check_choice("on_redis_error", self.on_redis_error, get_args(OnRedisError))
        if self.partition_by is not None:
            check_partition_by(self.partition_by)
        if self.count_if is not None:
            check_callable("count_if", self.count_if, "status", "count_if=lambda status: status >= 400")
        if inspect.iscoroutinefunction(self.count_if):
            raise ConfigurationError(f"count_if={self.count_if!r} is async, but is asked while the response goes out.")
        if callable(self.cost):
            check_callable("cost", self.cost, "request", "cost=lambda request: 2")
        else:
            _check_constant_cost(self.cost, self.limits)
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
                if not _METHOD.fullmatch(method):
                    several = re.findall(r"[A-Z]+", method)
                    meant = repr(tuple(several)) if len(several) > 1 else "'POST' or 'WEBSOCKET'"
                    raise ConfigurationError(f"methods={method!r} is not an HTTP method. Try {meant}.")
            object.__setattr__(self, "methods", methods)


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


def _check_constant_cost(cost: int, limits: Limits) -> None:
    try:
        check_cost(cost)
    except ValueError as error:
        raise ConfigurationError(f"{error} Try 1.") from None
    if isinstance(limits, str):
        quota = min(limit.quota for limit in parse_limits(limits))
        if cost > quota:
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


class CompiledRule:
    """A rule with every default filled in, ready to be asked of a request."""

    def __init__(
        self,
        rule: Rule,
        settings: Settings,
        addressing: Addressing,
        *,
        strategy: StrategyName,
        on_redis_error: OnRedisError,
        partition_by: PartitionBy | None = None,
        name: str = DEFAULT_NAME,
        named: tuple[str, str] | None = None,
    ) -> None:
        self.written = rule
        self.name = rule.name or name
        self.cost = rule.cost
        self.count_if = rule.count_if
        self.on_redis_error: OnRedisError = rule.on_redis_error or on_redis_error
        self.partition = Partitioner(rule.partition_by or partition_by, settings, addressing)
        self._addressing = addressing
        self._limits = rule.limits
        self.strategy: StrategyName = rule.strategy or strategy
        self.shadow = rule.shadow or settings.RATE_LIMIT_DRY_RUN
        self._paths: tuple[PathPattern, ...] = path_patterns(rule.paths, case_sensitive=rule.case_sensitive)
        self._methods = frozenset(rule.methods) if rule.methods is not None else None
        self.everywhere = not self._paths and self._methods is None
        # What its policies are called instead, and with which ending: see `make_policies`.
        self._named = named or (self.name, None)
        self._has_warned = False
        self._has_warned_of_cost = False
        # Known at construction unless the limits are a callable.
        self.policies = self._make(rule.limits) if isinstance(rule.limits, str) else None
        self._last = (
            None
            if self.policies is not None
            else LastLimits(self.name, self._make_dynamic, self._default, self._note_constant_cost)
        )
        self._default_limits = settings.default_limits
        # Static limits and cost: the charge depends on the identity alone.
        self.is_plain = self.policies is not None and isinstance(rule.cost, int) and self.everywhere

    def charge(self, policies: PolicySet, partition: Partition, cost: int) -> Charge:
        """A charge under this rule."""
        label = None if self.policies is not None else self.name
        return Charge(policies, partition, cost, self.on_redis_error, self.count_if, label)

    def plain_charge(self, identity: str) -> Charge:
        """The charge of an identity under a rule that `is_plain`: nothing to call, nothing to wait for."""
        policies = cast("PolicySet", self.policies)
        return self.charge(policies, self.partition.of_identity(identity), cast("int", self.cost))

    def note_cost(self, policies: PolicySet, cost: int) -> None:
        """Say once that a request at this *cost*, known only now, can never be admitted."""
        if cost > 1 and not self._has_warned_of_cost:
            self._has_warned_of_cost = warns_of_cost(self.name, policies, cost)

    def _note_constant_cost(self, policies: PolicySet) -> None:
        if isinstance(self.cost, int):
            self.note_cost(policies, self.cost)

    async def ask(self, conn: HTTPConnection) -> tuple[PolicySet, Partition] | None:
        """A request's policies and partition under this rule, asked of the user where they are dynamic.

        Returns:
            ``None`` where the rule does not apply: "not limited", or nobody to count by.

        Raises:
            MissingIdentity: No identity, and the setting says to refuse.
        """
        policies, said = self.policies, None
        if not isinstance(self._limits, str):
            conn.scope.setdefault(ADDRESSING, self._addressing)
            said = self._limits(conn)
            said = await said if inspect.isawaitable(said) else said
            if said is None:
                return None
        partition = await self.partition(conn.scope)
        if partition is None:
            return None
        if self._last is not None:
            policies = self._last.read(said, partition)
        return cast("PolicySet", policies), partition

    def _default(self) -> PolicySet:
        """The default limits of the settings under this rule, as far as its strategy goes."""
        limits = parse_limits(self._default_limits)
        if self.strategy == "moving-window":
            limits = tuple(Limit(min(limit.quota, MOVING_WINDOW_MAX), limit.window) for limit in limits)
        return self._make("; ".join(map(str, limits)))

    def _make_dynamic(self, notation: str) -> PolicySet:
        return self._make(notation, least=0)

    def _make(self, notation: str, *, least: int = 1) -> PolicySet:
        """The policies that *notation* stands for under this rule; parsed through a bounded cache."""
        name, ending = self._named
        policies = make_policies(name, notation, self.strategy, self.shadow, least=least, ending=ending)
        if self.strategy == "sliding-window-counter" and not self._has_warned:
            self._has_warned = warns_of_small_quotas(policies)
        return policies

    @property
    def statuses(self) -> frozenset[int]:
        """What it may answer in place of the app."""
        enforces = not self.shadow
        found = {
            429: enforces and self.cost != 0,
            503: enforces and self.on_redis_error == "closed",
            400: self.partition.refuses,
        }
        return frozenset(status for status, may in found.items() if may)

    def may_cover(self, method: str, templates: Iterable[PathTemplate]) -> bool:
        """Whether it covers some request of *method* (upper case) to a route whose paths are *templates*."""
        methods = self._methods
        if methods is not None and method not in methods and not (method == "HEAD" and "GET" in methods):
            return False
        return not self._paths or any(template.may_match(path) for path in self._paths for template in templates)

    def covers(self, scope: Scope, spelled: Spellings) -> bool:
        """Whether a request whose path has these spellings (see `redis_asgi.paths`) is this rule's business."""
        if self.everywhere:
            return scope.get("method") != "OPTIONS" or not is_preflight(scope)
        # Some servers pass a method on as it is written, and some frameworks do not care.
        method = "WEBSOCKET" if scope["type"] == "websocket" else scope["method"].upper()
        if self._methods is None:
            if method == "OPTIONS" and is_preflight(scope):
                return False
        elif method not in self._methods and not (method == "HEAD" and "GET" in self._methods):
            return False
        if not self._paths:
            return True
        for pattern in self._paths:  # noqa: SIM110 - a generator would cost more than what it asks
            if pattern.covers(spelled):
                return True
        return False


def _listed_rules(rules: object) -> list[Rule]:
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


def compile_rules(
    limits: Limits | None,
    rules: Iterable[Rule] | None,
    settings: Settings,
    addressing: Addressing,
    *,
    strategy: StrategyName | None,
    on_redis_error: OnRedisError | None,
    partition_by: PartitionBy | None,
) -> tuple[CompiledRule, ...]:
    """The rules of one middleware: *limits* as the rule ``default``, then *rules*; the environment's if neither.

    Raises:
        ConfigurationError: For a missing or repeated name, and whatever a rule cannot do.
    """
    if strategy is not None:
        check_choice("strategy", strategy, get_args(StrategyName))
    if on_redis_error is not None:
        check_choice("on_redis_error", on_redis_error, get_args(OnRedisError))
    written = [] if rules is None else _listed_rules(rules)
    if rules is not None and not written and limits is None:
        raise ConfigurationError("rules=[] limits nothing. Try limits='100/minute', or leave both out for RATE_LIMITS.")
    if limits is not None:
        written.insert(0, Rule(limits, name=DEFAULT_NAME))
    elif rules is None:
        written.append(Rule(settings.default_limits, name=DEFAULT_NAME))
    if len(written) > 1:
        names = [rule.name for rule in written]
        if None in names:
            raise ConfigurationError("With two rules or more each needs a name. Try Rule('5/minute', name='login').")
        for name in names:
            if names.count(name) > 1:
                raise ConfigurationError(f"name={name!r} is used by two rules, which would share counters. Rename one.")
    compiled = tuple(
        CompiledRule(
            rule,
            settings,
            addressing,
            strategy=strategy or settings.RATE_LIMIT_STRATEGY,
            on_redis_error=on_redis_error or settings.RATE_LIMIT_ON_REDIS_ERROR,
            partition_by=partition_by,
        )
        for rule in written
    )
    _check_policy_names(compiled)
    return compiled


def same_identity(rules: Sequence[CompiledRule]) -> Callable[[Scope], str | None] | None:
    """What reads the identity that alone decides what every one of *rules* charges; ``None`` where more does.

    A request for which it returns ``None`` takes the long way: its identity is missing.
    """
    kinds = {rule.partition.kind for rule in rules}
    return rules[0].partition.read if len(kinds) == 1 and all(rule.is_plain for rule in rules) else None


def _check_policy_names(rules: Sequence[CompiledRule]) -> None:
    seen: dict[str, str] = {}
    dynamic = [rule.name for rule in rules if rule.policies is None]
    for rule in rules:
        for name in dynamic:
            # What its callable says decides whether a policy is named so.
            if re.fullmatch(rf"{re.escape(name)}-\d+s", rule.name):
                raise ConfigurationError(
                    f"name={rule.name!r} may be a policy of the rule {name!r} too, whose limits are a callable. "
                    "Rename one."
                )
    for rule in rules:
        for policy in rule.policies or ():
            other = seen.setdefault(policy.name, rule.name)
            if other != rule.name:
                raise ConfigurationError(
                    f"name={rule.name!r}: its policy {policy.name!r} is one of the rule {other!r} too. Rename one."
                )
