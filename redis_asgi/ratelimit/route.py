"""Limits on one endpoint: `RateLimit` as a FastAPI dependency, `rate_limit` as a decorator for Starlette."""

import functools
import math
import re
from collections.abc import Callable
from inspect import isawaitable, iscoroutinefunction
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Scope

from ..connection import RedisArgument, resolve_manager
from ..keys import digest
from ..scope import Addressing
from ..settings import HeaderStyle, OnRedisError, Settings, StrategyName
from . import headers
from .engine import Engine, Verdict
from .exceeded import RateLimitExceeded
from .ledger import STANDBY, Ledger, RequestDecision, Standby, decision_of, keep_decision
from .partition import MissingIdentity, PartitionBy
from .policy import Charge, Charges
from .responses import POLICY_VIOLATION, can_respond
from .rules import CompiledRule, Limits, Rule, check_cost

F = TypeVar("F", bound=Callable[..., Any])


class RateLimit:
    """A limit on one endpoint: ``Depends(RateLimit("5/minute"))`` in FastAPI, also for a whole router.

    It is decided after the middleware's limits, if there are any: its policies join ``request.state.rate_limit``, and
    the middleware writes all of them in one header. Without the middleware it writes its own. Over quota it raises
    `RateLimitExceeded`, which answers by itself.

    Args:
        limits: Notation, or a callable that returns it for a request (``None`` = not limited).
        name: The counters' name; equal names share. ``None`` = the endpoint's ``module.qualname``: each endpoint has
            its own counter, the same in every worker.
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
        limits: Limits,
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
        self._cost = cost
        self._redis = redis
        self._settings = settings
        # Built at the first request: a decorator runs at import, which must read no environment.
        self._engine: Engine | None = None
        self._compiled: WeakKeyDictionary[Engine, dict[str, CompiledRule]] = WeakKeyDictionary()

    async def __call__(self, conn: HTTPConnection, response: Response) -> None:
        """Decide for the endpoint that FastAPI is about to call."""
        decision = await self.check(conn, conn.scope.get("endpoint"))
        if decision is not None and decision.ledger.immediate:
            for key, value in self.fields(decision).items():
                response.headers[key] = value

    async def check(self, conn: HTTPConnection, endpoint: object) -> RequestDecision | None:
        """Charge a request to *endpoint*; ``None`` when this limit does not apply to it.

        Raises:
            RateLimitExceeded: Over quota.
            HTTPException: 503 when the limit fails closed, 400 when the identity is missing and must not be.
            WebSocketException: Instead of any of them, where a handshake cannot be answered.
        """
        decision = decision_of(conn.scope)
        engine = self._engine_for(conn.scope, decision)
        rule = self._compile(engine, self._rule.name or endpoint_name(endpoint))
        try:
            charge = await self._charge(rule, conn)
        except MissingIdentity as missing:
            raise _answerable(conn, HTTPException(400, f"This request needs {missing.what}.")) from None
        if charge is None:
            return None
        if decision is not None and all(
            decision.ledger.has_asked(engine.manager, charge.partition, policy) for policy in charge.policies
        ):
            return decision
        verdict = await engine.decide(Charges((charge,)))
        if decision is None:
            decision = self._begin(conn.scope, verdict)
        else:
            decision.join(verdict)
        if not verdict.allowed:
            raise _answerable(conn, self._refusal(decision, verdict, charge))
        return decision

    def fields(self, decision: RequestDecision) -> dict[str, str]:
        """The header fields of everything decided about the request."""
        fields = decision.ledger.fields(self._style(decision))
        return {name.decode(): value.decode() for name, value in fields}

    def _engine_for(self, scope: Scope, decision: RequestDecision | None) -> Engine:
        if self._redis is None and self._settings is None:
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

    def _begin(self, scope: Scope, verdict: Verdict) -> RequestDecision:
        """The decision of a request about which a middleware has said nothing."""
        standby: Standby | None = scope.get(STANDBY)
        if standby is not None and standby.sees_end:
            decision = standby.decision = RequestDecision(Ledger(verdict))
        else:
            decision = RequestDecision(Ledger(verdict, immediate=True))
            decision.ledger.count()
        keep_decision(scope, decision)
        return decision

    def _compile(self, engine: Engine, name: str) -> CompiledRule:
        rules = self._compiled.setdefault(engine, {})
        rule = rules.get(name)
        if rule is None:
            settings = engine.settings
            rule = rules[name] = CompiledRule(
                self._rule,
                settings,
                Addressing(settings),
                name=name,
                strategy=settings.RATE_LIMIT_STRATEGY,
                on_redis_error=settings.RATE_LIMIT_ON_REDIS_ERROR,
            )
            engine.manager.fails_closed |= rule.on_redis_error == "closed"
        return rule

    async def _charge(self, rule: CompiledRule, conn: HTTPConnection) -> Charge | None:
        policies = await rule.policies_for(conn)
        if policies is None:
            return None
        partition = await rule.partition(conn.scope)
        if partition is None:
            return None
        cost = self._cost(conn) if callable(self._cost) else self._cost
        return rule.charge(policies, partition, check_cost(await cost if isawaitable(cost) else cost))

    def _refusal(self, decision: RequestDecision, verdict: Verdict, charge: Charge) -> HTTPException:
        refusing = [state for state in verdict.decision.policies if state.name in verdict.decision.violated]
        if not refusing:  # nobody could decide, and the limit fails closed
            fields = headers.refusal_fields(verdict.decision)
            detail = "The rate limit cannot be checked right now. Retry in 1 s."
            return HTTPException(503, detail, {name.decode(): value.decode() for name, value in fields})
        worst = max(refusing, key=lambda state: math.inf if state.retry_after is None else state.retry_after)
        return RateLimitExceeded(
            charge.partition.label, worst.quota, worst.window, decision=decision, style=self._style(decision)
        )

    def _style(self, decision: RequestDecision) -> HeaderStyle:
        return decision.ledger.verdicts[0].engine.style


def _answerable(conn: HTTPConnection, error: HTTPException) -> Exception:
    """*error*, or for a handshake that the server cannot answer with a status, its refusal."""
    return error if can_respond(conn.scope) else WebSocketException(POLICY_VIOLATION)


def rate_limit(limits: Limits, **options: Any) -> Callable[[F], F]:
    """`RateLimit` as a decorator for Starlette endpoints: sync, async and WebSocket, functions and methods.

    It finds the request among the endpoint's arguments by its type. The options are those of `RateLimit`.

    Raises:
        ConfigurationError: At decoration, naming what cannot work.
    """
    limit = RateLimit(limits, **options)

    def decorate(endpoint: F) -> F:
        @functools.wraps(endpoint)
        async def limited(*args: Any, **kwargs: Any) -> Any:
            conn = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, HTTPConnection)), None)
            if conn is None:
                raise RuntimeError(
                    f"@rate_limit found no Request or WebSocket among the arguments of {endpoint_name(endpoint)}. "
                    "Add a 'request: Request' parameter."
                )
            decision = await limit.check(conn, endpoint)
            if iscoroutinefunction(endpoint):
                result = await endpoint(*args, **kwargs)
            else:
                result = await run_in_threadpool(endpoint, *args, **kwargs)
            if decision is not None and decision.ledger.immediate and isinstance(result, Response):
                for key, value in limit.fields(decision).items():
                    result.headers.setdefault(key, value)
            return result

        return limited  # type: ignore[return-value]  # wraps() keeps the signature

    return decorate


_names: WeakKeyDictionary[object, str] = WeakKeyDictionary()


def endpoint_name(endpoint: object) -> str:
    """An endpoint's ``module.qualname`` as a rule's name: letters that do not fit become ``_``, a long one is cut.

    What is cut or replaced stands in a digest at the end, so that different endpoints never share a counter.
    """
    while isinstance(endpoint, functools.partial):
        endpoint = endpoint.func
    try:
        name = _names.get(endpoint)
        if name is None:
            name = _names[endpoint] = _fit_name(endpoint)
    except TypeError:  # neither hashable nor weakly referenced
        return _fit_name(endpoint)
    return name


def _fit_name(endpoint: object) -> str:
    named = endpoint if hasattr(endpoint, "__qualname__") else type(endpoint)
    full = f"{named.__module__}.{named.__qualname__}"
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", full)
    if name == full and len(name) <= 40:
        return name
    return f"{name[-31:]}-{digest(full)[:8]}".replace("_-", "-").lstrip(".")
