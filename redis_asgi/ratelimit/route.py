"""Limits on one endpoint: `RateLimit`, a FastAPI dependency, and what it shares with `rate_limit`."""

import logging
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NoReturn, cast

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Scope

from ..asgi.scope import Addressing
from ..connection.redis_argument import RedisArgument, resolve_manager
from ..events import say
from ..misuse import Uncalled, check_callable, constructor_says_what_was_meant, only_called_as
from ..settings import OnRedisError, Settings, StrategyName
from .answers.headers import fields_of, renderer_of
from .answers.limited_response import style_of
from .answers.request_decision import STANDBY, RequestDecision, Undecided, decision_of
from .budgets.tokens import Tokens
from .counting.engine import Engine
from .rules.compiled import CompiledRule
from .rules.endpoints import calls_of, dependant_of
from .rules.partition import PartitionBy
from .rules.plan import PlanCache, charges_kept
from .rules.policies import fit_name
from .rules.recent import Recent
from .rules.rule import Cost, Limits, Rule, check_limits
from .stack import Stack

logger = logging.getLogger("redis_asgi.ratelimit")

_NOT_CALLED = Uncalled("Depends(RateLimit) is without a limit. Write Depends(RateLimit('5/minute')).")

# Routes that one dependency knows its neighbours of.
_MOST_ROUTES = 4096


