"""Limits on one endpoint: `RateLimit` as a FastAPI dependency, `rate_limit` as a decorator for Starlette."""

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from inspect import isawaitable, iscoroutinefunction
from typing import Annotated, Any, NoReturn, TypeAlias, TypedDict, TypeVar, Unpack
from weakref import WeakKeyDictionary

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Scope

from ..connection import RedisArgument, RedisManager, resolve_manager
from ..errors import ConfigurationError
from ..event_loop import running_loop
from ..events import say
from ..misuse import Uncalled, check_callable, constructor_says_what_was_meant, says_what_was_meant, shown
from ..scope import Addressing
from ..settings import HeaderStyle, OnRedisError, Settings, StrategyName
from . import headers
from .endpoints import calls_of, dependant_of, endpoint_name
from .engine import Engine, Verdict
from .exceeded import RateLimitExceeded
from .ledger import (
    STANDBY,
    Ledger,
    RequestDecision,
    Standby,
    check_names,
    decision_of,
    is_over,
    keep_decision,
)
from .partition import MissingIdentity, PartitionBy
from .policies import fit_name
from .policy import Charge, Charges
from .responses import POLICY_VIOLATION, can_respond
from .rules import CompiledRule, Limits, Rule, check_cost

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
        self._rule = Rule(
            limits,
            name=name,
            partition_by=partition_by,
            cost=1 if callable(cost) else cost,
            strategy=strategy,
            on_redis_error=on_redis_error,
            shadow=shadow,
        )
        if callable(cost):
            check_callable("cost", cost, "conn", "cost=lambda conn: 2")
        self.cost = cost
        self._redis = redis
        self._settings = settings
        # Built at the first request: a decorator runs at import, which must read no environment.
        self._engine: Engine | None = None
        self._compiled: WeakKeyDictionary[Engine, dict[tuple[str, int], CompiledRule]] = WeakKeyDictionary()
        self._has_warned = False
        self._neighbours: dict[int, tuple[object, tuple[Placed, ...]]] = {}

    def __getattr__(self, name: str) -> NoReturn:
        # What FastAPI reads of each of dependencies=[...].
        if name == "dependency":
            raise AttributeError("RateLimit is given as it is. Write dependencies=[Depends(RateLimit('5/minute'))].")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    async def __call__(self, conn: HTTPConnection, response: Response) -> None:
        """Decide for the endpoint that FastAPI is about to call."""
        decision = await check_all(self._with_neighbours(conn.scope), conn, conn.scope.get("endpoint"))
        if decision is not None and decision.ledger.immediate:
            for key, value in _fields(decision).items():
                response.headers[key] = value

    async def check(self, conn: HTTPConnection, endpoint: object) -> RequestDecision | None:
        """Charge a request to *endpoint*; ``None`` when this limit does not apply to it.

        Raises:
            RateLimitExceeded: Over quota.
            HTTPException: 503 when the limit fails closed, 400 when the identity is missing and must not be.
            WebSocketException: Instead of any of them, where a handshake cannot be answered.
        """
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

    async def ask(self, conn: HTTPConnection, endpoint: object, place: int) -> tuple[Engine, Charge | None]:
        """What a request to *endpoint* is to be charged, and who decides that; ``None``: this limit does not apply.

        Args:
            place: Its place among the limits of the endpoint.

        Raises:
            MissingIdentity: The identity is missing and must not be.
        """
        engine = self.engine_for(conn.scope)
        return engine, await self._charge(self.compiled(engine, endpoint, place), conn)

    def settings_under(self, settings: Settings | None) -> Settings:
        """What it goes by below a middleware of *settings*; ``None`` = there is none."""
        if settings is not None and self._redis is None and self._settings is None:
            return settings
        manager, _ = resolve_manager(self._redis, self._settings)
        return self._settings or manager.settings

    def statuses(self, settings: Settings | None) -> frozenset[int]:
        """What it may answer in place of its endpoint; *settings* as of `settings_under`."""
        settings = self.settings_under(settings)
        return CompiledRule(
            self._rule,
            settings,
            Addressing(settings),
            strategy=settings.RATE_LIMIT_STRATEGY,
            on_redis_error=settings.RATE_LIMIT_ON_REDIS_ERROR,
        ).statuses

    def name_at(self, endpoint: object) -> str:
        """What its rule is called in front of *endpoint*."""
        return self._rule.name or endpoint_name(endpoint)

    def engine_for(self, scope: Scope) -> Engine:
        """Who decides about a request: the middleware's engine, unless this limit has a Redis of its own."""
        if self._redis is None and self._settings is None:
            decision = decision_of(scope)
            if decision is not None:
                return decision.ledger.verdicts[0].engine
            standby: Standby | None = scope.get(STANDBY)
            if standby is not None:
                return standby.engine
        if self._engine is None:
            manager, _ = resolve_manager(self._redis, self._settings)
            settings = self._settings or manager.settings
            self._engine = Engine(manager, timeout=settings.RATE_LIMIT_TIMEOUT, settings=settings)
        return self._engine

    def compiled(self, engine: Engine, endpoint: object, place: int) -> CompiledRule:
        """Its rule in front of *endpoint*, at its *place* among the limits there."""
        name = self.name_at(endpoint)
        rules = self._compiled.setdefault(engine, {})
        rule = rules.get((name, place))
        if rule is None:
            settings = engine.settings
            # A counter whose quota a callable changes must stay the same one.
            ending = ("" if place == 0 else f"-{place + 1}") if callable(self._rule.limits) else "-{quota}"
            rule = rules[name, place] = CompiledRule(
                self._rule,
                settings,
                Addressing(settings),
                name=fit_name(name),
                named=(name, ending + "-{window}s") if self._rule.name is None else None,
                strategy=settings.RATE_LIMIT_STRATEGY,
                on_redis_error=settings.RATE_LIMIT_ON_REDIS_ERROR,
            )
            engine.manager.fails_closed |= rule.on_redis_error == "closed"
        return rule

    async def _charge(self, rule: CompiledRule, conn: HTTPConnection) -> Charge | None:
        if rule.partition.kind == "user" and "user" not in conn.scope and not self._has_warned:
            self._has_warned = True
            say(logger, "user_middleware_missing", rule=rule.name, missing=rule.partition.missing)
        found = await rule.ask(conn)
        if found is None:
            return None
        policies, partition = found
        said = self.cost(conn) if callable(self.cost) else self.cost
        cost = check_cost(await said if isawaitable(said) else said)
        if callable(self.cost):
            rule.note_cost(policies, cost)
        return rule.charge(policies, partition, cost)


