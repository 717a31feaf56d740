"""Limits on one endpoint: `RateLimit` as a FastAPI dependency, `rate_limit` as a decorator for Starlette."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from inspect import isawaitable, iscoroutinefunction
from typing import Annotated, Any, NoReturn, TypeAlias, TypedDict, TypeVar, Unpack, cast

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Scope

from ..connection import RedisArgument, RedisManager, resolve_manager
from ..errors import ConfigurationError
from ..event_loop import running_loop
from ..events import say
from ..misuse import (
    Uncalled,
    check_callable,
    constructor_says_what_was_meant,
    only_called_as,
    says_what_was_meant,
    shown,
)
from ..scope import Addressing
from ..settings import OnRedisError, Settings, StrategyName
from .compiled import CompiledRule
from .endpoints import calls_of, dependant_of, endpoint_name
from .engine import Engine
from .exceeded import refusal_on
from .limited_response import style_of, text_fields
from .partition import ADDRESSING, MissingIdentity, PartitionBy
from .plan import PlanCache, charges_kept
from .policies import fit_name
from .policy import Charge, Charges
from .recent import Recent
from .request_decision import STANDBY, RequestDecision, Standby, begin_decision, check_names, decision_of, is_over
from .responses import POLICY_VIOLATION, can_respond
from .rules import Cost, Limits, Rule, check_cost

logger = logging.getLogger("redis_asgi.ratelimit")

F = TypeVar("F", bound=Callable[..., Any])

_NOT_CALLED = Uncalled("Depends(RateLimit) is without a limit. Write Depends(RateLimit('5/minute')).")
_NOT_A_DEPENDENCY = Uncalled(
    "rate_limit is a decorator that takes its limit. Write @rate_limit('5/minute') right above the endpoint, or "
    "Depends(RateLimit('5/minute')) for a dependency."
)

# Where a scope keeps the limits that its request was put to.
_ASKED = "redis_asgi.route_limits"
# Where a decorated endpoint keeps itself, what it decorates, and the limits in front.
_STACK = "_redis_asgi_stack"
# Routes that one dependency knows its neighbours of.
_MOST_ROUTES = 4096


@constructor_says_what_was_meant("RateLimit('5/minute', name='export')")
class RateLimit:
    """A limit on one endpoint: ``Depends(RateLimit("5/minute"))`` in FastAPI, also for a whole router.

    It is decided after the middleware's limits, if there are any: its policies join ``request.state.rate_limit``, and
    the middleware writes all of them in one header. Without the middleware it writes its own. Over quota it raises
    `RateLimitExceeded`, which answers by itself.

    Limits on the app, its routers and the route that follow each other with no other dependency between are decided
    together: all are charged, or none. One behind another dependency is decided when its turn has come; if it refuses,
    what was charged before it stays charged.

    Args:
        limits: Notation, or a callable that returns it for a request (``None`` = not limited).
        name: The counters' name; equal names share. ``None`` = the endpoint's ``module.qualname`` with
            ``-<quota>-<window>s`` behind it, or of a callable, whose quotas change, with its place among them:
            ``-<window>s``, ``-2-<window>s``. Each endpoint has its own counter, the same in every worker, and limits
            stacked on one endpoint are told apart.
        partition_by: Who shares a counter; ``None`` = ``RATE_LIMIT_PARTITION``.
        cost: Units a request consumes, or a callable that says so for a connection.
        strategy: ``None`` = ``RATE_LIMIT_STRATEGY``.
        on_redis_error: ``None`` = ``RATE_LIMIT_ON_REDIS_ERROR``.
        shadow: Count and report, never refuse.
        redis: ``None`` = the middleware's Redis, or the shared default where there is no middleware.
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
        cost: int | Callable[[HTTPConnection], Any] = 1,
        strategy: StrategyName | None = None,
        on_redis_error: OnRedisError | None = None,
        shadow: bool = False,
        redis: RedisArgument = None,
        settings: Settings | None = None,
    ) -> None:
        if callable(cost):
            check_callable("cost", cost, "conn", "cost=lambda conn: 2")
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
        self._neighbours: dict[int, tuple[object, tuple[Placed, ...]]] = {}

    # Where it is taken for the type of a parameter.
    __get_pydantic_core_schema__ = _NOT_CALLED.__get_pydantic_core_schema__

    def __getattr__(self, name: str) -> NoReturn:
        # What FastAPI reads of each of dependencies=[...].
        if name == "dependency":
            raise AttributeError("RateLimit is given as it is. Write dependencies=[Depends(RateLimit('5/minute'))].")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @only_called_as("A dependency is no decorator: write Depends(RateLimit('5/minute')), or @rate_limit('5/minute').")
    async def __call__(self, conn: HTTPConnection, response: Response) -> None:
        """Decide for the endpoint that FastAPI is about to call."""
        decision = await check_all(self._with_neighbours(conn.scope), conn, conn.scope.get("endpoint"))
        if decision is not None and decision.immediate:
            for key, value in text_fields(decision, conn.scope).items():
                response.headers[key] = value

    async def check(self, conn: HTTPConnection, endpoint: object) -> RequestDecision | None:
        """Charge a request to *endpoint* alone; see `check_all`."""
        return await check_all(((self, 0),), conn, endpoint)

    def _with_neighbours(self, scope: Scope) -> "Sequence[Placed]":
        """This one, and those that FastAPI calls right behind it, with nothing between that they could depend on."""
        dependant = dependant_of(scope)
        if dependant is None:
            return ((self, 0),)
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
            known = self._neighbours[id(dependant)] = dependant, tuple(ours.items())
        return known[1]

    def settings_under(self, settings: Settings | None) -> Settings:
        """What it goes by below a middleware of *settings*; ``None`` = there is none."""
        if settings is not None and self._redis is None and self._settings is None:
            return settings
        manager, _ = resolve_manager(self._redis, self._settings)
        return self._settings or manager.settings

    def statuses(self, settings: Settings | None) -> frozenset[int]:
        """What it may answer in place of its endpoint; *settings* as of `settings_under`."""
        return self._compile(self.settings_under(settings)).statuses

    def name_at(self, endpoint: object) -> str:
        """What its rule is called in front of *endpoint*."""
        return self._rule.name or endpoint_name(endpoint)

    def engine_for(self, scope: Scope) -> Engine:
        """Who decides about a request: the middleware's engine, unless this limit has a Redis of its own."""
        if self._redis is None and self._settings is None:
            decision = decision_of(scope)
            if decision is not None:
                return decision.first.engine
            standby: Standby | None = scope.get(STANDBY)
            if standby is not None:
                return standby.engine
        if self._engine is None:
            manager, _ = resolve_manager(self._redis, self._settings)
            settings = self._settings or manager.settings
            self._engine = Engine(manager, timeout=settings.RATE_LIMIT_TIMEOUT, settings=settings)
            self._engine.plans = PlanCache(
                settings.RATE_LIMIT_HEADERS, Addressing(settings), manager.shared(charges_kept)
            )
        return self._engine

    def compiled(self, engine: Engine, endpoint: object, place: int) -> CompiledRule:
        """Its rule in front of *endpoint*, at its *place* among the limits there."""
        known: Recent[tuple[Any, ...], CompiledRule] = engine.plans.rules
        key = self, self.name_at(endpoint), place
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

    def warn_of_no_user(self, rule: CompiledRule) -> None:
        """Say once that it counts by a user whom no middleware outside looks up."""
        if not self._has_warned and rule.partition.kind == "user":
            self._has_warned = True
            say(logger, "user_middleware_missing", rule=rule.name, missing=rule.partition.missing)


