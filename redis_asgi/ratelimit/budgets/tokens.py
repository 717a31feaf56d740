"""Budgets in tokens: what a request is charged before anybody knows, and what it has cost once its answer has ended.

Sums are exact, and rounded up once: within an `Estimate` they are whole numbers of very small parts of a unit, whose
size the weights decide.
"""

import difflib
import math
import re
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from dataclasses import field as attribute
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

from starlette.requests import Request

from ...errors import ConfigurationError
from ...misuse import check_callable, says_what_was_meant, shown
from .usage import UsageReader
from .usage_formats import MOST, PARTS, Usage

EstimateBy: TypeAlias = int | Callable[[Request], int | Awaitable[int]]

UNKNOWN_OUTPUT = 1000  # tokens, where neither the request nor answers before say more
_QUARTERS_OF_MEDIUM = 4 * 1000  # of a token, for an image, a sound or a document within a body
_REMEMBERED, _ENOUGH = 128, 20  # outputs
_SHARE = 4  # an output alone is taken for no more than one in so many units of a quota
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_DATA_URL = re.compile(r"data:(?:[\w.+-]+/[\w.+-]+)?(?:;[^;,\s]*)*,", re.ASCII | re.IGNORECASE)
# Beside base64 under "data" they say what it is.
_SAYS_MEDIUM = ("media_type", "mime_type", "mimeType", "format")
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


class Estimate(NamedTuple):
    """What a request is charged before its answer.

    Attributes:
        cost: Units of the quota, whole.
        input: What of it is for what is read; in parts of a unit, of `Tokens` alone to understand.
        output: What of it is for the answer; likewise.
    """

    cost: int
    input: int
    output: int


class Asked(NamedTuple):
    """What a request's body says of what it will cost; of a large body all that need be kept.

    Attributes:
        quarters: Of a token, that are read.
        output: See `asked_output`.
    """

    quarters: int
    output: int | None

    @classmethod
    def by(cls, document: object) -> "Asked":
        """What *document*, as JSON made it, asks for."""
        return cls(_quarters(document), asked_output(document))


