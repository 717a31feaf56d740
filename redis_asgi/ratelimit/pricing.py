"""Charges that are not settled by who asks: what a callable says they cost, and what a request was put to before."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from inspect import isawaitable

from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope

from ..bodies import Buffer
from ..scope import BufferedRequest, UnreadableBody
from .engine import Engine
from .lint import Linter
from .partition import ADDRESSING
from .plan import Plan
from .policy import Charge, Charges, PolicySet, Pricer, Unread
from .reading import look, look_on_route
from .request_decision import RequestDecision, check_names
from .rules import check_cost
from .verdict import Verdict


async def decide_ahead(
    plan: Plan,
    charges: Charges,
    engine: Engine,
    outer: RequestDecision | None,
    linter: Linter,
    scope: Scope,
    receive: Receive,
) -> tuple[Verdict | None, Receive]:
    """The verdict on what *plan* charges a request whose body is asked, and what the app is to receive from.

    Args:
        charges: What does not depend on the body, but for its cost.
        outer: What an outer instance has decided about the request.

    Returns:
        ``None`` when no rule applies; what was read comes first.

    Raises:
        MissingIdentity: See `Plan.charges`.
    """
    # A refusal that is known already spares the reading of a body.
    known = engine.remembered(Charges(charge for charge in charges if charge.price is None))
    if known is not None:
        return known, receive
    buffer = Buffer(receive, cap=engine.settings.RATE_LIMIT_BODY_CAP)
    if plan.behind is not None and await look(plan.behind, scope, buffer):
        behind = await plan.behind.charges(scope)
        if outer is not None:
            behind = left_over(behind, outer, engine, linter)
        charges = engine.plans.together(charges, behind)
    if not charges.is_priced:
        return (await engine.decide(charges) if charges.counters else None), buffer.replay()
    costs: list[int | Unread] = []
    for charge in charges:
        cost: int | Unread = charge.cost
        if charge.price is not None:
            cost = await _ask(charge.price, charge.policies, buffer, scope, receive)
        costs.append(cost)
    buffer.decided()
    receive = buffer.replay()
    for cost in costs:
        if isinstance(cost, Unread):
            receive = _watching(receive, cost)
    return await engine.decide(engine.plans.priced(charges, costs)), receive


async def _ask(price: Pricer, policies: PolicySet, buffer: Buffer, scope: Scope, receive: Receive) -> int | Unread:
    """What *price* says; what cannot be read takes what remains."""
    request = BufferedRequest(scope, receive, buffer=buffer)
    cost = 1
    try:
        said = price.cost(request)
        cost = check_cost(await said if isawaitable(said) else said)
    except UnreadableBody:
        pass
    finally:
        await request.close()  # the files of a form
    if not request.unreadable:
        price.note_cost(policies, cost)
        return cost
    # A body that is too big to look at must never be the cheap one, whatever the callable made of it.
    unread = Unread()
    unread.is_abandoned = request.is_abandoned
    return unread


def left_over(charges: Charges, outer: RequestDecision, engine: Engine, linter: Linter) -> Charges:
    """*charges* without the policies that an *outer* instance has put the request to already."""
    # A request that the app sends itself through this very instance counts again.
    check_names(outer, (charges,), but_by=engine)
    left: list[Charge] = []
    for charge in charges:
        fresh = tuple(
            policy
            for policy in charge.policies
            if not outer.has_asked(engine.manager, charge.partition, policy, but_by=engine)
        )
        if fresh:
            left.append(charge if len(fresh) == len(charge.policies) else replace(charge, policies=PolicySet(fresh)))
        if len(fresh) < len(charge.policies):
            linter.mounted_twice()
    # The same, if that is all of them, so that what is kept of them is found again.
    return charges if left == list(charges) else Charges(left)


def _watching(receive: Receive, unread: Unread) -> Receive:
    """*receive*, which notes in *unread* that the client has gone."""

    async def watching() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect":
            unread.is_abandoned = True
        return message

    return watching


async def charges_beside(
    plans: Iterable[tuple[Engine, Plan]], conn: HTTPConnection, decision: RequestDecision | None
) -> Sequence[tuple[Engine, Charges]]:
    """What *plans* charge a request beside what the *decision* on it has charged already."""
    found: list[tuple[Engine, Charges]] = []
    counters = 0
    is_priced = False
    for engine, plan in plans:
        # For the callables of the user's, as a middleware would.
        conn.scope.setdefault(ADDRESSING, engine.plans.addressing)
        charges = await plan.charges(conn.scope)
        if plan.behind is not None and await look_on_route(plan.behind, conn, engine.settings.RATE_LIMIT_BODY_CAP):
            charges = engine.plans.together(charges, await plan.behind.charges(conn.scope))
        if charges.counters:
            found.append((engine, charges))
            counters += charges.counters
            is_priced |= charges.is_priced
    if (decision is not None or counters > 1) and check_names(decision, [charges for _, charges in found]):
        # The very same limit is charged once.
        found = [(engine, _unknown(charges, engine, decision)) for engine, charges in found]
    if is_priced:
        found = [(engine, await _priced(charges, engine, conn)) for engine, charges in found]
    return found


def _unknown(charges: Charges, engine: Engine, decision: RequestDecision | None) -> Charges:
    """Those of *charges* by some policy that a request was not put to already."""
    fresh: list[Charge] = []
    for charge in charges:
        partition = charge.partition
        beside = [policy for other in fresh if other.partition.key == partition.key for policy in other.policies]
        if not all(
            policy in beside or (decision is not None and decision.has_asked(engine.manager, partition, policy))
            for policy in charge.policies
        ):
            fresh.append(charge)
    return Charges(fresh) if len(fresh) < len(charges) else charges


async def _priced(charges: Charges, engine: Engine, conn: HTTPConnection) -> Charges:
    """*charges* at what their callables, if they have any, say they cost."""
    if not charges.is_priced:
        return charges
    costs: list[int] = []
    for charge in charges:
        said = charge.cost if charge.price is None else charge.price.cost(conn)
        costs.append(check_cost(await said if isawaitable(said) else said))
        if charge.price is not None:
            charge.price.note_cost(charge.policies, costs[-1])
    priced: Charges = engine.plans.priced(charges, costs)
    return priced
