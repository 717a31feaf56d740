"""Budgets in tokens: what a request is charged before that is known,
and what it has cost once its answer has ended.

Sums are exact, and rounded up once: within an `Estimate` they are whole numbers of very small parts
of a unit, whose size the weights decide.
"""

import difflib
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from dataclasses import field as attribute
from fractions import Fraction
from typing import TypeAlias

from starlette.requests import Request

from ...errors import ConfigurationError
from ...misuse import check_callable, says_what_was_meant, shown
from .estimates import Asked, Estimate, Outputs
from .usage import UsageReader
from .usage_formats import MOST, PARTS, Usage

EstimateBy: TypeAlias = int | Callable[[Request], int | Awaitable[int]]

UNKNOWN_OUTPUT = 1000  # tokens, where neither the request nor answers before say more
_SHARE = 4  # an output alone is taken for no more than one in so many units of a quota
# What counts like what, unless it has a weight of its own.
_LIKE = {"cached": "input", "cache_write": "input", "reasoning": "output"}
_ELSEWHERE = {
    "cache_creation": "cache_write",
    "cache_read": "cached",
    "completion": "output",
    "completion_tokens": "output",
    "prompt": "input",
    "prompt_tokens": "input",
    "thinking": "reasoning",
}


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """A cost in tokens, made by `tokens`: give it to ``Rule(cost=...)``.

    Attributes:
        estimate: As given.
        weights: Units of the quota per token, for each of the five parts.
    """

    estimate: EstimateBy | None
    weights: Mapping[str, float]
    _factors: Mapping[str, int] = attribute(repr=False)
    _unit: int = attribute(repr=False)  # of the quota, in the parts that sums are kept in

    def estimated(self, document: object, *, quota: int, outputs: Outputs | None = None) -> Estimate:
        """The estimate of a request: of its input, and of the output that it lets the model write.

        Args:
            document: Its body as JSON made it, or what that asks for.
            quota: The smallest of its rule, in units.
                The output alone is no more than a quarter of it.
            outputs: How long the answers of its rule and bucket were.
        """
        said = document if type(document) is Asked else Asked.by(document)
        output, likely = said.output, outputs.likely if outputs is not None else None
        if output is None:
            output = UNKNOWN_OUTPUT if likely is None else likely
        elif likely is not None and likely < output:
            output = likely
        written = min(4 * output * self._factors["output"], self._share(quota))
        return self._bounded(said.quarters * self._factors["input"], written, quota)

    def estimated_unread(self, content_length: int | None, *, quota: int) -> Estimate:
        """The estimate of a request whose body cannot be read.

        Args:
            content_length: In bytes; ``None``, or less than 0: unknown, and as much as it may be.
            quota: The smallest of its rule, in units. The estimate is no more than a quarter of it.
        """
        share = self._share(quota)
        known = content_length is not None and content_length >= 0
        return self._bounded(min((content_length or 0) * self._factors["input"], share) if known else share, 0, quota)

    def estimated_as(self, units: int, document: object = None, *, quota: int) -> Estimate:
        """The estimate that the app gives itself: *units* of the quota, 0 or more, as they are.

        Args:
            document: Its body as JSON made it, or what that asks for:
                what it reads is part of them.
        """
        said = document if isinstance(document, Asked) else Asked.by(document)
        whole = min(units, quota) * self._unit
        read = min(said.quarters * self._factors["input"], whole)
        return self._bounded(read, whole - read, quota)

    def cost_of(self, usage: Usage, estimate: Estimate) -> int:
        """The cost of *usage*, in units; unknown parts cost their estimate. At most 2^53."""
        return self._rounded(self._parts_of(usage, estimate.input, estimate.output))

    def settled(self, estimate: Estimate, reader: UsageReader | None) -> int:
        """The cost of a request whose answer has ended, in units.

        What the answer says, first of all. Else nothing, if nothing has begun or the status is 400
        or more; the *estimate* if the answer is complete; and if it was cut, what it has read and a
        guess at what was sent, which is never more than the *estimate*.

        Args:
            reader: Of the answer, closed; ``None`` if none has begun.
        """
        if reader is None:
            return 0
        usage = reader.usage
        if usage is None:
            if reader.status >= 400:
                return 0
            if reader.complete:
                return estimate.cost
            usage = Usage()
        elif reader.complete or reader.output_is_known:
            return self.cost_of(usage, estimate)
        known = self._parts_of(usage, estimate.input, 0)
        written = int(4 * reader.output_of_cut()) * self._factors["output"]
        guessed = self._parts_of(usage._replace(output=None, reasoning=None), estimate.input, written)
        return self._rounded(max(known, min(guessed, estimate.cost * self._unit)))

    def _share(self, quota: int) -> int:
        return quota * self._unit // _SHARE

    def _bounded(self, read: int, written: int, quota: int) -> Estimate:
        read = min(read, quota * self._unit - written)
        return Estimate(-(-(read + written) // self._unit) or 1, read, written)

    def _rounded(self, parts: int) -> int:
        return min(MOST, -(-parts // self._unit))

    def _parts_of(self, usage: Usage, read: int, written: int) -> int:
        """*usage* in parts of a unit; *read* and *written* stand for what it does not say."""
        of = self._factors
        fresh, cached, cache_write, output, reasoning = usage
        if fresh is not None:
            read = 4 * fresh * of["input"]
        if output is not None:
            written = 4 * output * of["output"]
        parts = read + written
        if cached or cache_write or reasoning:
            more = (cached or 0) * of["cached"] + (cache_write or 0) * of["cache_write"]
            parts += 4 * (more + (reasoning or 0) * of["reasoning"])
        return parts


@says_what_was_meant("tokens(weights={'output': 4, 'cached': 0.1})")
def tokens(estimate: EstimateBy | None = None, weights: Mapping[str, float] | None = None) -> Tokens:
    """The cost of a rule that is a budget in tokens:
    it is known after the answer, and estimated before.

    ::

        Rule("100000/minute", name="tokens", cost=tokens(weights={"output": 4, "cached": 0.1}))

    The estimate is charged when a request is admitted; when its answer has ended, the difference to
    what it says it used. Only ``fixed-window`` and ``sliding-window-counter`` can give back.

    Args:
        estimate: Units of the quota that are charged before, at least 1 and at most the quota: a
            whole number, 0 or more, or a callable that says so, given the ``Request``. ``None``:
            what is in the body, at 4 bytes of text a token, and as long an answer as it asks for,
            or as nine of ten answers before it were.
        weights: Units of the quota per token, 0 or more, of ``input``, ``cached``, ``cache_write``,
            ``output`` and ``reasoning``, which do not overlap. 1 where left out, but ``cached`` and
            ``cache_write`` as ``input``, and ``reasoning`` as ``output``. The sum is rounded up.

    Raises:
        ConfigurationError: Names what cannot work.
    """
    if callable(estimate):
        check_callable("estimate", estimate, "request", "estimate=lambda request: 500")
    elif estimate is not None and (not isinstance(estimate, int) or isinstance(estimate, bool) or estimate < 0):
        raise ConfigurationError(
            f"estimate={shown(estimate)} is neither a whole number of units, 0 or more, nor a callable. "
            f"Try estimate=500, or leave it out."
        )
    given = _checked_weights(weights)
    whole = {part: given.get(part, given.get(_LIKE.get(part, part), 1)) for part in PARTS}
    if not any(whole.values()):
        raise ConfigurationError(f"weights={shown(weights)} makes every token free. Try weights={{'output': 4}}.")
    # As they are written: 0.1 is a tenth.
    exact = {
        part: Fraction(weight if isinstance(weight, int) else repr(float(weight))) for part, weight in whole.items()
    }
    denominator = math.lcm(*(weight.denominator for weight in exact.values()))
    factors = {part: int(weight * denominator) for part, weight in exact.items()}
    return Tokens(estimate, whole, factors, 4 * denominator)


def _checked_weights(weights: object) -> dict[str, float]:
    if weights is None:
        return {}
    if not isinstance(weights, Mapping):
        raise ConfigurationError(f"weights={shown(weights)} is no mapping. Try weights={{'output': 4}}.")
    for part, weight in weights.items():
        if part not in PARTS:
            meant = _ELSEWHERE.get(str(part)) or next(iter(difflib.get_close_matches(str(part), PARTS, n=1)), "output")
            raise ConfigurationError(
                f"weights has {shown(part)}, which is none of {', '.join(PARTS)}. Try {{{meant!r}: {shown(weight)}}}."
            )
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < math.inf:
            raise ConfigurationError(
                f"weights={{{part!r}: {shown(weight)}}} is not a finite number of units per token, 0 or more. "
                f"Try {{{part!r}: 1}}."
            )
    return dict(weights)
