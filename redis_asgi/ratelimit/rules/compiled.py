"""Rules as requests are put to them: every default filled in, every name given out."""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from typing import Any, cast, get_args

from starlette.requests import HTTPConnection
from starlette.types import Scope

from ...asgi.paths import PathPattern, PathTemplate, Spellings, path_patterns
from ...asgi.scope import Addressing, is_preflight
from ...errors import ConfigurationError
from ...settings import OnRedisError, Settings, StrategyName
from ...settings.notation import Limit, parse_limits
from ..budgets.spending import Accuracy, Budget
from ..budgets.tokens import Tokens
from ..limits.charge import Charge
from ..limits.policy import PolicySet, Strategy
from .by_body import ByBody
from .checks import check_choice, check_strategy_of_tokens
from .joined import partitioner_of
from .last_limits import LastLimits
from .partition import PartitionBy
from .policies import (
    MOVING_WINDOW_MAX,
    ConcurrencyReader,
    make_concurrency,
    make_policies,
    warns_of_cost,
    warns_of_small_quotas,
)
from .rule import DEFAULT_NAME, Limits, Rule, listed_rules

# What rules cover that count by a body, where they do not say.
METHODS_WITH_BODY = ("POST", "PUT", "PATCH")


class CompiledRule:
    """A rule with every default filled in, ready to be asked of a request.

    Attributes:
        policies: Known at construction, unless the limits are a callable.
        limits_of: That callable, of limits or of a number in flight; ``None`` where there is none.
        last: What reads what it returns.
        cost: Units, or what says them.
        tokens: The same where it is known only after the answer; else ``None``.
        readers: What it counts by of a request's body.
        methods: Those of the requests that it covers; ``None`` = every method.
        written: The rule as the user wrote it.
        asks_user: Whether a callable of the user's has to be asked for more than the cost.
        has_paths: Whether the path decides if it covers a request.
    """

    def __init__(
        self,
        rule: Rule,
        settings: Settings,
        addressing: Addressing | None,
        *,
        strategy: StrategyName,
        on_redis_error: OnRedisError,
        partition_by: PartitionBy | None = None,
        name: str = DEFAULT_NAME,
        named: tuple[str, str] | None = None,
    ) -> None:
        self.written = rule
        self.name = rule.name or name
        self.count_if = rule.count_if
        self.on_redis_error: OnRedisError = rule.on_redis_error or on_redis_error
        self.partition = partitioner_of(rule.partition_by or partition_by, settings, addressing)
        self.readers = self.partition.readers
        # In flight is a request, however much it asks for.
        counted = self.readers if rule.concurrency is None else ()
        uses = next((reader for reader in counted if reader.counts_uses), None)
        self.tokens = rule.cost if isinstance(rule.cost, Tokens) else None
        self.cost: Any = partial(_of_uses, uses, rule.cost) if uses and isinstance(rule.cost, int) else rule.cost
        self._budgets: dict[object, Budget] = {}
        self.strategy: Strategy = rule.strategy or strategy
        if self.tokens is not None:
            check_strategy_of_tokens(self.strategy)
        self.shadow = rule.shadow or settings.RATE_LIMIT_DRY_RUN
        self._paths: tuple[PathPattern, ...] = path_patterns(rule.paths, case_sensitive=rule.case_sensitive)
        self.methods = _methods_of(rule, self.readers)
        self._methods = frozenset(self.methods) if self.methods is not None else None
        self.has_paths = bool(self._paths)
        # What its policies are called instead, and with which ending: see `make_policies`.
        self._named = named or (self.name, None)
        self._has_warned = False
        self._has_warned_of_cost = False
        self.policies = self._make(rule.limits) if isinstance(rule.limits, str) else None
        self.limits_of: Any = None if isinstance(rule.limits, str) else rule.limits
        self.last: LastLimits | ConcurrencyReader
        if rule.concurrency is None:
            self.last = LastLimits(self.name, partial(self._make, least=0), self._default, self._note_constant_cost)
        else:
            self.strategy = "concurrency"
            self.last = ConcurrencyReader(self.name, self.shadow)
            if callable(rule.concurrency):
                self.limits_of = rule.concurrency
            else:
                self.policies = make_concurrency(self.name, rule.concurrency, self.shadow)
        self._default_limits = settings.default_limits
        self.asks_user = self.limits_of is not None or self.partition.read is None

    def charge(self, name: Any) -> Charge:
        """The charge of a client under this rule.

        Args:
            name: Whom it counts; of dynamic limits, by which policies and whom.
        """
        policies, label = self.policies, None
        if policies is None:
            policies, name = name
            label = self.name
        partition, cost, price, budget = self.partition.of(name), 0, None, None
        if self.tokens is not None:
            # All are kept: they are of the buckets that the rule names.
            budget = self._budgets.setdefault(self.partition.bucket_of(name), Budget(self.tokens, self._accuracy))
        elif isinstance(self.cost, int):
            cost = self.cost
        else:
            price = self
        return Charge(policies, partition, cost, self.on_redis_error, self.count_if, label, price=price, budget=budget)

    @cached_property
    def _accuracy(self) -> Accuracy:
        return Accuracy(self.name)

    def _default(self) -> PolicySet:
        """The default limits of the settings under this rule, as far as its strategy goes."""
        limits = parse_limits(self._default_limits)
        if self.strategy == "moving-window":
            limits = tuple(Limit(min(limit.quota, MOVING_WINDOW_MAX), limit.window) for limit in limits)
        return self._make("; ".join(map(str, limits)))

    def _make(self, notation: str, *, least: int = 1) -> PolicySet:
        """The policies that *notation* stands for under this rule; parsed through a bounded cache."""
        name, ending = self._named
        strategy = cast("StrategyName", self.strategy)  # of limits
        policies = make_policies(name, notation, strategy, self.shadow, least=least, ending=ending)
        if self.strategy == "sliding-window-counter" and not self._has_warned:
            self._has_warned = warns_of_small_quotas(policies)
        return policies

    def note_cost(self, policies: PolicySet, cost: int) -> None:
        """Say once that a request at this *cost*, known only now, can never be admitted."""
        if cost > 1 and not self._has_warned_of_cost:
            self._has_warned_of_cost = warns_of_cost(self.name, policies, cost)

    def _note_constant_cost(self, policies: PolicySet) -> None:
        if isinstance(self.cost, int):
            self.note_cost(policies, self.cost)

    @property
    def statuses(self) -> frozenset[int]:
        """The answers that it may give in place of the app."""
        enforces = not self.shadow
        found = {
            429: enforces and self.written.cost != 0,
            503: enforces and self.on_redis_error == "closed",
            400: self.partition.refuses,
        }
        return frozenset(status for status, may in found.items() if may)

    def may_cover(self, method: str, templates: Iterable[PathTemplate]) -> bool:
        """Whether it covers some request of *method* (upper case) to a route whose paths are
        *templates*.
        """
        methods = self._methods
        if methods is not None and method not in methods and not (method == "HEAD" and "GET" in methods):
            return False
        return not self._paths or any(template.may_match(path) for path in self._paths for template in templates)

    def covers(self, scope: Scope, spelled: Spellings) -> bool:
        """Whether a request whose path has these spellings (see `redis_asgi.asgi.paths`) is this
        rule's business.
        """
        # Some servers pass a method on as it is written, and some frameworks do not care.
        method = "WEBSOCKET" if scope["type"] == "websocket" else scope["method"].upper()
        if self._methods is None:
            if method == "OPTIONS" and is_preflight(scope):
                return False
        elif method not in self._methods and not (method == "HEAD" and "GET" in self._methods):
            return False
        return not self._paths or any(pattern.covers(spelled) for pattern in self._paths)


