"""What a request costs, as one chart: an SVG for pages, and text for where no picture is shown.

::

    python -m pip install -e '.[bench]'
    python -m tests.benchmarks.instructions --json tests/benchmarks/measured.json
    python -m tests.benchmarks.chart tests/benchmarks/measured.json tests/benchmarks/chart.svg --page README.md

``--page`` puts the text in place of what stands between ``<!-- chart -->`` and ``<!-- /chart -->``.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from .rows import ROWS

# Panels of rows; what is ours is told apart from what it is compared with.
PANELS: Mapping[str, Sequence[str]] = {
    "a request": ("bare", "address", "service", "refused-header", "evalsha", "limits.aio", "throttled-py"),
    "one with a per-route limit": ("fastapi", "depends"),
    "an embedding request, all stored": ("embed", "from-process", "from-redis", "one-get"),
}
_OURS = {"address", "service", "refused-header", "depends", "from-process", "from-redis"}
_BASES = {"bare", "fastapi", "embed"}
_NAMES = {
    "evalsha": "one EVALSHA each, by redis-py",
    "limits.aio": "limits (aio), in a pure ASGI middleware",
    "throttled-py": "throttled-py, in a pure ASGI middleware",
    "one-get": "one GET of the whole answer, by redis-py",
    "embed": "the app alone, with its answer ready",
    "depends": "FastAPI with Depends(RateLimit(...))",
}
_WIDTH = 32  # characters of the longest bar
_BLOCK = re.compile(r"(<!-- chart -->\n).*?(\n<!-- /chart -->)", re.DOTALL)
# Mid-tones that stand out from white and from near black;
# text and ground change with the reader's scheme.
_COLOURS = {"ours": "#2f81f7", "base": "#8b949e", "peer": "#d08a2e"}
_SCHEMES = """
#ground path { fill: #ffffff !important }
text { fill: #1f2328 !important; font-family: system-ui, sans-serif !important }
@media (prefers-color-scheme: dark) {
  #ground path { fill: #0d1117 !important }
  text { fill: #e6edf3 !important }
}
"""


def title_of(name: str) -> str:
    """What a row is called in the chart."""
    return _NAMES.get(name, f"redis-asgi: {ROWS[name].title}" if name in _OURS else ROWS[name].title)


def panels_of(figures: Mapping[str, float]) -> dict[str, list[str]]:
    """The rows of each panel that were measured."""
    return {panel: [name for name in names if name in figures] for panel, names in PANELS.items()}


def kind_of(name: str) -> str:
    """``ours``, ``base`` for an app alone, or ``peer``."""
    return "ours" if name in _OURS else "base" if name in _BASES else "peer"


def text_of(figures: Mapping[str, float]) -> list[str]:
    """The chart in characters, a line for each row."""
    shown = panels_of(figures)
    names = [name for of_panel in shown.values() for name in of_panel]
    most, wide = max(figures[name] for name in names), max(len(title_of(name)) for name in names)
    lines = []
    for panel, of_panel in shown.items():
        lines.append(panel)
        for name in of_panel:
            bar = ("█" if kind_of(name) == "ours" else "░") * round(_WIDTH * figures[name] / most)
            lines.append(f"  {title_of(name):<{wide}}  {bar} {figures[name]:.0f}")
    return lines


def draw(figures: Mapping[str, float], target: Path) -> None:
    """Write the chart as an SVG that follows the reader's light or dark scheme."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "chart", "font.size": 11})
    from matplotlib import pyplot as plt

    shown = panels_of(figures)
    heights = [len(names) for names in shown.values()]
    figure, axes = plt.subplots(
        len(shown), sharex=True, figsize=(9.0, 0.36 * sum(heights) + 0.5 * len(shown) + 0.3), height_ratios=heights
    )
    figure.patch.set_gid("ground")
    figure.suptitle("Thousands of instructions that one request costs a worker", x=0.02, ha="left", fontsize=12)
    most = max(figures[name] for names in shown.values() for name in names)
    for axis, (panel, names) in zip(axes, shown.items(), strict=True):
        bars = axis.barh(
            [title_of(name) for name in names],
            [figures[name] for name in names],
            color=[_COLOURS[kind_of(name)] for name in names],
            height=0.72,
        )
        axis.bar_label(bars, fmt="%.0f", padding=4)
        axis.set_title(panel, loc="left", fontsize=11, fontweight="bold")
        axis.invert_yaxis()
        axis.set_xlim(0, most * 1.1)
        axis.set_frame_on(False)
        axis.tick_params(length=0, labelbottom=False)
    figure.tight_layout()
    figure.savefig(target, format="svg", metadata={"Date": None, "Title": "Thousands of instructions per request"})
    plt.close(figure)
    # Matplotlib ends lines with blanks.
    drawn = re.sub(r"[ \t]+$", "", target.read_text("utf-8"), flags=re.MULTILINE)
    target.write_text(drawn.replace("</style>", f"{_SCHEMES}</style>", 1), "utf-8")


def on_page(page: str, lines: Sequence[str]) -> str:
    """*page* with the chart between its two marks.

    Raises:
        ValueError: It has no such marks, or more than one pair of them.
    """
    block = "\n".join(("```text", *lines, "```"))
    page, times = _BLOCK.subn(lambda marks: marks[1] + block + marks[2], page)
    if times != 1:
        raise ValueError(f"{times} times <!-- chart --> and <!-- /chart --> where one pair is wanted")
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; 0 unless something is missing."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.chart", description=__doc__.split("\n")[0])
    parser.add_argument("figures", type=Path, help="what python -m tests.benchmarks.instructions --json wrote")
    parser.add_argument("svg", type=Path, help="the file to write")
    parser.add_argument("--page", type=Path, help="also put the chart into this page, as text")
    options = parser.parse_args(argv)
    if find_spec("matplotlib") is None:
        print("matplotlib is missing: python -m pip install -e '.[bench]'.", file=sys.stderr)
        return 1
    figures: dict[str, float] = json.loads(options.figures.read_text("utf-8"))["k"]
    draw(figures, options.svg)
    lines = text_of(figures)
    print(*lines, sep="\n")
    if options.page:
        options.page.write_text(on_page(options.page.read_text("utf-8"), lines), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
