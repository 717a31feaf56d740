"""Prose has 100 columns, in docstrings and in comments on lines of their own; code may have more."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator

import pytest

from .kit.documents import ROOT

WIDTH = 100
PATTERNS = "redis_asgi/**/*.py", "tests/**/*.py", "examples/**/*.py"
FILES = sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern)})
# No prose: rows of tables and maps, and what is to be typed.
ROW = re.compile(r"\S  +\S")
PRAGMA = re.compile(r"#(!|\s*(type:|noqa|fmt:|ruff:|mypy:|pragma))")


def wide(source: str) -> Iterator[int]:
    """The numbers of lines of prose that are too wide."""
    lines = source.splitlines()
    if max(map(len, lines)) <= WIDTH:
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[:1]
            if docstring and ast.get_docstring(node, clean=False) is not None:
                first, last = docstring[0].lineno, docstring[0].end_lineno or 0
                yield from wide_of_docstring(lines[first - 1 : last], first)
    if any(len(line) > WIDTH and line.lstrip().startswith("#") for line in lines):
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            alone = token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
            if alone and len(token.line.rstrip()) > WIDTH and not PRAGMA.match(token.string):
                yield token.start[0]


def wide_of_docstring(lines: list[str], number: int) -> Iterator[int]:
    literal: int | None = None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indent <= literal:
            literal = None
        # The quotes that close it do not count.
        text = line.removesuffix('"""').rstrip()
        if literal is None and len(text) > WIDTH and not ROW.search(text):
            yield number
        if literal is None and text.endswith("::"):
            literal = indent
        number += 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param(f"# {'a ' * 50}", [1], id="comment"),
        pytest.param(f"x = 1  # {'a ' * 50}", [], id="comment behind code"),
        pytest.param(f'"""{"a " * 47}b."""', [], id="summary"),
        pytest.param(f'"""{"a " * 49}b."""', [1], id="wide summary"),
        pytest.param(f'def f():\n    """A.\n\n    {"a " * 50}\n    """', [4], id="paragraph"),
        pytest.param(f'"""A::\n\n    {"a " * 50}\n"""', [], id="what is to be typed"),
        pytest.param(f'"""A.\n\n``a``  {"b " * 50}\n"""', [], id="row of a map"),
        pytest.param(f"x = '{'a ' * 50}'", [], id="code"),
    ],
)
def test_prose_is_told_from_the_rest(source: str, expected: list[int]) -> None:
    """The test below would pass where nothing is found; this one would not."""
    assert expected == list(wide(source))


def test_prose_has_a_hundred_columns() -> None:
    """Sentences are read faster where lines are short; a formatter fills none."""
    found = {str(path.relative_to(ROOT)): lines for path in FILES if (lines := list(wide(path.read_text("utf-8"))))}

    assert {} == found
    assert 200 < len(FILES)
