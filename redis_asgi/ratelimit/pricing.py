"""Charges that are not settled by who asks: what a callable says they cost, and what an outer instance has charged."""

from collections.abc import Callable
from dataclasses import replace
from inspect import isawaitable
from typing import Any

from starlette.types import Message, Receive, Scope

from ..scope import BufferedRequest, UnreadableBody
from .engine import Engine
from .lint import Linter
from .policy import Charge, Charges, PolicySet, Unread
from .request_decision import RequestDecision, check_names
from .rules import check_cost
from .verdict import Verdict


class Pricing:
    """Decides charges whose cost a callable says, which may read the body for it.

    Args:
        cap: The most it may read, in bytes.
    """

    def __init__(self, engine: Engine, cap: int) -> None:
        self._engine = engine
        self._cap = cap

    async def decide(self, charges: Charges, scope: Scope, receive: Receive) -> tuple[Verdict, Receive]:
        """The verdict on *charges*, and what the app is to receive from: what was read ahead comes first."""
        # A refusal that is known already spares the reading of a body.
        known = self._engine.remembered(Charges(charge for charge in charges if charge.price is None))
        if known is not None:
            return known, receive
        costs: list[int | Unread] = []
        for charge in charges:
            cost: int | Unread = charge.cost
            if charge.price is not None:
                cost, receive = await self._ask(charge.price, scope, receive)
            costs.append(cost)
        return await self._engine.decide(self._engine.plans.priced(charges, costs)), receive

    async def _ask(self, price: Callable[..., Any], scope: Scope, receive: Receive) -> tuple[int | Unread, Receive]:
        """What *price* says; what cannot be read takes what remains."""
        request = BufferedRequest(scope, receive, cap=self._cap)
        cost = 1
        try:
            said = price(request)
            cost = check_cost(await said if isawaitable(said) else said)
        except UnreadableBody:
            pass
        finally:
            receive = request.replay()
            await request.close()  # the files of a form
        if not request.unreadable:
            return cost, receive
        # A body that is too big to look at must never be the cheap one, whatever the callable made of it.
        unread = Unread()
        unread.is_abandoned = request.is_abandoned
        return unread, _watching(receive, unread)


def left_over(charges: Charges, outer: RequestDecision, engine: Engine, linter: Linter) -> Charges:
    """*charges* without the policies that an *outer* instance has put the request to already."""
    # A request that the app sends itself through this very instance counts again.
    check_names(outer, charges, but_by=engine)
    left: list[Charge] = []
    for charge in charges:
        fresh = tuple(
            policy
            for policy in charge.policies
            if not outer.ledger.has_asked(engine.manager, charge.partition, policy, but_by=engine)
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
