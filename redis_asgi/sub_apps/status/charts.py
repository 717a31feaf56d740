"""History as small SVG charts: no script, no inline style;
colours come from the stylesheet by class.

A chart is drawn in a box of ``SLOTS * SLOT`` by ``HEIGHT`` units that the page stretches to its
width, so it holds no text; what it says in words stands beside it, and over each slot when one
points at it.
"""

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from ...telemetry import SAMPLES_KEPT, Sample
from .markup import Markup, joined, markup

SLOTS = SAMPLES_KEPT
SLOT = 5
WIDTH = SLOTS * SLOT
HEIGHT = 100


def nice_ceiling(value: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is no less than *value*; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))


def stacked(history: Sequence[Sample], series: Sequence[tuple[str, Callable[[Sample], float]]], top: float) -> Markup:
    """Areas in steps, one upon the other, the newest sample at the right edge.

    Args:
        series: The class and the value of each, from the bottom up.
        top: The value at the upper edge.
    """
    paths: list[Markup] = []
    below = [0.0] * len(history)
    for name, value in series:
        above = [base + value(sample) for base, sample in zip(below, history, strict=True)]
        paths += [
            markup('<path class="area {name}" d="{d}"/>', name=name, d=_band(run, below, above, top))
            for run in _runs([high > low for low, high in zip(below, above, strict=True)])
        ]
        below = above
    return joined(paths)


def line(history: Sequence[Sample], name: str, value: Callable[[Sample], float | None], top: float) -> Markup:
    """A line in steps over its area, with gaps where *value* is ``None``."""
    values = [value(sample) for sample in history]
    known = [0.0 if each is None else each for each in values]
    zero = [0.0] * len(history)
    return joined(
        markup(
            '<path class="area {name}" d="{area}"/><path class="line {name}" d="{line}"/>',
            name=name,
            area=_band(run, zero, known, top),
            line=_steps(run, known, top, "M"),
        )
        for run in _runs([each is not None for each in values])
    )


def chart(summary: str, drawing: Markup, history: Sequence[Sample], words: Callable[[Sample], str]) -> Markup:
    """The whole drawing: a grid, *drawing*, and over each slot what *words* say of its sample."""
    grid = joined(markup('<path class="grid" d="M0 {y}H{width}"/>', y=y, width=WIDTH) for y in (0, HEIGHT // 2, HEIGHT))
    pointed = joined(
        markup(
            '<rect class="slot" x="{x}" width="{slot}" height="{height}"><title>{at} UTC: {words}</title></rect>',
            x=_left(i, len(history)),
            slot=SLOT,
            height=HEIGHT,
            at=datetime.fromtimestamp(sample.at, UTC).strftime("%H:%M:%S"),
            words=words(sample),
        )
        for i, sample in enumerate(history)
    )
    return markup(
        '<svg class="chart" viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" '
        'aria-label="{summary}">{grid}{drawing}{pointed}</svg>',
        width=WIDTH,
        height=HEIGHT,
        summary=summary,
        grid=grid,
        drawing=drawing,
        pointed=pointed,
    )


def bar(share: float, name: str) -> Markup:
    """*share* (0 to 1) of a bar, filled; the number itself stands beside it."""
    return markup(
        '<svg class="bar" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="100" height="4"/><rect class="{name}" width="{width}" height="4"/></svg>',
        name=name,
        width=round(100 * min(max(share, 0.0), 1.0), 2),
    )


def _left(index: int, count: int) -> int:
    """The left edge of a slot; the last of *count* ends at the right edge."""
    return WIDTH - (count - index) * SLOT


def _runs(there: Sequence[bool]) -> list[range]:
    """The stretches of neighbours that are there."""
    runs, start = [], None
    for i, is_there in enumerate([*there, False]):
        if is_there and start is None:
            start = i
        elif not is_there and start is not None:
            runs.append(range(start, i))
            start = None
    return runs


def _y(value: float, top: float) -> float:
    return round(HEIGHT * (1 - min(value / top, 1.0)), 2)


def _steps(run: range, values: Sequence[float], top: float, move: str, *, back: bool = False) -> str:
    order = reversed(run) if back else run
    parts = []
    for i in order:
        left = WIDTH - (len(values) - i) * SLOT
        ends = (left + SLOT, left) if back else (left, left + SLOT)
        parts.append(f"{move}{ends[0]} {_y(values[i], top):g}H{ends[1]}")
        move = "L"
    return "".join(parts)


def _band(run: range, low: Sequence[float], high: Sequence[float], top: float) -> str:
    return _steps(run, high, top, "M") + _steps(run, low, top, "L", back=True) + "Z"
