"""Replies of the script and its twin about one request: numbers in a row,
and the one reader of their places.
"""

from typing import NamedTuple, TypeAlias

# 1 admitted | 0 refused, then the `Numbers` of each counter,
# in the order of the charges and their policies.
Reply: TypeAlias = list[int]
VALUES_PER_COUNTER = 5


class Numbers(NamedTuple):
    """One counter's part of a reply.

    Attributes:
        fits: 1 | 0 whether it admits the cost by itself;
            of a charge that takes what remains, how much that was.
        remaining: The largest cost admitted now (units).
        reset: Until the full quota is back (us).
        retry: Until the same cost is admitted (us); -1 = it never can be.
        receipt: What gives the charge back (us).
    """

    fits: int
    remaining: int
    reset: int
    retry: int
    receipt: int


def numbers_of(reply: Reply) -> list[Numbers]:
    """A reply, counter by counter."""
    return [Numbers(*reply[at : at + VALUES_PER_COUNTER]) for at in range(1, len(reply), VALUES_PER_COUNTER)]


def reply_of(admitted: bool, numbers: list[Numbers]) -> Reply:
    """The other way round."""
    return [int(admitted), *(value for each in numbers for value in each)]


def size_of(counters: int) -> int:
    """The length of a reply about so many *counters*."""
    return 1 + VALUES_PER_COUNTER * counters


def place_of(counter: int) -> int:
    """The place of `remaining` of a reply's n-th *counter*; `reset` and `retry` follow."""
    return 2 + VALUES_PER_COUNTER * counter


def charged_receipts(reply: Reply) -> list[int]:
    """The receipts of an admitting *reply*,
    -1 for a shadow policy that would have refused and was not charged.
    """
    counters = range(len(reply) // VALUES_PER_COUNTER)
    return [reply[receipt_at(counter)] if reply[fits_at(counter)] else -1 for counter in counters]


def fits_at(counter: int) -> int:
    """The place of `fits` of a reply's n-th *counter*."""
    return 1 + VALUES_PER_COUNTER * counter


def fits_of(reply: Reply) -> list[int]:
    """`fits` of each counter of a *reply*."""
    return reply[1::VALUES_PER_COUNTER]


def receipt_at(counter: int) -> int:
    """The place of `receipt` of a reply's n-th *counter*."""
    return VALUES_PER_COUNTER + VALUES_PER_COUNTER * counter
