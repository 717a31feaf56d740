"""The pages that people read, taken apart: sections, blocks of code, tables, links."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Page:
    """A page in Markdown, named by its path from the root of the repository."""

    name: str

    @property
    def folder(self) -> Path:
        return (ROOT / self.name).parent

    @cached_property
    def text(self) -> str:
        return (ROOT / self.name).read_text("utf-8")

    def blocks(self, language: str) -> list[str]:
        """The code blocks of one language, in order."""
        return re.findall(rf"^```{language}\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)

    def headings(self) -> list[tuple[int, str]]:
        """Level and title of each heading; what begins with # in a block of code is none."""
        prose = re.sub(r"^```.*?^```$", "", self.text, flags=re.MULTILINE | re.DOTALL)
        return [(len(level), title) for level, title in re.findall(r"^(#+) (.*)$", prose, re.MULTILINE)]

    def anchors(self) -> set[str]:
        """What a link within the page may name, as code hosts make it of a heading."""
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for _, title in self.headings()}

    def links(self) -> list[str]:
        """The targets of links and pictures."""
        prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", self.text, flags=re.MULTILINE | re.DOTALL)
        return re.findall(r"\]\(([^)\s]+)\)", prose)

    def sections(self, title: str) -> Iterator[str]:
        """What stands below a heading, ``## Title`` or deeper,
        up to the next of its level or of a higher one.
        """
        level = len(title.partition(" ")[0])
        pattern = rf"^{re.escape(title)}\n(.*?)(?=^#{{2,{level}}} |\Z)"
        yield from re.findall(pattern, self.text, re.MULTILINE | re.DOTALL)


README = Page("README.md")
GUIDES = {
    path.parent.name: Page(str(path.relative_to(ROOT)))
    for path in sorted([*ROOT.glob("examples/*/README.md"), ROOT / "tests/benchmarks/README.md"])
}
SOURCE = Page("redis_asgi/README.md")
PAGES = (README, *GUIDES.values(), SOURCE)


def section(title: str) -> str:
    """What stands below a heading that one guide has, written as there: ``## Metrics``."""
    (found,) = (text for page in (*GUIDES.values(), SOURCE) for text in page.sections(title))
    return found


def table(text: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[1:]]
