"""Text that is escaped on its way into a page, unless it is markup already."""

from collections.abc import Iterable
from html import escape


class Markup(str):
    """HTML or SVG that has been escaped where it had to be."""

    __slots__ = ()


def markup(template: str, /, **values: object) -> Markup:
    """*template* with each ``{name}`` replaced: `Markup` as it is,
    everything else escaped, for text and attributes.
    """
    return Markup(template.format_map({name: _safe(value) for name, value in values.items()}))


def joined(parts: Iterable[Markup]) -> Markup:
    """*parts* one after the other."""
    return Markup("".join(parts))


def _safe(value: object) -> Markup:
    return value if isinstance(value, Markup) else Markup(escape(str(value)))
