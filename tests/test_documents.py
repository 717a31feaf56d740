"""What people read: programs run, links lead somewhere, and whatever has a name can be looked up."""

import asyncio
import importlib
import re
import sys
import types
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from redis_asgi import Settings
from redis_asgi.cli.commands import app as command_line
from redis_asgi.explanations import explanations

from .kit.documents import PAGES, ROOT, SOURCE, Page
from .test_exports import PUBLIC_MODULES

TEXT = "".join(page.text for page in PAGES)
PROGRAMS = "".join(path.read_text("utf-8") for path in sorted(ROOT.glob("examples/**/*.py")))


def first_line(code: str) -> str:
    """How a block is told apart from the others in a report."""
    return next(line for line in code.splitlines() if not line.startswith(("from", "import")) and line)


# Starlette's client for tests wants another httpx from some version on.
@pytest.mark.filterwarnings("ignore:Using .httpx. with .starlette.testclient. is deprecated")
@pytest.mark.parametrize(
    ("page", "code"),
    [
        pytest.param(page, code, id=f"{page.name} {first_line(code)}")
        for page in PAGES
        for code in page.blocks("python")
    ],
)
def test_code_runs_as_pasted(page: Page, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block stands alone, and an app in it answers a request."""
    monkeypatch.setenv("REDIS_URL", "memory://")
    module = types.ModuleType("block")
    # Endpoints' annotations are looked up where they were defined.
    monkeypatch.setitem(sys.modules, "block", module)
    exec(compile(code, page.name, "exec"), module.__dict__)  # noqa: S102 - our own pages
    app = module.__dict__.get("app")
    if app is not None:
        assert asyncio.run(first_answer(app)).status_code < 500


async def first_answer(app: Any) -> httpx.Response:
    """What the app answers to ``GET /``."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.get("/")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Page) -> None:
    """Relative links name a file, what stands behind # is a heading of it, and all else is https."""
    for link in page.links():
        path, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        target = (page.folder / path).resolve() if path else ROOT / page.name
        assert target.exists(), link
        if anchor:
            assert anchor in Page(str(target.relative_to(ROOT))).anchors(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Page) -> None:
    """A path in code font that begins in a folder of the repository leads to a file there."""
    for path in re.findall(r"`((?:examples|tests|redis_asgi)/[\w./]+)`", page.text):
        assert (ROOT / path).exists(), path


def test_source_files_are_there() -> None:
    """What the guide to the source names exists."""
    for path in re.findall(r"`([a-z_./*]+\.(?:py|lua))`", SOURCE.text):
        assert list(SOURCE.folder.glob(path)), path


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_public_names_are_found(module: str) -> None:
    """Every public name stands in a page or an example."""
    names = importlib.import_module(module).__all__

    assert [] == [name for name in names if not re.search(rf"\b{name}\b", TEXT + PROGRAMS)]


def test_settings_are_found() -> None:
    """Every setting stands in a page."""
    assert [] == [name for name in Settings.model_fields if f"`{name}`" not in TEXT]


def test_events_are_found() -> None:
    """``redis-asgi explain`` prints every line that the log may have,
    and every code of a health check.
    """
    printed = CliRunner().invoke(command_line, ["explain"]).stdout

    assert [] == [told.word for told in explanations() if told.word not in printed]
