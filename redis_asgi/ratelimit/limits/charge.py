"""One use of a limit (`Charge`), and all that a request is charged (`Charges`)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from ...settings import OnRedisError
from .policy import CONSUME, WHAT_REMAINS, Partition, Policy, PolicySet, bulk, bulk_int, log_key
from .reply import size_of


class Unread:
    """A body whose cost could not be read, while its request is under way.

    Attributes:
        is_abandoned: Whether the client has gone before the answer began.
    """

    __slots__ = ("is_abandoned",)

    def __init__(self) -> None:
        self.is_abandoned = False


class Pricer(Protocol):
    """A rule whose cost is known only with the request: *cost* says it, `note_cost` is told."""

    cost: Any

    def note_cost(self, policies: PolicySet, cost: int) -> None:
        """Take note of what a request costs under *policies*."""


@dataclass(slots=True, eq=False)
class Charge:
    """The policies of one rule, applied to one partition,
    at one cost in units of their quota. Do not change it.

    It is not frozen, since some are made for each request,
    and a frozen one takes four times as long to make.

    Attributes:
        cost: With *unread* what it costs at least, and in the end where the app turns it down.
        on_redis_error: What its rule wants when Redis does not answer.
        count_if: Given the response's status, whether the charge stays.
        label: What its policies are counted as, where their names are not known before the request.
        unread: The body that could not be priced: it takes what remains of the smallest quota.
        price: The rule that says the cost,
            where that is not known before the request; *cost* is 0 until then.
        budget: The `Budget` that estimates the cost,
            where that is known only after the answer; *cost* is 0 before that.
        estimate: Its `Estimate`; ``None`` before that.
    """

    policies: PolicySet
    partition: Partition
    cost: int = 1
    on_redis_error: OnRedisError = "local"
    count_if: Callable[[int], bool] | None = None
    label: str | None = None
    unread: Unread | None = None
    price: Pricer | None = None
    budget: Any = None
    estimate: Any = None

    def taken(self, fits: int) -> int:
        """The units that a policy was charged which replied that it *fits*."""
        return fits if self.unread is not None else self.cost if fits else 0


def at_cost(charge: Charge, cost: int | Unread) -> Charge:
    """*charge* when its cost is known, or known to be unreadable."""
    units, unread = (1, cost) if isinstance(cost, Unread) else (cost, None)
    # Not `replace`, which takes as long as all the rest of it.
    return Charge(
        charge.policies, charge.partition, units, charge.on_redis_error, charge.count_if, charge.label, unread
    )


class Charges(Sequence[Charge]):
    """The charges of one request, which are decided together,
    with what every decision needs of them kept ready.

    A client whose requests are always charged alike keeps one of these,
    so that a request builds none.

    Attributes:
        counters: How many counters they touch.
        keys: Their keys in RESP, as they are sent.
        key_count: How many those are.
        consume: The whole question about them in RESP, as it is sent, in the one mode that is asked
            often.
        sets: The policies of each.
        names: What each counter's decisions are counted as.
        words: How many arguments the question is.
        reply_size: How many numbers the answer is.
        all_enforcing: Whether all of them may refuse,
            so that a request that is admitted was admitted by each.
        status_decides: Whether the response's status decides if they stay.
        is_conditional: Whether they may stay or not:
            by that status, or as one of them is *unread* or estimated.
        unread: Whether one of them holds what remains, for a body that could not be read.
        is_spread: Whether they are of several partitions.
        is_ready: Whether they are all there is to decide about the request,
            at known costs, and hold nothing.
        unpriced: The places of those whose cost is still to be asked for.
        is_priced: Whether there are any.
        has_tokens: Whether the cost of one of them is known after the answer only, and still to be
            estimated.
        starts: The number of the first counter of each.
        spent: Those that are charged at an estimate, each with that number.
        holds: Whether one of them counts requests in flight,
            so that an admission is held until the request ends.
        admission: The counters of their admission, kept by `metrics`.
        render: Makes what an answer says of a reply to them; ``None`` where nothing is said of it.
        known: The one thing that `refusal_memory` last found to refuse them, alone;
            it says itself how long it holds.
    """

    # What most of them say, so that those that are made for each request set less.
    admission: Any = None
    render: Callable[[Sequence[int]], Any] | None = None
    known: Any = None
    spent: Sequence[tuple[int, Charge]] = ()
    is_priced = has_tokens = holds = is_spread = status_decides = unread = False
    is_conditional = is_ready = False

    def __init__(self, charges: Iterable[Charge] = ()) -> None:
        self._each = each = tuple(charges)
        keys: list[bytes] = []
        names: list[str] = []
        self._terms = terms = [CONSUME, bulk_int(len(each))]
        self.starts: list[int] = []
        self.unpriced: list[int] = []
        for at, charge in enumerate(each):
            self.starts.append(len(names))
            policies, partition = charge.policies, charge.partition
            keys.append(partition.resp)
            if policies.logs:
                keys += [bulk(log_key(partition.key, field)) for field in policies.logs]
            terms += policies.resp, bulk_int(charge.cost if charge.unread is None else WHAT_REMAINS)
            names += policies.names if charge.label is None else [charge.label] * len(policies.names)
            if charge.price is not None or (charge.budget is not None and charge.estimate is None):
                self.unpriced.append(at)
        self.sets = tuple([charge.policies for charge in each])
        self.counters = len(names)
        self.words = 2 + 2 * len(each)
        self.reply_size = size_of(len(names))
        self.keys = b"".join(keys)
        self.key_count = len(keys)
        self.consume = b"".join(terms)
        self.names = tuple(names)
        self.all_enforcing = all(policies.all_enforce for policies in self.sets)
        self.holds = any(policies.holds for policies in self.sets)
        self.status_decides = any(charge.count_if is not None for charge in each)
        self.unread = any(charge.unread is not None for charge in each)
        self.spent = [spent for spent in zip(self.starts, each, strict=True) if spent[1].estimate is not None]
        self.is_conditional = self.status_decides or self.unread or bool(self.spent)
        self.is_spread = len({charge.partition.key for charge in each}) > 1
        self.is_priced = bool(self.unpriced)
        self.has_tokens = any(each[at].budget is not None for at in self.unpriced)
        self.is_ready = bool(each) and not self.is_priced and not self.holds

    @classmethod
    def plain(cls, charges: Sequence[Charge]) -> "Charges":
        """*charges* at known costs that stay: what settles others, made for each request."""
        keys: list[bytes] = []
        terms = [CONSUME, bulk_int(len(charges))]
        counters = 0
        for charge in charges:
            policies = charge.policies
            if policies.logs or charge.label is not None:
                return cls(charges)
            keys.append(charge.partition.resp)
            terms += policies.resp, bulk_int(charge.cost)
            counters += len(policies.policies)
        made = cls.__new__(cls)
        made._each = tuple(charges)
        made.keys, made.key_count, made.words = b"".join(keys), len(keys), 2 + 2 * len(keys)
        made.counters, made.reply_size = counters, size_of(counters)
        made.consume = b"".join(terms)
        made.is_spread = len(keys) > 1 and len(set(keys)) > 1
        made.sets, made.names, made.all_enforcing = (), (), False  # not asked for of these
        made.is_ready = True
        return made

    def at(self, costs: Sequence[int | Unread | Charge]) -> "Charges":
        """The same at the *costs* of what is `unpriced`, or of it estimated,
        in a small part of the time that it takes to make them.
        """
        each, terms = [*self._each], [*self._terms]
        spent: list[tuple[int, Charge]] = []
        unread = False
        for at, cost in zip(self.unpriced, costs, strict=True):
            if isinstance(cost, Charge):
                charge, units = cost, cost.cost
                spent.append((self.starts[at], charge))
            else:
                charge = at_cost(each[at], cost)
                unread = unread or charge.unread is not None
                units = charge.cost if charge.unread is None else WHAT_REMAINS
            # Behind the mode and their number: of each its policies, then its cost.
            each[at], terms[2 * at + 3] = charge, bulk_int(units)
        made = Charges.__new__(Charges)
        made.__dict__ = self.__dict__.copy()
        made._each = tuple(each)
        made.consume = b"".join(terms)
        made.spent, made.unread = spent, unread
        made.is_conditional = self.status_decides or unread or bool(spent)
        made.is_priced = made.has_tokens = False
        made.is_ready = not self.holds
        return made

    @property
    def terms(self) -> bytes:
        """Their number, policies and costs in RESP, as they are sent."""
        return self.consume[len(CONSUME) :]

    @cached_property
    def limits(self) -> frozenset[tuple[bytes, bytes]]:
        """The limits that they are about: partition and policies of each."""
        return frozenset((charge.partition.key, charge.policies.spec) for charge in self._each)

    @cached_property
    def in_flight(self) -> "Charges":
        """The charges among them that count requests in flight."""
        return Charges(charge for charge in self._each if charge.policies.holds)

    def __getitem__(self, at: Any) -> Any:
        return self._each[at]

    def __iter__(self) -> Iterator[Charge]:
        return iter(self._each)

    def __len__(self) -> int:
        return len(self._each)


def counters_of(charges: Iterable[Charge]) -> list[tuple[Charge, Policy]]:
    """The counters that *charges* touch, in the order in which a reply tells of them."""
    return [(charge, policy) for charge in charges for policy in charge.policies.policies]


def by_partition(charges: Iterable[Charge]) -> dict[bytes, list[Charge]]:
    """*charges* by the keys of their partitions,
    each of which may live on another node of a cluster.
    """
    parts: dict[bytes, list[Charge]] = {}
    for charge in charges:
        parts.setdefault(charge.partition.key, []).append(charge)
    return parts
