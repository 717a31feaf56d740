"""The limits in force of a middleware's rules and of routes, for those who ask without a request."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from starlette.types import Scope

from ..asgi.paths import PathTemplate
from ..connection.manager import RedisManager
from ..settings import OnRedisError, Settings
from .answers.request_decision import STANDBY, Undecided
from .budgets.tokens import Tokens
from .counting.engine import Engine
from .limits.policy import Policy, Strategy
from .route import RateLimit
from .rules.compiled import CompiledRule
from .rules.endpoints import endpoint_name
from .rules.exemptions import Exemptions
from .rules.routing import Routing
from .stack import Placed
from .styles import DialectPaths


@dataclass(frozen=True, slots=True)
class LimitInForce:
    """One rule, or the limit of a route.

    Attributes:
        name: The rule's.
        limits: Its notation, or how many in flight;
            ``None`` when a callable says it for each request.
        by: Who shares a counter: ``ip``, ``header:NAME``, ``user``, ``json:NAME``, ``mcp_tool`` or
            ``custom``, or several of these with a comma between them.
        strategy: How it is counted; ``concurrency`` for a limit of what is in flight.
        cost: Units of a request; ``tokens`` when its answer says it, ``None`` when a callable does.
        paths: Patterns, or the one path of a route; ``None`` = every path.
        methods: ``None`` = every method.
        shadow: Whether it only watches.
        on_redis_error: What it does while Redis does not answer.
        dialects: In which dialect it answers, by path pattern; the first that covers a path counts.
        policies: What is counted; empty when a callable says it.
        manager: Which Redis it is counted in.
        settings: Those it was built with.
    """

    name: str
    limits: str | None
    by: str
    strategy: Strategy
    cost: int | Literal["tokens"] | None
    paths: tuple[str, ...] | None
    methods: tuple[str, ...] | None
    shadow: bool
    on_redis_error: OnRedisError
    dialects: Mapping[str, str]
    policies: tuple[Policy, ...] = field(repr=False)
    manager: RedisManager = field(repr=False)
    settings: Settings = field(repr=False)

    def may_cover(self, method: str) -> bool:
        """Whether it covers some request of *method*."""
        return self.methods is None or not {method, *("GET",) * (method == "HEAD")}.isdisjoint(self.methods)

    def counts_as(self, name: str) -> bool:
        """Whether *name* is the rule's, or what a counter of it may be called."""
        return re.fullmatch(rf"{re.escape(self.name)}((-\d+)?-\d+s)?", name) is not None


@dataclass(frozen=True, slots=True)
class Protection:
    """The limits of one middleware.

    Attributes:
        engine: The one that decides.
        rules: Its rules, in their order.
        dialects: In which dialect it answers, by path pattern.
    """

    engine: Engine
    rules: Sequence[CompiledRule]
    routing: Routing
    exemptions: Exemptions
    dialects: DialectPaths

    def limits(self) -> list[LimitInForce]:
        """All of them."""
        dialects = {pattern.pattern: name for pattern, name in self.dialects}
        return [_in_force(rule, self.engine, dialects) for rule in self.rules]

    def limits_of(self, scope: Scope) -> list[LimitInForce] | None:
        """The rules that cover a request; ``None`` where it is exempt,
        by its path, from all of them.

        What a callable says (``exempt=``, a partition or limits of ``None``) is not asked.
        """
        if self.exemptions.cover_path(scope):
            return None
        spelled = self.routing.spellings(scope)
        covering = (pattern for pattern in self.dialects if pattern[0].covers(spelled))
        dialects = {pattern.pattern: name for pattern, name in islice(covering, 1)}
        return [_in_force(rule, self.engine, dialects) for rule in self.rules if rule.covers(scope, spelled)]


def limits_of_route(
    placed: Iterable[Placed], endpoint: object, path: str, methods: Sequence[str], around: Protection | None
) -> list[LimitInForce]:
    """The limits in front of an endpoint.

    Args:
        placed: As `RateLimit` itself knows them.
        around: The outermost middleware,
            which decides for limits without a Redis of their own, in its dialect.
    """
    scope: dict[str, Any] = {} if around is None else {STANDBY: Undecided(around.engine, sees_end=False)}
    spoken = {} if around is None else spoken_on(PathTemplate(path), around.dialects)
    found = []
    for limit, place in placed:
        engine = limit.engine_for(scope)
        rule = limit.compiled(engine, endpoint_name(endpoint), place)
        cost = _cost_of(limit.cost)
        found.append(_in_force(rule, engine, spoken, paths=(path,), methods=tuple(methods), cost=cost))
    return found


def spoken_on(path: PathTemplate, dialects: DialectPaths) -> dict[str, str]:
    """The *dialects* that cover some of a route's paths, down to one that covers all."""
    found = {}
    for pattern, name in dialects:
        if path.may_match(pattern):
            found[pattern.pattern] = name
        if path.always_matches(pattern):
            break
    return found


def limits_among(calls: Iterable[object]) -> list[Placed]:
    """The limits among *calls*, FastAPI's dependencies of a route, each with its place."""
    return [(limit, i) for i, limit in enumerate(dict.fromkeys(call for call in calls if isinstance(call, RateLimit)))]


def _written_limits(rule: CompiledRule) -> str | None:
    if rule.strategy == "concurrency":
        return None if rule.policies is None else f"{rule.policies.policies[0].quota} in flight"
    return rule.written.limits if isinstance(rule.written.limits, str) else None


def _cost_of(cost: object) -> int | Literal["tokens"] | None:
    return cost if isinstance(cost, int) else "tokens" if isinstance(cost, Tokens) else None


def _in_force(rule: CompiledRule, engine: Engine, dialects: Mapping[str, str], **of_route: Any) -> LimitInForce:
    written: dict[str, Any] = {
        "cost": _cost_of(rule.written.cost),
        "paths": rule.written.paths,
        "methods": rule.methods,
    }
    return LimitInForce(
        name=rule.name,
        limits=_written_limits(rule),
        by=rule.partition.kind,
        strategy=rule.strategy,
        shadow=rule.shadow,
        on_redis_error=rule.on_redis_error,
        dialects=dialects,
        policies=tuple(rule.policies or ()),
        manager=engine.manager,
        settings=engine.settings,
        **{**written, **of_route},
    )
