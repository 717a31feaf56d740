"""The chart shows what was measured."""

import json
from pathlib import Path

import pytest

from .chart import PANELS, main, on_page, text_of, title_of

FIGURES = {"bare": 100.0, "address": 200.4, "evalsha": 400.0, "fastapi": 100, "depends": 50, "embed": 10, "one-get": 20}


def test_bars_are_as_long_as_the_figures() -> None:
    """The longest has the whole width, ours are filled, and what was not measured is not there."""
    lines = text_of(FIGURES)
    bars = {line.split("  ")[1]: line.rstrip("0123456789 ") for line in lines if line.startswith("  ")}

    assert 32 == bars[title_of("evalsha")].count("░")
    assert 16 == bars[title_of("address")].count("█")
    assert lines[2].endswith(" 200")
    assert len(FIGURES) + len(PANELS) == len(lines)


def test_page_has_one_place_for_it() -> None:
    """The text stands between the two marks, and is put there as often as one likes."""
    page = "a\n<!-- chart -->\nold\n<!-- /chart -->\nb\n"
    once = on_page(page, ["x"])

    assert "a\n<!-- chart -->\n```text\nx\n```\n<!-- /chart -->\nb\n" == once == on_page(once, ["x"])
    for bad in ("", page + page):
        with pytest.raises(ValueError, match=r"one pair is wanted"):
            on_page(bad, ["x"])


def test_picture_has_every_row(tmp_path: Path) -> None:
    """Names and figures are texts in it, and both schemes have their colours."""
    pytest.importorskip("matplotlib", reason="the chart is drawn with the extra bench")
    source, target = tmp_path / "figures.json", tmp_path / "chart.svg"
    source.write_text(json.dumps({"k": FIGURES}))

    assert 0 == main([str(source), str(target)])
    drawn = target.read_text("utf-8")
    for name, figure in FIGURES.items():
        assert f">{title_of(name)}</text>" in drawn
        assert f">{figure:.0f}</text>" in drawn
    assert "prefers-color-scheme: dark" in drawn
