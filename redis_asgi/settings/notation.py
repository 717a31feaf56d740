"""The rate notation everybody knows (``"10/second; 1000 per hour"``),
read by ``limits`` and checked here.

``limits`` is lenient in ways that would surprise an operator: it reads ``10/0 seconds`` as one
second and ignores what follows a match. So the text is looked at before it is parsed, and the
numbers after.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from ..errors import ConfigurationError
from .locations import redact

MAX_QUOTA = 10**9
MAX_LENGTH = 1000
MAX_WINDOW = 366 * 24 * 3600
# Units as they are usually shortened; `limits` has them in full alone.
_SHORT = {"s": "second", "sec": "second", "m": "minute", "min": "minute", "h": "hour", "hr": "hour", "d": "day"}
_SHORT_UNIT = re.compile(r"(?<=[\s/\d])(s|secs?|m|mins?|h|hrs?|d)(?=\s*(?:[,;|]|$))", re.IGNORECASE)
_ZERO_MULTIPLE = re.compile(r"(?:/|\bper\b)\s*0+(?!\d)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Limit:
    """A quota of units per window of whole seconds."""

    quota: int
    window: int

    def __str__(self) -> str:
        return f"{self.quota}/{self.window} seconds"


def read_limits(notation: str, *, least: int = 1) -> tuple[Limit, ...]:
    """Read *notation* into limits, in the order written.

    Args:
        least: The smallest quota; 0 where a quota may refuse everything.

    Raises:
        ValueError: Says what is wrong: unknown notation, a quota outside *least* to 10^9, a window
            outside 1 s to 366 days, or two limits with the same window.
    """
    # Here, not above: its storages come with it, 55 modules that nothing here uses.
    from limits import parse_many  # noqa: PLC0415

    if len(notation) > MAX_LENGTH:
        raise ValueError(f"longer than {MAX_LENGTH} characters")
    if _ZERO_MULTIPLE.search(notation):
        raise ValueError("a window of 0 is no limit")
    try:
        items = parse_many(_SHORT_UNIT.sub(_in_full, notation))
    except ValueError:
        raise ValueError("not in the notation '<quota>/<window>', joined by ';'") from None
    found = tuple(Limit(item.amount, item.get_expiry()) for item in items)
    for limit in found:
        if not least <= limit.quota <= MAX_QUOTA:
            raise ValueError(f"the quota {limit.quota} is not between {least} and {MAX_QUOTA}")
        if not 1 <= limit.window <= MAX_WINDOW:
            raise ValueError(f"a window of {limit.window} s is longer than {MAX_WINDOW} s (366 days)")
    if len({limit.window for limit in found}) < len(found):
        raise ValueError("two limits have the same window; keep the smaller one")
    return found


def _in_full(unit: re.Match[str]) -> str:
    short = unit[1].lower()
    return _SHORT.get(short) or _SHORT[short.removesuffix("s")]


@lru_cache(maxsize=1024)
def parse_limits(notation: str, *, least: int = 1) -> tuple[Limit, ...]:
    """`read_limits` for arguments: cached, and a ``ConfigurationError`` that shows *notation*."""
    try:
        return read_limits(notation, least=least)
    except ValueError as error:
        example = "Try '100/minute' or '20/second; 1000/hour'."
        raise ConfigurationError(f"limits={redact(notation)}: {error}. {example}") from None
