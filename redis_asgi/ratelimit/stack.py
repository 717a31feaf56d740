"""Limits that stand one right on another in front of an endpoint,
and a request that is put to them together.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import HTTPConnection, Request
from starlette.types import Scope

from ..asgi.offer import OFFER, offer_of
from ..asgi.problem import POLICY_VIOLATION
from ..connection.manager import RedisManager
from ..event_loop import running_loop
from .answers.limited_response import style_of
from .answers.rate_limit_exceeded import refusal_on
from .answers.refusal_response import can_respond
from .answers.request_decision import RequestDecision, begin_decision, decision_of, is_over
from .answers.rewording import refused_as, rewording_in
from .budgets.estimates import Asked
from .counting.engine import Engine
from .limits.charge import Charges
from .limits.decision import Decision
from .pricing import charges_beside, charges_on_route
from .rules.endpoints import endpoint_name
from .rules.partition import MissingIdentity
from .rules.plan import Plan, PlanCache
from .rules.reading import body_of

if TYPE_CHECKING:
    from .route import RateLimit

# A limit, and its place among those of an endpoint.
Placed: TypeAlias = "tuple[RateLimit, int]"

# Where a scope keeps the limits that its request was put to,
# perhaps before its turn had come to them, and their names.
_ASKED = "redis_asgi.route_limits"


class Stack:
    """Limits in front of one *endpoint* that are decided together, as far as they are of one Redis."""

    def __init__(self, limits: Iterable[Placed], endpoint: object) -> None:
        self._name = name = endpoint_name(endpoint)
        self._placed: dict[tuple[RateLimit, str], Placed] = {}
        for placed in limits:
            self._placed.setdefault((placed[0], placed[0].name or name), placed)
        self._all = tuple(self._placed.values())
        self._keys = frozenset(self._placed)
        # Who decides all of them, and by which plans:
        # for the request before, and so for nearly all.
        self._last: tuple[list[Engine], Sequence[tuple[Engine, Plan]]] = [], ()

    async def check(self, conn: HTTPConnection) -> RequestDecision | None:
        """Put a request to those that it was not put to yet; ``None`` when none applies to it.

        Raises:
            RateLimitExceeded: Over quota.
            HTTPException: 503 when a limit fails closed,
                400 when the identity is missing and must not be.
            WebSocketException: Instead, where a handshake cannot be answered.
        """
        scope = conn.scope
        decision = decision_of(scope)
        asking: Sequence[tuple[Engine, Charges]] = []
        counters = 0
        is_priced = False
        asked: Asked | None = None
        try:
            for engine, plan in self._plans(scope):
                # For the callables of the user's, as a middleware would.
                offer = offer_of(scope)
                if offer is None or offer.addressing is None:
                    scope[OFFER] = engine.plans.offer.below(offer)
                known = plan.known(scope)
                charges = known if known is not None else await plan.charges(scope)
                if plan.behind is not None or charges.has_tokens:
                    charges, asked = await charges_on_route(plan.behind, charges, conn, engine)
                asking = [*asking, (engine, charges)]
                counters += charges.counters
                is_priced |= charges.is_priced
        except MissingIdentity as missing:
            error = HTTPException(400, f"This request needs {missing.what}.")
            raise await _answerable(conn, error) from None
        if is_priced or counters > 1 or decision is not None:
            asking = await charges_beside(asking, conn, decision, asked)
        for engine, charges in asking:
            if not charges.counters:
                continue
            verdict = engine.ask(charges)
            if verdict.is_asked:
                await verdict.future
            if decision is None:
                decision = begin_decision(scope, verdict)
            else:
                decision.join(verdict)
            if verdict.spent:
                decision.ledger.spend(verdict)
            if not verdict.allowed:
                error = refusal_on(decision, verdict, style_of(scope, decision))
                raise await _answerable(conn, error, verdict.decision)
        return decision

    def _plans(self, scope: Scope) -> Sequence[tuple[Engine, Plan]]:
        """The plans of those that the request was not put to yet, one of each Redis."""
        asked: frozenset[tuple[RateLimit, str]] | None = scope.get(_ASKED)
        fresh = self._all
        if asked is None or is_over(scope):
            scope[_ASKED] = self._keys
        else:
            fresh = tuple(placed for key, placed in self._placed.items() if key not in asked)
            scope[_ASKED] = asked | self._keys
        engines = [limit.engine_for(scope) for limit, _ in fresh]
        known, plans = self._last
        if fresh is not self._all or engines != known:
            plans = self._make(fresh, engines)
            if fresh is self._all:
                self._last = engines, plans
        for _, plan in plans:
            if plan.counts_users and "user" not in scope:
                for limit, _ in fresh:
                    limit.warn_of_no_user(plan.rules)
        return plans

    def _make(self, limits: Sequence[Placed], engines: Sequence[Engine]) -> Sequence[tuple[Engine, Plan]]:
        running_loop()
        groups: dict[tuple[RedisManager, int], tuple[Engine, list[Placed]]] = {}
        for placed, engine in zip(limits, engines, strict=True):
            groups.setdefault((engine.manager, id(engine.settings)), (engine, []))[1].append(placed)
        return [(engine, self._plan(engine, together)) for engine, together in groups.values()]

    def _plan(self, engine: Engine, limits: Sequence[Placed]) -> Plan:
        plans: PlanCache = engine.plans
        return plans.of(tuple(limit.compiled(engine, self._name, place) for limit, place in limits))


async def _answerable(conn: HTTPConnection, error: HTTPException, refusal: Decision | None = None) -> Exception:
    """*error*, or a refused handshake where the server cannot answer one with a status.

    Args:
        refusal: Of the limit that refuses; ``None`` = none does.
    """
    if not can_respond(conn.scope):
        return WebSocketException(POLICY_VIOLATION)
    rewording = rewording_in(conn.scope)
    if rewording is not None and isinstance(conn, Request):
        content = None
        if rewording.style.names_request:
            content = await body_of(conn, rewording.style.body_cap)
        rewording.offer(refused_as(error, refusal), conn, content)
    return error
