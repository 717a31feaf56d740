"""Plans: the rules that cover a request (`Plans`),
and what each of them charges its client (`Plan`).
"""

from collections.abc import Callable, Iterable, Sequence
from inspect import isawaitable
from typing import Any, TypeAlias

from starlette.requests import HTTPConnection
from starlette.types import Scope

from ...asgi.offer import Offer
from ...asgi.scope import Addressing, is_preflight
from ...settings import Settings
from ..limits.charge import Charge, Charges, Unread, at_cost
from .compiled import CompiledRule
from .recent import Recent
from .routing import Routing

# A plan, then of each of its rules whom it counts (and by which policies, where those may change).
AskedKey: TypeAlias = tuple[Any, ...]
ChargesKept: TypeAlias = Recent[AskedKey, Charges]
# What makes, of some charges, what makes ready with each reply whatever an answer will say of it.
Renderer: TypeAlias = Callable[[Charges], Callable[[Sequence[int]], Any]]
# One generation of each, in bytes, about: charges of 8,000 clients at least,
# where they are short and the rule is one.
_CHARGES_KEPT = 16_000_000
_SHAPES_KEPT = 1_000_000
_RULES_KEPT = 10_000


def _weight(asked: AskedKey) -> int:
    """The bytes that the charges of *asked* take, with four for each character that a client sent."""
    return sum(map(_weight_of, asked))


def _weight_of(part: Any) -> int:
    if isinstance(part, Charges):  # what is priced holds whom they name
        part = tuple(charge.partition.value for charge in part)
    if isinstance(part, tuple):
        return _weight(part)
    return 1000 + 4 * len(part) if isinstance(part, str) else 700


def charges_kept(_settings: Settings) -> ChargesKept:
    """The charges that one manager keeps, for all whose plans it serves:
    see `RedisManager.per_process`.

    So that it is one bound for a process however many limits it has,
    each of which may be asked by every client.
    """
    return Recent(_CHARGES_KEPT, _weight)


class Plan:
    """The rules that requests of one shape are put to.

    Attributes:
        rules: All of them, those *behind* last.
        counts_users: Whether one of them counts by the user whom a middleware has put in the scope.
        behind: The plan of those that count by the body,
            which is asked once that is read; ``None`` where none does.
        readers: What they count by of the body, of a plan that is *behind*.
        has_tokens: Whether the cost of one of them is known after the answer only.
    """

    def __init__(self, rules: Sequence[CompiledRule], cache: "PlanCache", behind: "Plan | None" = None) -> None:
        self.behind = behind
        self.rules: tuple[CompiledRule, ...] = (*rules, *(behind.rules if behind is not None else ()))
        self.readers = tuple(dict.fromkeys(reader for rule in rules for reader in rule.readers))
        self.has_tokens = any(rule.tokens is not None for rule in rules)
        self.counts_users = any(rule.partition.counts_users for rule in self.rules)
        self._cache = cache
        self._kept = cache.charges
        self._steps = tuple((rule.limits_of, rule.partition.read, rule.partition, rule) for rule in rules)
        self._asks_user = any(rule.asks_user for rule in rules)
        # What says which client it is, where no callable of the user's has to be asked.
        reads: list[Any] = [] if self._asks_user else [rule.partition.read for rule in rules]
        self._read, self._more_reads = reads[0] if reads else None, reads[1:]
        self._nothing = None if rules else self._charge((self,))

    def known(self, scope: Scope) -> Charges | None:
        """`charges` of a client that has come before,
        where no callable of the user's has to say which one it is.
        """
        read = self._read
        if read is None:
            return self._nothing
        if not self._more_reads:
            return self._kept.young.get((self, read(scope)))
        return self._kept.young.get((self, read(scope), *[more(scope) for more in self._more_reads]))

    async def charges(self, scope: Scope) -> Charges:
        """The charges of a request, but for what is *behind*; empty where no rule applies to it.

        Raises:
            MissingIdentity: No identity, and the setting says to refuse.
        """
        # What it is charged depends on this alone, so that a client who comes again finds it ready.
        asked: list[Any] = [self]
        conn: Any = HTTPConnection(scope) if self._asks_user else None
        for limits, read, partition, rule in self._steps:
            said = None
            if limits is not None:
                said = limits(conn)
                if type(said) is not str and isawaitable(said):
                    said = await said
                if said is None:  # not limited
                    asked.append(None)
                    continue
            name: Any = read(scope) if read is not None else partition.by(conn)
            if type(name) is not str:
                name = await partition.settle(name, scope)
            asked.append(name if limits is None or name is None else (rule.last.read(said, partition.of(name)), name))
        key = tuple(asked)
        return self._kept.of(key, self._charge)

    def _charge(self, asked: AskedKey) -> Charges:
        both = zip(self._steps, asked[1:], strict=True)
        charges = self._cache.make(rule.charge(name) for (*_, rule), name in both if name is not None)
        charges.is_ready = charges.is_ready and self.behind is None
        return charges


