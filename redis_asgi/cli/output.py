"""Output of the command line: plain text, JSON, a progress line;
colour and movement on a terminal only.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import orjson

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def printable(value: object) -> str:
    """*value* without characters that would steer a terminal: names in Redis may be anybody's."""
    return "".join(char if char.isprintable() else "?" for char in str(value))


def line(text: str, style: str = "", *, to_stderr: bool = False) -> None:
    """One line, as long as it is; *style* where there are colours (and ``NO_COLOR`` is not set)."""
    stream = sys.stderr if to_stderr else sys.stdout
    if not style or not stream.isatty():
        stream.write(f"{text}\n")
        return
    # Only here: it costs 50 ms.
    from rich.console import Console  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    Console(file=stream).print(Text(text, style=style), soft_wrap=True)


def error(text: str) -> None:
    """Print an error on stderr; a line for each that *text* has."""
    for each in text.splitlines():
        line(f"Error: {printable(each)}", "bold red", to_stderr=True)


def note(text: str) -> None:
    """Print a remark beside the result, on stderr."""
    line(printable(text), "dim", to_stderr=True)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns; numbers, and what stands for one, to the right."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    right = [all(row[i][:1].isdigit() or row[i] in ("", "?", "now") for row in cells) for i in range(len(head))]

    def laid_out(row: Sequence[str]) -> str:
        parts = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        return "  ".join(parts).rstrip()

    line(laid_out(head), "bold")
    for row in cells:
        line(laid_out(row))


def json(value: Any) -> None:
    """*value* as JSON; dataclasses are objects."""
    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is done now, gone at the end;
    nothing unless that is a terminal.

    Nothing may be written to stdout meanwhile: it would end up on stderr.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415 - only here: it costs 50 ms

    with Console(stderr=True).status("") as status:
        yield lambda text: status.update(printable(text))


def size(count: float) -> str:
    """Bytes for people: ``6.9 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def seconds(value: float | None) -> str:
    """A wait for people: ``now``, ``23 s``, ``1 h 2 min``;
    ``?`` when unknown. Never earlier than the truth.
    """
    if value is None:
        return "?"
    whole = -int(-value // 1)
    if whole <= 0:
        return "now"
    if whole < 120:
        return f"{whole} s"
    minutes = -(-whole // 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
