"""The public face of the package."""

import ast
import importlib
import inspect

import pytest

import redis_asgi

from .kit.documents import PAGES, ROOT
from .kit.processes import run_python


def test_all_is_sorted_and_complete() -> None:
    """``__all__`` is every public name of the package, the lazily loaded ones included, in order."""
    here = {name for name, value in vars(redis_asgi).items() if not name.startswith("_") and _is_ours(value)}

    assert sorted(here | set(redis_asgi._LATE)) == redis_asgi.__all__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        getattr(redis_asgi, "Nothing")  # noqa: B009 - a type checker knows that there is none


def test_dir_is_what_is_public() -> None:
    """A shell completes the names that are loaded late, and none that is not to be used."""
    assert dir(redis_asgi) == sorted([*redis_asgi.__all__, "__version__"])


def test_all_names_can_be_imported_without_fastapi() -> None:
    """``CurrentLimit`` is for FastAPI, which an app need not have."""
    done = run_python(
        "import sys; sys.modules['fastapi'] = None\nfrom redis_asgi import *\nprint(CurrentLimit.__origin__)"
    )

    assert ("<class 'redis_asgi.ratelimit.answers.request_decision.RequestDecision'>\n", "") == (
        done.stdout,
        done.stderr,
    )


def _is_ours(value: object) -> bool:
    return not inspect.ismodule(value) and str(getattr(value, "__module__", "")).startswith("redis_asgi")


@pytest.mark.parametrize("name", redis_asgi.__all__)
def test_public_name_is_documented(name: str) -> None:
    """Every public name says what it is."""
    documentation = getattr(redis_asgi, name).__doc__

    assert documentation
    assert documentation.strip()


def test_version_is_that_of_the_distribution() -> None:
    """``__version__`` is a release number of three parts."""
    assert all(part.isdigit() for part in redis_asgi.__version__.split(".")[:2])
    assert redis_asgi.__version__.count(".") == 2


PUBLIC_MODULES = ("redis_asgi", "redis_asgi.embeddings.wire", "redis_asgi.errors", "redis_asgi.maintenance",
                  "redis_asgi.telemetry", "redis_asgi.testing")  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_public_module_says_what_is_public(name: str) -> None:
    """It is named where the package says which are, lists its names, and has them."""
    module = importlib.import_module(name)

    assert f"``{name.removeprefix('redis_asgi.')}``" in (redis_asgi.__doc__ or "") or module is redis_asgi
    assert [] == [each for each in module.__all__ if not hasattr(module, each)]


def test_docs_and_examples_import_public_names_only() -> None:
    """What users copy is what stays."""
    shown = [code for page in PAGES for code in page.blocks("python")]
    found = {
        (node.module, alias.name)
        for code in (*shown, *(path.read_text("utf-8") for path in ROOT.glob("examples/**/*.py")))
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("redis_asgi")
        for alias in node.names
    }

    assert found
    assert set() == {
        (module, name)
        for module, name in found
        if module not in PUBLIC_MODULES or name not in importlib.import_module(module).__all__
    }