class PlanCache:
    """The plans that one engine decides, by their rules, and the charges of all.

    Args:
        addressing: Whose addresses are believed, where no middleware has said so.
        charges: Where charges are kept, see `charges_kept`.
        renderer: For what answers say of a reply and nothing else; ``None``:
            they are made when they are needed.

    Attributes:
        rules: Those that were made during a request, by what they were made of.
    """

    def __init__(self, addressing: Addressing, charges: ChargesKept, renderer: Renderer | None = None) -> None:
        self.offer = Offer(addressing=addressing)
        self.charges = charges
        self.rules: Recent[tuple[Any, ...], CompiledRule] = Recent(_RULES_KEPT, len)
        self._plans: Recent[tuple[CompiledRule, ...], Plan] = Recent(_RULES_KEPT, len)
        self._renderer = renderer

    def of(self, rules: tuple[CompiledRule, ...]) -> Plan:
        """The plan of *rules*."""
        return self._plans.young.get(rules) or self._plans.find(rules, self._plan)

    def _plan(self, rules: tuple[CompiledRule, ...]) -> Plan:
        behind = tuple(rule for rule in rules if rule.readers)
        if not behind:
            return Plan(rules, self)
        return Plan([rule for rule in rules if not rule.readers], self, Plan(behind, self))

    def make(self, charges: Iterable[Charge]) -> Charges:
        """*charges* with what their answers need."""
        made = Charges(charges)
        if self._renderer is not None:
            made.render = self._renderer(made)
        return made

    def together(self, charges: Charges, behind: Charges) -> Charges:
        """*charges* and those that were found out *behind* them, to be decided together."""
        if not charges.counters or not behind.counters:
            return charges if charges.counters else behind
        asked = (charges, behind)
        return self.charges.of(asked, lambda _: self.make((*charges, *behind)))

    def least(self, charges: Charges) -> Charges:
        """The *charges* that cost the same, or at least so much,
        whatever the body says, at that cost.
        """
        if not charges.is_priced:
            return charges

        def make(_: object) -> Charges:
            known = (charge for charge in charges if charge.price is None)
            # No estimate is less than a unit.
            return Charges(charge if charge.budget is None else at_cost(charge, 1) for charge in known)

        asked = (charges,)
        return self.charges.of(asked, make)

    def priced(self, charges: Charges, costs: Sequence[int | Unread | Charge]) -> Charges:
        """*charges* at these *costs*: see `Charges.at`."""
        # What is estimated, and what cannot be read, is each time another.
        if charges.has_tokens or any(isinstance(cost, Unread) for cost in costs):
            return charges.at(costs)
        asked = (charges, *costs)
        return self.charges.of(asked, lambda _: charges.at(costs))


class Plans:
    """The plans of one middleware, by the shape of a request: its type and method,
    and its path where a rule has any.

    Args:
        routing: The routers of the wrapped app, for what they may take the path for.
    """

    def __init__(self, rules: Iterable[CompiledRule], routing: Routing, cache: PlanCache) -> None:
        self._rules = tuple(rules)
        self._routing = routing
        self._cache = cache
        self._has_paths = any(rule.has_paths for rule in self._rules)
        self._by_shape: Recent[tuple[str, ...], Plan] = Recent(
            _SHAPES_KEPT, lambda shape: 300 + 4 * len("".join(shape))
        )

    def of(self, scope: Scope) -> Plan:
        """The plan of a request."""
        shape: tuple[str, ...] = (scope["type"], scope.get("method", ""))
        if self._has_paths:
            shape = (*shape, scope["path"], scope.get("root_path", ""))
        return self._by_shape.young.get(shape) or self._find(shape, scope)

    def _find(self, shape: tuple[str, ...], scope: Scope) -> Plan:
        if shape[1] == "OPTIONS":  # is never found as it is
            shape = ("preflight" if is_preflight(scope) else "OPTIONS as such", *shape)
        return self._by_shape.young.get(shape) or self._by_shape.find(shape, lambda _: self._make(scope))

    def _make(self, scope: Scope) -> Plan:
        spelled = self._routing.spellings(scope) if self._has_paths else ()
        return self._cache.of(tuple(rule for rule in self._rules if rule.covers(scope, spelled)))