# A limit, and its place among those of an endpoint.
Placed: TypeAlias = tuple[RateLimit, int]


async def check_all(limits: Sequence[Placed], conn: HTTPConnection, endpoint: object) -> RequestDecision | None:
    """Put a request to *endpoint* to *limits*, those of one Redis together; ``None`` when none of them applies.

    Raises:
        RateLimitExceeded: Over quota.
        HTTPException: 503 when a limit fails closed, 400 when the identity is missing and must not be.
        WebSocketException: Instead, where a handshake cannot be answered.
    """
    running_loop()
    scope = conn.scope
    decision = decision_of(scope)
    asked = _asked(scope)
    groups: dict[tuple[RedisManager, int], tuple[Engine, list[CompiledRule]]] = {}
    for limit, place in limits:
        name = limit.name_at(endpoint)
        if (limit, name) not in asked:
            asked.add((limit, name))
            engine = limit.engine_for(scope)
            engine, rules = groups.setdefault((engine.manager, id(engine.settings)), (engine, []))
            rule = limit.compiled(engine, endpoint, place)
            rules.append(rule)
            if "user" not in scope:
                limit.warn_of_no_user(rule)
    try:
        asking = [(engine, await _charges(engine, rules, conn, decision)) for engine, rules in groups.values()]
    except MissingIdentity as missing:
        raise _answerable(conn, HTTPException(400, f"This request needs {missing.what}.")) from None
    found = [(engine, charges) for engine, charges in asking if charges]
    if decision is not None or len(found) > 1 or any(len(charges) > 1 for _, charges in found):
        check_names(decision, itertools.chain(*(charges for _, charges in found)))
    for engine, charges in found:
        verdict = await engine.decide(charges)
        if decision is None:
            decision = begin_decision(scope, verdict)
        else:
            decision.join(verdict)
        if not verdict.allowed:
            raise _answerable(conn, refusal_on(decision, verdict, style_of(scope, decision)))
    return decision


