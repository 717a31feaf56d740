"""Charges that are not settled by who asks: what a callable says they cost,
and what a request was put to before.
"""

from collections.abc import Sequence
from dataclasses import replace
from inspect import isawaitable
from typing import Any

from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope, Send

from ..asgi.bodies import Buffer
from ..asgi.scope import BufferedRequest, UnreadableBody, content_length
from .answers.held_request import until_ended
from .answers.request_decision import RequestDecision, check_names
from .budgets.estimates import Asked
from .counting.engine import Engine
from .counting.verdict import Verdict
from .limits.charge import Charge, Charges, Pricer, Unread
from .limits.policy import PolicySet
from .rules.checks import check_cost
from .rules.misconfiguration import Linter
from .rules.plan import Plan
from .rules.reading import NO_BODY, look, look_on_route


class Ahead:
    """A request whose head alone does not decide it.

    Its body is asked before the app sees it, it is held until its answer has ended, or an instance
    outside has decided a part of it.

    Args:
        engine: Decides about it.
        outer: What an outer instance has decided about it.
        receive: The server's.
        send: The server's.

    Attributes:
        receive: What the app is to receive from: what was read comes first.
        send: What its answer goes to.
    """

    def __init__(
        self, engine: Engine, outer: RequestDecision | None, linter: Linter, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._engine = engine
        self._outer = outer
        self._linter = linter
        self._scope = scope
        self._of_server = self.receive = receive
        self.send = send

    async def decide(self, plan: Plan, charges: Charges) -> Verdict | None:
        """The verdict on what *plan* charges the request; ``None`` when no rule applies.

        Args:
            charges: What does not depend on the body, but for its cost.

        Raises:
            MissingIdentity: See `Plan.charges`.
        """
        engine, behind = self._engine, plan.behind
        if self._outer is not None:
            charges = left_over(charges, self._outer, engine, self._linter)
        if engine.refusals.partitions:
            # A refusal that is known already spares the reading of a body.
            # Whether there is one, only the body says.
            says_empty = charges.has_tokens and content_length(self._scope) == 0
            known = engine.remembered(engine.plans.least(without_tokens(charges) if says_empty else charges))
            if known is not None:
                return known
        buffer = Buffer(self._of_server, cap=engine.settings.RATE_LIMIT_BODY_CAP)
        asked = None
        if behind is not None or charges.has_tokens:
            asks = charges.has_tokens or (behind is not None and behind.has_tokens)
            try:
                content = await buffer.whole()
                asked = look(content, buffer, self._scope, () if behind is None else behind.readers, asks)
                if asked is NO_BODY:
                    charges = without_tokens(charges)
                elif behind is not None:
                    known_more = behind.known(self._scope)
                    more = known_more if known_more is not None else await behind.charges(self._scope)
                    if self._outer is not None:
                        more = left_over(more, self._outer, engine, self._linter)
                    charges = engine.plans.together(charges, more)
            finally:
                # Also for the answer to a request that lacks an identity,
                # which may name what its body says.
                self.receive = buffer.replay()
        unpriced = charges
        if charges.is_priced:
            charges = await self._price(charges, buffer, asked)
        elif not charges.counters:
            return None
        verdict = await engine.decide(charges) if charges.holds else engine.ask(charges)
        if verdict.is_asked:
            await verdict.future
        unpriced.admission = charges.admission  # for the next ones that are made of them
        if verdict.spent:
            first = verdict if self._outer is None else self._outer.first
            first.open_ledger().spend(verdict)
        if verdict.slot is not None:
            self.receive, self.send = until_ended(verdict, self.receive, self.send)
        return verdict

    async def _price(self, charges: Charges, buffer: Buffer, asked: Asked | None) -> Charges:
        """*charges* at their costs."""
        costs: list[int | Unread | Charge] = []
        for at in charges.unpriced:
            charge = charges[at]
            budget, price = charge.budget, charge.price
            if price is None and not callable(budget.tokens.estimate):
                costs.append(budget.charge(charge, self._scope, asked))
                continue
            request = BufferedRequest(self._scope, self._of_server, buffer=buffer)
            if price is None:
                costs.append(await estimate(charge, self._scope, asked, request))
            else:
                costs.append(await _ask(price, charge.policies, request))
            self.receive = buffer.replay()
            if isinstance(costs[-1], Unread):
                self.receive = _watching(self.receive, costs[-1])
        buffer.decided()
        priced: Charges = self._engine.plans.priced(charges, costs)
        return priced


async def estimate(charge: Charge, scope: Scope, asked: Asked | None, conn: HTTPConnection) -> Charge:
    """A *charge* whose cost is known after the answer only, at its estimate.

    Args:
        asked: What the request's body asks of a model; ``None`` when it cannot be read.
        conn: What a callable of the user's is given.
    """
    by: Any = charge.budget.tokens.estimate
    units: int | None = None
    if callable(by):
        try:
            said = by(conn)
            units = check_cost(await said if isawaitable(said) else said, "estimate")
        except UnreadableBody:
            pass
        finally:
            if isinstance(conn, BufferedRequest):
                await conn.close()  # the files of a form
    estimated: Charge = charge.budget.charge(charge, scope, asked, units)
    return estimated


def without_tokens(charges: Charges) -> Charges:
    """The *charges* that apply to a request without a body."""
    if not charges.has_tokens:
        return charges
    return Charges(charge for charge in charges if charge.budget is None)


async def _ask(price: Pricer, policies: PolicySet, request: BufferedRequest) -> int | Unread:
    """The cost that *price* says; a body that cannot be read takes what remains."""
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
    # A body that is too big to look at must never be the cheap one,
    # whatever the callable made of it.
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
    found: Sequence[tuple[Engine, Charges]],
    conn: HTTPConnection,
    decision: RequestDecision | None,
    asked: Asked | None,
) -> Sequence[tuple[Engine, Charges]]:
    """The charges *found* that are due, beside those that the *decision* on the request has made.

    Args:
        asked: What the request's body asks of a model, where a rule wants to know.
    """
    if check_names(decision, [charges for _, charges in found]):
        # The very same limit is charged once.
        found = [(engine, _unknown(charges, engine, decision)) for engine, charges in found]
    return [(engine, await _priced(charges, engine, conn, asked)) for engine, charges in found]


