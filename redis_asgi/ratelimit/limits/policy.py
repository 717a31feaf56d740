"""The nouns of a limit: what is allowed (`Policy`),
who shares it (`Partition`), and one use of it (`Charge`).
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import field as attribute
from functools import lru_cache
from typing import Literal, TypeAlias

from ...keys import digest, partition_key
from ...settings import StrategyName

# Part of every field's name, so that a new layout never reads an old one's numbers.
LAYOUT = 1
_LETTERS: dict[str, str] = {"fixed-window": "f", "sliding-window-counter": "s", "moving-window": "m", "gcra": "g"}
STRATEGIES: tuple[str, ...] = tuple(_LETTERS)
_LETTERS["concurrency"] = "c"
Strategy: TypeAlias = StrategyName | Literal["concurrency"]
MICROSECONDS = 1_000_000
# How long Redis takes a request for one in flight unless it is told so again, in seconds.
LEASE = 30
# The cost of a charge that takes whatever is left.
WHAT_REMAINS = -1


def bulk(value: bytes) -> bytes:
    """*value* as a RESP bulk string, the form of every argument of a command."""
    return b"$%d\r\n%b\r\n" % (len(value), value)


@lru_cache(maxsize=4096)
def bulk_int(number: int) -> bytes:
    """A whole *number* likewise: a cost, or a count, most of which come again."""
    return bulk(b"%d" % number)


CONSUME = bulk(b"consume")
ONE = bulk(b"1")


@dataclass(frozen=True, slots=True)
class Policy:
    """A named quota per window, counted by one strategy.

    Attributes:
        name: What ``RateLimit-Policy`` calls it; the counter belongs to this name.
        quota: Units allowed per window, or requests in flight, up to 10^9; 0 refuses every request.
        window: Seconds, whole; 0 for ``concurrency``.
        shadow: Counted and reported, but never refuses.
        field: Its field in the partition's hash.
    """

    name: str
    quota: int
    window: int
    strategy: Strategy = "fixed-window"
    shadow: bool = False
    field: bytes = attribute(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        name = f"{self.name}:{_LETTERS[self.strategy]}{self.window}:{LAYOUT}"
        object.__setattr__(self, "field", name.encode())


class PolicySet:
    """The policies of one rule, which are charged together. Do not change it.

    Attributes:
        spec: What the script is told about them.
        resp: The same in RESP, as it is sent.
        logs: The fields of those that keep a list or a set beside the hash.
        enforces: Whether one of them may refuse.
        all_enforce: Whether each of them may.
        holds: Whether one of them counts requests in flight.
        least: The smallest quota.
        names: What they are called.
    """

    __slots__ = ("all_enforce", "enforces", "holds", "least", "logs", "names", "policies", "resp", "spec")

    def __init__(self, policies: tuple[Policy, ...]) -> None:
        self.policies = policies
        self.spec = b"\n".join(
            b"%s %d %d %d %s"
            % (_LETTERS[p.strategy].encode(), p.quota, (p.window or LEASE) * MICROSECONDS, p.shadow, p.field)
            for p in policies
        )
        self.resp = bulk(self.spec)
        self.logs = tuple(p.field for p in policies if p.strategy in ("moving-window", "concurrency"))
        self.holds = any(policy.strategy == "concurrency" for policy in policies)
        self.enforces = not all(policy.shadow for policy in policies)
        self.all_enforce = not any(policy.shadow for policy in policies)
        self.least = min((policy.quota for policy in policies), default=0)
        self.names = tuple(policy.name for policy in policies)

    def __iter__(self) -> Iterator[Policy]:
        return iter(self.policies)

    def __len__(self) -> int:
        return len(self.policies)


@dataclass(frozen=True, slots=True)
class Partition:
    """The clients that share a counter: a kind (``ip``, ``header:NAME``,
    ``user``, ``custom``) and a value.

    Attributes:
        key: The Redis key of the hash that holds all its counters.
        resp: The key in RESP, as it is sent.
        label: What may be shown of it: an address,
            or the kind and 8 hex digits, never a credential.
    """

    kind: str
    value: str = attribute(repr=False)
    key: bytes
    label: str
    resp: bytes = attribute(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "resp", bulk(self.key))


def make_partition(
    kind: str, value: str, *, prefix: str = "", secret: str | None = None, plain: bool = False
) -> Partition:
    """Name the partition of *value*;
    a *plain* one (an address) stands in its key as it is unless there is a secret.

    The kind is hashed with the value, so that an API key that looks like an address is not one.
    """
    hashed = digest(kind, value, secret=secret)
    tag = value if plain and secret is None else hashed
    label = value if plain else f"{kind}:{base64.urlsafe_b64decode(hashed + '==').hex()[:8]}"
    return Partition(kind, value, partition_key(prefix, tag), label)


def log_key(partition: bytes, field: bytes) -> bytes:
    """The key beside a partition's hash of one moving window's stamps,
    or of one concurrency limit's leases.
    """
    return partition + b":" + field