async def _charges(
    engine: Engine, rules: Sequence[CompiledRule], conn: HTTPConnection, decision: RequestDecision | None
) -> Charges:
    """What *rules* charge a request that has not been put to them yet."""
    # For the callables of the user's, as a middleware would.
    conn.scope.setdefault(ADDRESSING, engine.plans.addressing)
    charges: Charges = await engine.plans.of(tuple(rules)).charges(conn.scope)
    # The very same limit is charged once.
    if decision is not None or len(charges) > 1:
        fresh: list[Charge] = []
        for charge in charges:
            if not _is_known(charge, engine, decision, fresh):
                fresh.append(charge)
        if len(fresh) < len(charges):
            charges = Charges(fresh)
    if charges.is_priced:
        costs: list[int] = []
        for charge in charges:
            said = charge.cost if charge.price is None else charge.price.cost(conn)
            costs.append(check_cost(await said if isawaitable(said) else said))
            if charge.price is not None:
                charge.price.note_cost(charge.policies, costs[-1])
        charges = engine.plans.priced(charges, costs)
    return charges


def _is_known(charge: Charge, engine: Engine, decision: RequestDecision | None, beside: Iterable[Charge]) -> bool:
    """Whether a request was put to all policies of *charge* already, or is to be *beside* it."""
    same = [policy for other in beside if other.partition.key == charge.partition.key for policy in other.policies]
    return all(
        policy in same or (decision is not None and decision.ledger.has_asked(engine.manager, charge.partition, policy))
        for policy in charge.policies
    )


def _asked(scope: Scope) -> "set[tuple[RateLimit, str]]":
    """The limits that a request was put to, perhaps before its turn had come to them, and by what name."""
    kept: set[tuple[RateLimit, str]] | None = scope.get(_ASKED)
    if kept is None or is_over(scope):
        kept = scope[_ASKED] = set()
    return kept


def _answerable(conn: HTTPConnection, error: HTTPException) -> Exception:
    """*error*, or a refused handshake where the server cannot answer one with a status."""
    return error if can_respond(conn.scope) else WebSocketException(POLICY_VIOLATION)