# A limit, and its place among those of an endpoint.
Placed: TypeAlias = tuple[RateLimit, int]


async def check_all(limits: Sequence[Placed], conn: HTTPConnection, endpoint: object) -> RequestDecision | None:
    """Put a request to *endpoint* to *limits*, those of one Redis together; see `RateLimit.check`."""
    running_loop()
    decision = decision_of(conn.scope)
    asked = _asked(conn.scope)
    groups: dict[tuple[RedisManager, int], tuple[Engine, list[Charge]]] = {}
    try:
        for limit, place in limits:
            this = limit, limit.name_at(endpoint)
            if this in asked:
                continue
            asked.add(this)
            engine, charge = await limit.ask(conn, endpoint, place)
            if charge is None:
                continue
            _, beside = groups.setdefault((engine.manager, id(engine.settings)), (engine, []))
            # The very same limit is charged once.
            if not _is_known(charge, engine, decision, beside):
                beside.append(charge)
    except MissingIdentity as missing:
        raise _answerable(conn, HTTPException(400, f"This request needs {missing.what}.")) from None
    check_names(decision, itertools.chain(*(charges for _, charges in groups.values())))
    for engine, charges in groups.values():
        if not charges:
            continue
        verdict = await engine.decide(Charges(charges))
        if decision is None:
            decision = _begin(conn.scope, verdict)
        else:
            decision.join(verdict)
        if not verdict.allowed:
            raise _answerable(conn, _refusal(decision, verdict))
    return decision


def _is_known(charge: Charge, engine: Engine, decision: RequestDecision | None, beside: Iterable[Charge]) -> bool:
    """Whether a request was put to all policies of *charge* already, or is to be *beside* it."""
    same = [policy for other in beside if other.partition.key == charge.partition.key for policy in other.policies]
    return all(
        policy in same or (decision is not None and decision.ledger.has_asked(engine.manager, charge.partition, policy))
        for policy in charge.policies
    )


def _asked(scope: Scope) -> "set[tuple[RateLimit, str]]":
    """The limits that a request was put to, perhaps before its turn had come to them, and by what name."""
    kept = scope.get(_ASKED)
    if kept is None or is_over(scope):
        kept = scope[_ASKED] = set()
    asked: set[tuple[RateLimit, str]] = kept
    return asked


def _begin(scope: Scope, verdict: Verdict) -> RequestDecision:
    """The decision of a request about which a middleware has said nothing."""
    standby: Standby | None = scope.get(STANDBY)
    if standby is not None and standby.sees_end:
        decision = standby.decision = RequestDecision(Ledger(verdict))
    else:
        decision = RequestDecision(Ledger(verdict, immediate=True))
        decision.ledger.count()
    keep_decision(scope, decision)
    return decision


def _refusal(decision: RequestDecision, verdict: Verdict) -> HTTPException:
    refusing = [state for state in verdict.decision.policies if state.name in verdict.decision.violated]
    if not refusing:  # nobody could decide, and the limit fails closed
        fields = headers.refusal_fields(verdict.decision)
        detail = "The rate limit cannot be checked right now. Retry in 1 s."
        return HTTPException(503, detail, {name.decode(): value.decode() for name, value in fields})
    worst = max(refusing, key=lambda state: math.inf if state.retry_after is None else state.retry_after)
    whose = next(charge for charge in verdict.charges if any(p.name == worst.name for p in charge.policies))
    return RateLimitExceeded(
        whose.partition.label, worst.quota, worst.window, decision=decision, style=_style(decision)
    )


def _fields(decision: RequestDecision) -> dict[str, str]:
    """The header fields of everything decided about a request."""
    return {name.decode(): value.decode() for name, value in decision.ledger.fields(_style(decision))}


def _style(decision: RequestDecision) -> HeaderStyle:
    return decision.ledger.verdicts[0].engine.style


def _answerable(conn: HTTPConnection, error: HTTPException) -> Exception:
    """*error*, or for a handshake that the server cannot answer with a status, its refusal."""
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
        if decision is not None and decision.ledger.immediate and isinstance(result, Response):
            for key, value in _fields(decision).items():
                result.headers.setdefault(key, value)
        return result

    # Whose it is stands with it: another decorator may copy it to a function of its own.
    setattr(limited, _STACK, (limited, endpoint, limits))
    return limited  # type: ignore[return-value]  # wraps() keeps the signature
