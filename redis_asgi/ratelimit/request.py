"""What the rules make of one request: the charges of those that cover it, decided together."""

from collections.abc import Sequence
from dataclasses import replace
from inspect import isawaitable

from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope

from ..scope import BufferedRequest, UnreadableBody
from .engine import Engine, Verdict
from .ledger import RequestDecision, check_names
from .lint import Linter
from .policy import Charge, Charges, PolicySet, Unread
from .routing import Routing
from .rules import CompiledRule, check_cost


class RuleCheck:
    """One request on its way through the rules.

    Args:
        routing: The routers of the wrapped app, for what they may take the path for.
        body_cap: The most a cost callable may read of the body, in bytes.
        outer: What an outer instance has put this request to already.

    Attributes:
        receive: What the app is to receive from: with a body that was read ahead in front.
    """

    __slots__ = ("_body_cap", "_engine", "_linter", "_outer", "_routing", "_rules", "_scope", "receive")

    def __init__(
        self,
        rules: Sequence[CompiledRule],
        routing: Routing,
        engine: Engine,
        linter: Linter,
        body_cap: int,
        scope: Scope,
        receive: Receive,
        outer: RequestDecision | None,
    ) -> None:
        self._rules = rules
        self._routing = routing
        self._engine = engine
        self._linter = linter
        self._body_cap = body_cap
        self._scope = scope
        self._outer = outer
        self.receive = receive

    async def decide(self) -> Verdict | None:
        """The verdict of every rule that covers the request; ``None`` when there is none left to ask.

        Raises:
            MissingIdentity: A rule's identity is missing and the setting says to refuse.
        """
        spelled = self._routing.spellings(self._scope)
        asked: list[tuple[CompiledRule, Charge]] = []
        for rule in self._rules:
            if rule.covers(self._scope, spelled):
                charge = await self._charge(rule)
                if charge is not None and self._outer is not None:
                    charge = self._left_over(charge, self._outer)
                if charge is not None:
                    asked.append((rule, charge))
        if not asked:
            return None
        if any(callable(rule.cost) for rule, _ in asked):
            # A refusal that is known already spares the reading of a body.
            known = self._engine.remembered(Charges(charge for rule, charge in asked if not callable(rule.cost)))
            if known is not None:
                return known
        return await self._engine.decide(Charges([await self._priced(rule, charge) for rule, charge in asked]))

    async def _charge(self, rule: CompiledRule) -> Charge | None:
        """What a rule that has something to call asks of this request; a callable cost is found later."""
        found = await rule.ask(HTTPConnection(self._scope))
        if found is None:
            return None
        policies, partition = found
        return rule.charge(policies, partition, rule.cost if isinstance(rule.cost, int) else 0)

    async def _priced(self, rule: CompiledRule, charge: Charge) -> Charge:
        """*charge* at the cost the rule's callable says; what cannot be read takes what remains."""
        if isinstance(rule.cost, int):
            return charge
        request = BufferedRequest(self._scope, self.receive, cap=self._body_cap)
        try:
            said = rule.cost(request)
            cost = check_cost(await said if isawaitable(said) else said)
        except UnreadableBody:
            cost = 1
        finally:
            self.receive = request.replay()
            await request.close()  # the files of a form
        if not request.unreadable:
            rule.note_cost(charge.policies, cost)
            return replace(charge, cost=cost)
        # A body that is too big to look at must never be the cheap one, whatever the callable made of it.
        unread = Unread()
        unread.is_abandoned = request.is_abandoned
        self.receive = _watching(self.receive, unread)
        return replace(charge, cost=1, unread=unread)

    def _left_over(self, charge: Charge, outer: RequestDecision) -> Charge | None:
        """*charge* without the policies that an outer instance has put this request to already."""
        # A request that the app sends itself through this very instance counts again.
        check_names(outer, (charge,), but_by=self._engine)
        fresh = tuple(
            policy
            for policy in charge.policies
            if not outer.ledger.has_asked(self._engine.manager, charge.partition, policy, but_by=self._engine)
        )
        if len(fresh) == len(charge.policies):
            return charge
        self._linter.mounted_twice()
        return replace(charge, policies=PolicySet(fresh)) if fresh else None


def _watching(receive: Receive, unread: Unread) -> Receive:
    """*receive*, which notes in *unread* that the client has gone."""

    async def watching() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect":
            unread.is_abandoned = True
        return message

    return watching