class RateLimitOptions(TypedDict, total=False):
    """The options of `RateLimit`, for `rate_limit`."""

    name: str | None
    partition_by: PartitionBy | None
    cost: int | Callable[[HTTPConnection], Any]
    strategy: StrategyName | None
    on_redis_error: OnRedisError | None
    shadow: bool
    redis: RedisArgument
    settings: Settings | None


@says_what_was_meant("@rate_limit('5/minute', name='export')")
def rate_limit(limits: Annotated[Limits, _NOT_A_DEPENDENCY], **options: Unpack[RateLimitOptions]) -> Callable[[F], F]:
    """`RateLimit` as a decorator for Starlette endpoints: sync, async and WebSocket, functions and methods.

    It finds the request among the endpoint's arguments by its type. The options are those of `RateLimit`.

    Raises:
        ConfigurationError: At decoration, naming what cannot work.
    """
    if _returns_a_response(limits):
        raise ConfigurationError(
            f"@rate_limit stands without a limit on {shown(limits)}. Write @rate_limit('5/minute')."
        )
    limit = RateLimit(limits, **options)

    def decorate(endpoint: Annotated[F, _NOT_A_DEPENDENCY]) -> F:
        if isinstance(endpoint, HTTPConnection):
            # It was taken for the endpoint itself, whose place its limits have.
            raise ConfigurationError(
                f"@rate_limit stands without a limit on {shown(limits)}. Write @rate_limit('5/minute')."
            )
        if isinstance(endpoint, type):
            raise ConfigurationError(f"@rate_limit stands on the class {shown(endpoint)}. Put it on its methods.")
        # One decorator right on another: both limits are decided together, in front of the endpoint itself.
        of, below, stacked = getattr(endpoint, _STACK, (None, endpoint, ()))
        placed = limit, 1 + max((place for _, place in stacked), default=-1)
        return _decorated(below, (placed, *stacked)) if of is endpoint else _decorated(endpoint, (placed,))

    return decorate


def stack_of(endpoint: object) -> tuple[object, tuple[Placed, ...]]:
    """The endpoint within its `rate_limit` decorators, and their limits, none for a plain one."""
    _, within, limits = getattr(endpoint, _STACK, (None, endpoint, ()))
    return within, limits


def limits_of(endpoint: object) -> tuple[RateLimit, ...]:
    """The limits that `rate_limit` has put in front of *endpoint*."""
    return tuple(limit for limit, _ in stack_of(endpoint)[1])


def _returns_a_response(limits: object) -> bool:
    """Whether what was given for limits says of itself that it is an endpoint."""
    returned = getattr(limits, "__annotations__", {}).get("return")
    return isinstance(returned, type) and issubclass(returned, Response)


def _decorated(endpoint: F, limits: tuple[Placed, ...]) -> F:
    """*endpoint* behind *limits*."""

    @functools.wraps(endpoint)
    async def limited(*args: Any, **kwargs: Any) -> Any:
        conn = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, HTTPConnection)), None)
        if conn is None:
            raise RuntimeError(
                f"@rate_limit found no Request or WebSocket among the arguments of {endpoint_name(endpoint)}. "
                "Add a 'request: Request' parameter."
            )
        decision = await check_all(limits, conn, endpoint)
        if iscoroutinefunction(endpoint):
            result = await endpoint(*args, **kwargs)
        else:
            result = await run_in_threadpool(endpoint, *args, **kwargs)
        if decision is not None and decision.immediate and isinstance(result, Response):
            for key, value in text_fields(decision, conn.scope).items():
                result.headers.setdefault(key, value)
        return result

    # Whose it is stands with it: another decorator may copy it to a function of its own.
    setattr(limited, _STACK, (limited, endpoint, limits))
    return limited  # type: ignore[return-value]  # wraps() keeps the signature