async def charges_on_route(
    behind: Plan | None, charges: Charges, conn: HTTPConnection, engine: Engine
) -> tuple[Charges, Asked | None]:
    """*charges* of a request to an endpoint, and those that its body says,
    and what that asks of a model.
    """
    asks = charges.has_tokens or (behind is not None and behind.has_tokens)
    readers = () if behind is None else behind.readers
    asked = await look_on_route(conn, engine.settings.RATE_LIMIT_BODY_CAP, readers, asks=asks)
    if asked is NO_BODY:
        return without_tokens(charges), None
    if behind is not None:
        charges = engine.plans.together(charges, await behind.charges(conn.scope))
    return charges, asked


def _unknown(charges: Charges, engine: Engine, decision: RequestDecision | None) -> Charges:
    """The *charges* by some policy that a request was not put to already."""
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


async def _priced(charges: Charges, engine: Engine, conn: HTTPConnection, asked: Asked | None) -> Charges:
    """*charges* at what their callables, if they have any, say they cost, or are taken to cost."""
    if not charges.is_priced:
        return charges
    costs: list[int | Charge] = []
    for at in charges.unpriced:
        charge = charges[at]
        price = charge.price
        if price is None:
            costs.append(await estimate(charge, conn.scope, asked, conn))
        else:
            said = price.cost(conn)
            cost = check_cost(await said if isawaitable(said) else said)
            costs.append(cost)
            price.note_cost(charge.policies, cost)
    priced: Charges = engine.plans.priced(charges, costs)
    return priced