@constructor_says_what_was_meant("RateLimit('5/minute', name='export')")
class RateLimit:
    """A limit on one endpoint: ``Depends(RateLimit("5/minute"))`` in FastAPI, also for a whole
    router.

    It is decided after the middleware's limits, if there are any: its policies join
    ``request.state.rate_limit``, and the middleware writes all of them in one header. Without the
    middleware it writes its own. Over quota it raises `RateLimitExceeded`, which answers by itself.

    Limits on the app, its routers and the route that follow each other with no other dependency
    between are decided together: all are charged, or none. One behind another dependency is decided
    when its turn has come; if it refuses, what was charged before it stays charged.

    Args:
        limits: Notation, or a callable that returns it for a request (``None`` = not limited).
        name: The counters' name; equal names share. ``None`` = the endpoint's ``module.qualname``
            with ``-<quota>-<window>s`` behind it, or of a callable, whose quotas change, with its
            place among them: ``-<window>s``, ``-2-<window>s``. Each endpoint has its own counter,
            the same in every worker, and limits stacked on one endpoint are told apart.
        partition_by: Who shares a counter; ``None`` = ``RATE_LIMIT_PARTITION``.
        cost: Units a request consumes, or a callable that says so for a connection; or `tokens`,
            which are settled where a `RateLimitMiddleware` outside sees the answer, else when the
            app says what was ``used``.
        strategy: ``None`` = ``RATE_LIMIT_STRATEGY``.
        on_redis_error: ``None`` = ``RATE_LIMIT_ON_REDIS_ERROR``.
        shadow: Count and report, never refuse.
        redis: ``None`` = the middleware's Redis,
            or the shared default where there is no middleware.
        settings: ``None`` = the middleware's, or from the environment at the first request.

    Raises:
        ConfigurationError: At construction, naming what cannot work.
    """

    def __init__(
        self,
        limits: Annotated[Limits, _NOT_CALLED],
        *,
        name: str | None = None,
        partition_by: PartitionBy | None = None,
        cost: int | Tokens | Callable[[HTTPConnection], Any] = 1,
        strategy: StrategyName | None = None,
        on_redis_error: OnRedisError | None = None,
        shadow: bool = False,
        redis: RedisArgument = None,
        settings: Settings | None = None,
    ) -> None:
        check_limits(limits)
        if callable(cost):
            check_callable("cost", cost, "conn", "cost=lambda conn: 2")
        self.name = name
        self.cost = cost
        self._rule = Rule(
            limits,
            name=name,
            partition_by=partition_by,
            cost=cast("Cost", cost),  # on a route it is given what the others are
            strategy=strategy,
            on_redis_error=on_redis_error,
            shadow=shadow,
        )
        self._redis = redis
        self._settings = settings
        # Built at the first request: a decorator runs at import, which must read no environment.
        self._engine: Engine | None = None
        self._has_warned = False
        self._neighbours: dict[int, tuple[object, Stack]] = {}

    # Where it is taken for the type of a parameter.
    __get_pydantic_core_schema__ = _NOT_CALLED.__get_pydantic_core_schema__

    @property
    def dependency(self) -> NoReturn:
        """What FastAPI reads of each of ``dependencies=[...]``."""
        raise AttributeError("RateLimit is given as it is. Write dependencies=[Depends(RateLimit('5/minute'))].")

    @only_called_as("A dependency is no decorator: write Depends(RateLimit('5/minute')), or @rate_limit('5/minute').")
    async def __call__(self, conn: HTTPConnection, response: Response) -> None:
        """Decide for the endpoint that FastAPI is about to call."""
        scope = conn.scope
        decision = await self._with_neighbours(scope).check(conn)
        if decision is not None and decision.immediate:
            fields = fields_of(decision.first, style_of(scope, decision))
            if response.raw_headers:
                response.headers.update({name.decode(): value.decode() for name, value in fields})
            else:
                response.raw_headers.extend(fields)

    async def check(self, conn: HTTPConnection, endpoint: object) -> RequestDecision | None:
        """Charge a request to *endpoint* alone; see `Stack.check`."""
        return await Stack([(self, 0)], endpoint).check(conn)

    def _with_neighbours(self, scope: Scope) -> Stack:
        """This one, and those that FastAPI calls right behind it,
        with nothing between that they could depend on.
        """
        dependant = dependant_of(scope)
        if dependant is None:
            return Stack([(self, 0)], scope.get("endpoint"))
        known = self._neighbours.get(id(dependant))
        if known is None:
            if len(self._neighbours) >= _MOST_ROUTES:
                self._neighbours.clear()
            calls = list(calls_of(dependant))
            places = {limit: i for i, limit in enumerate(dict.fromkeys(c for c in calls if isinstance(c, RateLimit)))}
            ours = {self: places.get(self, 0)}
            for call in calls[calls.index(self) + 1 :] if self in calls else ():
                # A subclass may have something to say before it is put to.
                if not isinstance(call, RateLimit) or type(call).__call__ is not RateLimit.__call__:
                    break
                ours[call] = places[call]
            # The dependant is kept with them, so that its id stays its own.
            known = self._neighbours[id(dependant)] = dependant, Stack(ours.items(), scope.get("endpoint"))
        return known[1]

    def settings_under(self, settings: Settings | None) -> Settings:
        """The settings that it goes by below a middleware of *settings*; ``None`` = there is none."""
        if settings is not None and self._redis is None and self._settings is None:
            return settings
        manager, _ = resolve_manager(self._redis, self._settings)
        return self._settings or manager.settings

    def statuses(self, settings: Settings | None) -> frozenset[int]:
        """The answers that it may give in place of its endpoint; *settings* as of `settings_under`."""
        return self._compile(self.settings_under(settings)).statuses

    def engine_for(self, scope: Scope) -> Engine:
        """The engine that decides about a request: the middleware's,
        unless this limit has a Redis of its own.
        """
        if self._redis is None and self._settings is None:
            decision = decision_of(scope)
            if decision is not None:
                return decision.first.engine
            standby: Undecided | None = scope.get(STANDBY)
            if standby is not None:
                return standby.engine
        if self._engine is None:
            manager, _ = resolve_manager(self._redis, self._settings)
            settings = self._settings or manager.settings
            self._engine = Engine(manager, timeout=settings.RATE_LIMIT_TIMEOUT, settings=settings)
            self._engine.plans = PlanCache(
                Addressing(settings), manager.per_process(charges_kept), renderer_of(settings.RATE_LIMIT_HEADERS)
            )
        return self._engine

    def compiled(self, engine: Engine, name: str, place: int) -> CompiledRule:
        """Its rule in front of the endpoint of that *name*, at its *place* among the limits there."""
        known: Recent[tuple[Any, ...], CompiledRule] = engine.plans.rules
        key = self, self.name or name, place
        return known.young.get(key) or known.find(key, lambda _: self._compiled(engine, *key[1:]))

    def _compiled(self, engine: Engine, name: str, place: int) -> CompiledRule:
        # A counter whose quota a callable changes must stay the same one.
        ending = ("" if place == 0 else f"-{place + 1}") if callable(self._rule.limits) else "-{quota}"
        named = (name, ending + "-{window}s") if self._rule.name is None else None
        rule = self._compile(engine.settings, name=fit_name(name), named=named)
        engine.manager.fails_closed |= rule.on_redis_error == "closed"
        return rule

    def _compile(self, settings: Settings, **names: Any) -> CompiledRule:
        return CompiledRule(
            self._rule,
            settings,
            None,
            strategy=settings.RATE_LIMIT_STRATEGY,
            on_redis_error=settings.RATE_LIMIT_ON_REDIS_ERROR,
            **names,
        )

    def warn_of_no_user(self, rules: Iterable[CompiledRule]) -> None:
        """Say once if that one of *rules* which is its own counts by a user whom no middleware
        outside looks up.
        """
        for rule in rules:
            if not self._has_warned and rule.written is self._rule and rule.partition.counts_users:
                self._has_warned = True
                say(logger, "user_middleware_missing", rule=rule.name, missing=rule.partition.missing)