class Outputs:
    """How long the last answers of one rule and bucket were, in this process; 128 numbers at most."""

    __slots__ = ("_last", "_sorted")

    def __init__(self) -> None:
        self._last: deque[int] = deque()
        self._sorted: list[int] = []

    def note(self, usage: Usage) -> None:
        """Remember the output of an answer, if it is known."""
        if usage.output is None:
            return
        output = usage.output + (usage.reasoning or 0)
        if len(self._last) == _REMEMBERED:
            del self._sorted[bisect_left(self._sorted, self._last.popleft())]
        self._last.append(output)
        insort(self._sorted, output)

    @property
    def likely(self) -> int | None:
        """What nine of ten are no longer than, in tokens (the nearest rank); ``None`` until 20 are known."""
        known = len(self._sorted)
        return self._sorted[(9 * known + 9) // 10 - 1] if known >= _ENOUGH else None


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """What `tokens` returns: give it to ``Rule(cost=...)``.

    Attributes:
        estimate: As given.
        weights: Units of the quota per token, for each of the five parts.
    """

    estimate: EstimateBy | None
    weights: Mapping[str, float]
    _factors: Mapping[str, int] = attribute(repr=False)
    _unit: int = attribute(repr=False)  # of the quota, in the parts that sums are kept in

    def estimated(self, document: object, *, quota: int, outputs: Outputs | None = None) -> Estimate:
        """What a request is taken to cost: what it reads, and what it lets the model write.

        Args:
            document: Its body as JSON made it, or what that asks for.
            quota: The smallest of its rule, in units. The output alone is no more than a quarter of it.
            outputs: How long the answers of its rule and bucket were.
        """
        said = document if isinstance(document, Asked) else Asked.by(document)
        likely = outputs.likely if outputs is not None else None
        asked = said.output
        if asked is None:
            output = UNKNOWN_OUTPUT if likely is None else likely
        else:
            output = asked if likely is None else min(asked, likely)
        return self._bounded(
            said.quarters * self._factors["input"],
            min(4 * output * self._factors["output"], self._share(quota)),
            quota,
        )

    def estimated_unread(self, content_length: int | None, *, quota: int) -> Estimate:
        """What a request is taken to cost whose body nobody can read.

        Args:
            content_length: In bytes; ``None``, or less than 0: unknown, and as much as it may be.
            quota: The smallest of its rule, in units. The estimate is no more than a quarter of it.
        """
        share = self._share(quota)
        known = content_length is not None and content_length >= 0
        return self._bounded(min((content_length or 0) * self._factors["input"], share) if known else share, 0, quota)

    def estimated_as(self, units: int, document: object = None, *, quota: int) -> Estimate:
        """What a request is taken to cost of which the app says so: *units* of the quota, 0 or more, as they are.

        Args:
            document: Its body as JSON made it, or what that asks for: what it reads is part of them.
        """
        said = document if isinstance(document, Asked) else Asked.by(document)
        whole = min(units, quota) * self._unit
        read = min(said.quarters * self._factors["input"], whole)
        return self._bounded(read, whole - read, quota)

    def cost_of(self, usage: Usage, estimate: Estimate) -> int:
        """What *usage* costs, in units; parts that are not known cost what was estimated. At most 2^53."""
        return self._rounded(self._read(usage, estimate.input) + self._written(usage, estimate.output))

    def settled(self, estimate: Estimate, reader: UsageReader | None) -> int:
        """What a request costs whose answer has ended, in units.

        What the answer says, first of all. Else nothing, if nothing has begun or the status is 400 or more; the
        *estimate* if the answer is complete; and if it was cut, what it has read and a guess at what was sent, which
        is never more than the *estimate*.

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
        read = self._read(usage, estimate.input)
        known = read + self._written(usage, 0)
        guessed = read + int(4 * reader.output_of_cut()) * self._factors["output"]
        return self._rounded(max(known, min(guessed, estimate.cost * self._unit)))

    def _share(self, quota: int) -> int:
        return quota * self._unit // _SHARE

    def _bounded(self, read: int, written: int, quota: int) -> Estimate:
        read = min(read, quota * self._unit - written)
        return Estimate(max(1, self._rounded(read + written)), read, written)

    def _rounded(self, parts: int) -> int:
        return min(-(-parts // self._unit), MOST)

    def _read(self, usage: Usage, unknown: int) -> int:
        factors = self._factors
        fresh, cached, cache_write, _, _ = usage
        read = unknown if fresh is None else 4 * fresh * factors["input"]
        if cached or cache_write:
            read += 4 * ((cached or 0) * factors["cached"] + (cache_write or 0) * factors["cache_write"])
        return read

    def _written(self, usage: Usage, unknown: int) -> int:
        factors = self._factors
        *_, output, reasoning = usage
        written = unknown if output is None else 4 * output * factors["output"]
        return written + 4 * reasoning * factors["reasoning"] if reasoning else written


@says_what_was_meant("tokens(weights={'output': 4, 'cached': 0.1})")
def tokens(estimate: EstimateBy | None = None, weights: Mapping[str, float] | None = None) -> Tokens:
    """The cost of a rule that is a budget in tokens: it is known after the answer, and estimated before.

    ::

        Rule("100000/minute", name="tokens", cost=tokens(weights={"output": 4, "cached": 0.1}))

    The estimate is charged when a request is admitted; when its answer has ended, the difference to what it says it
    used. Only ``fixed-window`` and ``sliding-window-counter`` can give back.

    Args:
        estimate: Units of the quota that are charged before, at least 1 and at most the quota: a whole number, 0 or
            more, or a callable that says so, given the ``Request``. ``None``: what is in the body, at 4 bytes of text a
            token, and as long an answer as it asks for, or as nine of ten answers before it were.
        weights: Units of the quota per token, 0 or more, of ``input``, ``cached``, ``cache_write``, ``output`` and
            ``reasoning``, which do not overlap. 1 where left out, but ``cached`` and ``cache_write`` as ``input``, and
            ``reasoning`` as ``output``. The sum is rounded up.

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


def input_tokens(document: object) -> float:
    """How many tokens are read of a request, in exact quarters: nobody knows, but it must not be nothing.

    A quarter for each byte of UTF-8 of each text; 1 for each whole number of a list, which is a token; 1,000 for each
    image, sound or file that the body holds itself, as a ``data:`` URL or in base64.

    Args:
        document: Its body as JSON made it, however deep.
    """
    return _quarters(document) / 4


def asked_output(document: object) -> int | None:
    """How many tokens a request lets the model write; ``None`` if it does not say, or nonsense.

    The largest of ``max_tokens``, ``max_completion_tokens``, ``max_output_tokens`` and ``options.num_predict``, of
    those that are whole numbers above 0, times ``n`` if that is one too; 2^53 at most.
    """
    if not isinstance(document, dict):
        return None
    most = 0
    for name in _LIMITS:
        if name in document:
            most = max(most, _count(document[name]))
    options = document.get("options")
    if isinstance(options, dict):
        most = max(most, _count(options.get("num_predict")))
    return min(most * (_count(document.get("n")) or 1), MOST) if most else None


def _count(value: object) -> int:
    """A whole number above 0, ``5.0`` included, up to 2^53; 0 for all else."""
    if type(value) is int or (type(value) is float and value.is_integer()):
        return min(int(value), MOST) if value > 0 else 0
    return 0


def _quarters(document: object) -> int:
    """`input_tokens` in quarters of a token."""
    quarters = 0
    left: list[Iterable[Any]] = [(document,)]
    # A stack: a body may be nested deeper than Python calls.
    while left:
        for node in left.pop():
            kind = type(node)
            if kind is str:
                # Most texts, without a call for each.
                quarters += len(node) if node.isascii() and node[4:5] != ":" else _quarters_of_text(node)
            elif kind is dict:
                if "data" in node or "images" in node:
                    quarters += _more_for_media(node)
                left.append(node.values())
            elif kind is list:
                whole = list(map(type, node)).count(int)
                quarters += 4 * whole
                if whole < len(node):
                    left.append(node)
    return quarters


def _quarters_of_text(text: str) -> int:
    if text[:5].lower() == "data:" and _DATA_URL.match(text):
        return _QUARTERS_OF_MEDIUM
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _more_for_media(holder: dict[str, object]) -> int:
    """What the media that *holder* has in base64 count, less what they would as texts."""
    encoded: list[object] = []
    if holder.get("type") == "base64" or any(name in holder for name in _SAYS_MEDIUM):
        encoded.append(holder.get("data"))
    images = holder.get("images")
    if isinstance(images, list):
        encoded += [image for image in images if isinstance(image, str) and "://" not in image[:16]]
    return sum(_QUARTERS_OF_MEDIUM - _quarters_of_text(text) for text in encoded if isinstance(text, str))
