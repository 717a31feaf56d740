"""Tokens: what the app counted for an answer, split over its inputs,
and put together again for another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..records.codec import Flag, Value
from ..wire import Input, Usage

_TOKENS_KNOWN = Flag.TOKENS_KNOWN
_TOKENS = Flag.TOKENS_KNOWN | Flag.TOKENS_EXACT
_BYTES_PER_TOKEN = 4  # where the app counts, but did not when a vector was stored
_AROUND_INPUT = _BYTES_PER_TOKEN  # beside its least of 1: most models put a token before and one behind each input


@dataclass(frozen=True, slots=True)
class TokenCount:
    """The tokens of one input, and whether that is the app's own count or a share of it."""

    tokens: int
    exact: bool


def apportion(total: int | None, inputs: Sequence[Input]) -> list[TokenCount] | None:
    """Split the app's count over *inputs*: exact where it is known,
    else by length with the sum kept.

    It is known for one input, for none counted, and for token arrays whose lengths add up to
    *total*. An estimated share is at least 1 where *total* is enough for all.
    """
    if total is None:
        return None
    if len(inputs) == 1 or not total:
        return [TokenCount(total, exact=True)] * len(inputs)
    lengths = [item.tokens for item in inputs]
    known = [length for length in lengths if length is not None]
    if len(known) == len(inputs) and sum(known) == total:
        return [TokenCount(length, exact=True) for length in known]
    least = 1 if total >= len(inputs) else 0
    left = total - least * len(inputs)
    sizes = [
        _AROUND_INPUT + (len(item.canonical) if item.tokens is None else item.tokens * _BYTES_PER_TOKEN)
        for item in inputs
    ]
    # Rounding the running sum, not the shares, keeps the total.
    whole, shares, given, seen = sum(sizes), [], 0, 0
    for size in sizes:
        seen += size
        upto = (2 * left * seen + whole) // (2 * whole)
        shares.append(TokenCount(least + upto - given, exact=False))
        given = upto
    return shares


def count_all(slots: Sequence[bytes], values: Mapping[bytes, Value], inputs: Mapping[bytes, Input]) -> tuple[int, int]:
    """The tokens that the app would have counted for all inputs,
    and those that it did count itself.

    Args:
        slots: One key per input sent.
        values: The vectors by key.
        inputs: The inputs by key.
    """
    counted = guessed = 0
    for name in slots:
        value = values[name]
        if value.flags & _TOKENS_KNOWN:
            counted += value.tokens
        else:
            guessed += max(1, len(inputs[name].canonical) // _BYTES_PER_TOKEN)
    if not counted and any(values[name].flags & _TOKENS == _TOKENS_KNOWN for name in slots):
        # Shares of less than one token for each: together they are not nothing.
        counted = 1
    return counted + guessed, counted


def reported(tokens: int, billed: int, mode: Literal["original", "billed"], *, counted: int | None = None) -> Usage:
    """The usage to report: of *tokens* in all, the app has counted *billed* for this request.

    Args:
        counted: What the app's last answer says; when that is all of *billed*,
            its own words are those to repeat.
    """
    if mode == "original":
        return Usage(tokens)
    return Usage(None if counted == billed else billed, max(0, tokens - billed))
