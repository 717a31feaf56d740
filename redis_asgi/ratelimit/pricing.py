"""Charges that are not settled by who asks: what a callable says they cost, and what a request was put to before."""

from collections.abc import Sequence
from dataclasses import replace
from inspect import isawaitable

from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope

from ..asgi.scope import BufferedRequest, UnreadableBody
from .answers.request_decision import RequestDecision, check_names
from .counting.engine import Engine
from .counting.verdict import Verdict
from .limits.policy import Charge, Charges, PolicySet, Pricer, Unread
from .rules.misconfiguration import Linter
from .rules.rule import check_cost


async def decide_priced(
    charges: Charges, engine: Engine, cap: int, scope: Scope, receive: Receive
) -> tuple[Verdict, Receive]:
    """The verdict on *charges* that a callable prices, and what the app is to receive from: what was read comes first.

    Args:
        cap: The most that may be read of a body, in bytes.
    """
    # A refusal that is known already spares the reading of a body.
    known = engine.remembered(Charges(charge for charge in charges if charge.price is None))
    if known is not None:
        return known, receive
    costs: list[int | Unread] = []
    for charge in charges:
        cost: int | Unread = charge.cost
        if charge.price is not None:
            cost, receive = await _ask(charge.price, charge.policies, cap, scope, receive)
        costs.append(cost)
    return await engine.decide(engine.plans.priced(charges, costs)), receive


async def _ask(
    price: Pricer, policies: PolicySet, cap: int, scope: Scope, receive: Receive
) -> tuple[int | Unread, Receive]:
    """What *price* says; what cannot be read takes what remains."""
    request = BufferedRequest(scope, receive, cap=cap)
    cost = 1
    try:
        said = price.cost(request)
        cost = check_cost(await said if isawaitable(said) else said)
    except UnreadableBody:
        pass
    finally:
        receive = request.replay()
        await request.close()  # the files of a form
    if not request.unreadable:
        price.note_cost(policies, cost)
        return cost, receive
    # A body that is too big to look at must never be the cheap one, whatever the callable made of it.
    unread = Unread()
    unread.is_abandoned = request.is_abandoned
    return unread, _watching(receive, unread)


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
    found: Sequence[tuple[Engine, Charges]], conn: HTTPConnection, decision: RequestDecision | None
) -> Sequence[tuple[Engine, Charges]]:
    """What of the charges *found* a request is to be charged, beside what the *decision* on it has charged."""
    if check_names(decision, [charges for _, charges in found]):
        # The very same limit is charged once.
        found = [(engine, _unknown(charges, engine, decision)) for engine, charges in found]
    return [(engine, await _priced(charges, engine, conn)) for engine, charges in found]


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