def _methods_of(rule: Rule, readers: Sequence[ByBody]) -> tuple[str, ...] | None:
    """The methods of the requests that *rule* covers.

    Raises:
        ConfigurationError: If it counts by a body that they do not have.
    """
    methods: Any = rule.methods
    reads = f"partition_by={readers[0]!r}" if readers else "cost=tokens()" if isinstance(rule.cost, Tokens) else None
    if reads and methods is None:
        return METHODS_WITH_BODY
    if reads and "WEBSOCKET" in methods:
        raise ConfigurationError(
            f"methods={methods!r}: a WebSocket handshake has no body, which {reads} reads. "
            "Try methods='POST', or leave it out for POST, PUT and PATCH."
        )
    return cast("tuple[str, ...] | None", methods)


def _of_uses(reader: ByBody, cost: int, request: HTTPConnection) -> int:
    """The cost of a request each of whose uses costs *cost*."""
    return cost * reader.said(request.scope).times


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
    """The rules of one middleware: *limits* as the rule ``default``,
    then *rules*; the environment's if neither.

    Raises:
        ConfigurationError: For a missing or repeated name, and whatever a rule cannot do.
    """
    if strategy is not None:
        check_choice("strategy", strategy, get_args(StrategyName))
    if on_redis_error is not None:
        check_choice("on_redis_error", on_redis_error, get_args(OnRedisError))
    written = [] if rules is None else listed_rules(rules)
    if rules is not None and not written and limits is None:
        raise ConfigurationError("rules=[] limits nothing. Try limits='100/minute', or leave both out for RATE_LIMITS.")
    if limits is not None:
        written.insert(0, Rule(limits, name=DEFAULT_NAME))
    elif rules is None:
        written.append(Rule(settings.default_limits, name=DEFAULT_NAME))
    if len(written) > 1:
        names = [rule.name for rule in written if rule.name is not None]
        if len(names) < len(written):
            raise ConfigurationError("With two rules or more each needs a name. Try Rule('5/minute', name='login').")
        for name in names:
            if names.count(name) > 1:
                raise ConfigurationError(f"name={name!r} is used by two rules, which would share counters. Rename one.")
            for other in names:
                if re.fullmatch(rf"{re.escape(name)}-\d+s", other):
                    raise ConfigurationError(
                        f"name={other!r} is that of a policy of the rule {name!r}, once that has several limits, "
                        "and would be reset with it. Rename one."
                    )
    return tuple(
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
