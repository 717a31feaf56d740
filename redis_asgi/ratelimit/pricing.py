"""Charges that are not settled by who asks: what a callable says they cost, and what an outer instance has charged."""

from dataclasses import replace
from inspect import isawaitable

from starlette.types import Message, Receive, Scope

from ..scope import BufferedRequest, UnreadableBody
from .engine import Engine
from .lint import Linter
from .policy import Charge, Charges, PolicySet, Pricer, Unread
from .request_decision import RequestDecision, check_names
from .rules import check_cost
from .verdict import Verdict


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
    return Charges(left)


def _watching(receive: Receive, unread: Unread) -> Receive:
    """*receive*, which notes in *unread* that the client has gone."""

    async def watching() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect":
            unread.is_abandoned = True
        return message

    return watching
