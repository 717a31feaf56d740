"""Which way imports point, and what importing the package does not do."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TypeGuard

import pytest

import redis_asgi

from .kit.processes import run_python

ROOT = Path(redis_asgi.__file__).parent


def _modules() -> dict[str, Path]:
    """Dotted name to file of every module of the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


@cache
def _nodes(name: str) -> tuple[ast.AST, ...]:
    """Everything that is written in the module *name*."""
    return tuple(ast.walk(ast.parse(MODULES[name].read_text("utf-8"))))


@cache
def _imports(name: str) -> frozenset[tuple[str, str]]:
    """(module, imported name) for everything *name* imports anywhere, relative imports resolved."""
    return frozenset(_resolved(name))


def _resolved(name: str) -> Iterator[tuple[str, str]]:
    package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
    for node in _nodes(name):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                yield (submodule, "") if submodule in MODULES else (module, alias.name)


def _targets(name: str) -> set[str]:
    return {module for module, _ in _imports(name)}


def _taken(name: str, package: str) -> set[str]:
    """What *name* imports of *package*."""
    return {target for target in _targets(name) if _within(target, package)}


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_the_walk_sees_imports() -> None:
    """The tests below would pass on an empty list; this one would not."""
    assert "redis_asgi.settings" in _targets("redis_asgi.connection.manager")
    assert "redis_asgi.ratelimit.answers.headers" in _targets("redis_asgi.ratelimit.middleware")
    assert len(MODULES) > 15


def test_limits_and_embeddings_do_not_know_each_other() -> None:
    """Neither of the two halves imports the other."""
    limits, embeddings = "redis_asgi.ratelimit", "redis_asgi.embeddings"
    for one, other in ((limits, embeddings), (embeddings, limits)):
        assert {} == {name: found for name in MODULES if _within(name, one) and (found := _taken(name, other))}


def test_only_init_files_import_a_middleware() -> None:
    """A middleware is an end, nothing builds on it but the package's front."""
    within = {name for name, path in MODULES.items() if path.name != "__init__.py"}
    taken = {
        (name, module)
        for name in within
        for module, _ in _imports(name)
        if module.startswith("redis_asgi.") and module.endswith(".middleware")
    }

    assert set() == taken


# Which folder of the package imports from which: what stands on what, the lowest first. A module at
# the top is a room of its own; the package's front, which everybody may see, is none.
FOLDERS = {
    "_version": "",
    "redaction": "",
    "events": "redaction",
    "explanations": "events",
    "event_loop": "",
    "keys": "",
    "time_slice": "",
    "tracing": "",
    "errors": "events",
    "misuse": "errors redaction",
    "bulk_metrics": "",
    "count_buffer": "bulk_metrics",
    "telemetry": "bulk_metrics count_buffer errors",
    "settings": "errors misuse",
    "asgi": "errors misuse settings",
    "connection": "_version asgi errors event_loop events misuse settings telemetry",
    # Rate limits: the nouns, how checks travel, who counts;
    # what is asked; what is said; and the doors.
    "ratelimit/limits": "keys settings",
    "ratelimit/transport": "connection errors events ratelimit/limits telemetry",
    "ratelimit/budgets": "asgi errors events misuse ratelimit/limits settings telemetry",
    "ratelimit/counting": (
        "bulk_metrics connection count_buffer errors events ratelimit/budgets ratelimit/limits ratelimit/transport"
        " settings telemetry tracing"
    ),
    "ratelimit/rules": "asgi errors events keys misuse ratelimit/budgets ratelimit/limits settings",
    "ratelimit/answers": (
        "asgi connection errors event_loop misuse ratelimit/budgets ratelimit/counting ratelimit/limits settings"
    ),
    "ratelimit": (
        "asgi connection errors event_loop events misuse ratelimit/answers ratelimit/budgets ratelimit/counting"
        " ratelimit/limits"
        " ratelimit/rules settings"
    ),
    "ratelimit/openapi": "asgi errors ratelimit ratelimit/answers ratelimit/rules settings",
    # The embedding cache: values, who keeps them; what is asked;
    # who computes; what is said; and the doors.
    "embeddings/records": "errors events keys settings telemetry",
    "embeddings/wire": "embeddings/records errors",
    "embeddings/storage": "connection embeddings/records errors events keys settings time_slice",
    "embeddings/requests": "asgi embeddings/records embeddings/wire errors keys misuse settings time_slice",
    "embeddings/origin": (
        "asgi embeddings/records embeddings/requests embeddings/wire events keys settings time_slice"
    ),
    "embeddings/answers": (
        "asgi embeddings/records embeddings/requests embeddings/storage embeddings/wire time_slice tracing"
    ),
    "embeddings": (
        "asgi connection embeddings/answers embeddings/origin embeddings/records embeddings/requests embeddings/storage"
        " embeddings/wire errors event_loop keys misuse settings time_slice"
    ),
    "maintenance": "connection embeddings/storage errors keys settings",
    "sub_apps": (
        "_version asgi connection errors events misuse ratelimit/counting ratelimit/limits settings telemetry"
    ),
    "sub_apps/status": "asgi connection explanations ratelimit/counting settings sub_apps telemetry",
    "inspection": (
        "asgi connection embeddings embeddings/storage errors events keys maintenance ratelimit ratelimit/counting"
        " ratelimit/limits ratelimit/rules ratelimit/transport settings"
    ),
    "testing": "connection embeddings embeddings/requests embeddings/wire misuse ratelimit/counting ratelimit/limits",
    "cli": (
        "_version connection embeddings errors explanations inspection maintenance ratelimit ratelimit/limits"
        " ratelimit/rules settings"
    ),
    "__main__": "cli",
}


def _folder(name: str) -> str:
    """The folder of a module; of one that lies at the top, its own name."""
    parts = MODULES[name].relative_to(ROOT).with_suffix("").parts
    return parts[0] if len(parts) == 1 else "/".join(parts[:-1])


def _arrows() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name in MODULES.keys() - {"redis_asgi"}:
        folders = {_folder(target) for target in _targets(name) if target in MODULES and target != "redis_asgi"}
        found.setdefault(_folder(name), set()).update(folders - {_folder(name)})
    return found


def test_each_folder_imports_from_those_below_it() -> None:
    """Every folder is in the table, imports what the table says and nothing else,
    and only what stands before it.
    """
    assert {folder: set(below.split()) for folder, below in FOLDERS.items()} == _arrows()
    order = list(FOLDERS)
    for folder, below in FOLDERS.items():
        assert set(below.split()) <= set(order[: order.index(folder)]), folder


def test_the_readers_map_leads_somewhere() -> None:
    """Every file that ``redis_asgi/README.md`` names is there,
    and defines what is named behind it in brackets.
    """
    text = (ROOT / "README.md").read_text("utf-8")
    files = re.findall(r"`((?:\w+/)*\w+\.py)`(?: \(`([\w.]+)`\))?", text)
    told = {(name, defined) for name, defined in files if not (ROOT / name).is_file()}
    for name, defined in files:
        source = (ROOT / name).read_text("utf-8")
        told |= {
            (name, part) for part in defined.split(".") if part and not re.search(rf"(def|class) {part}\b", source)
        }

    assert set() == told
    assert 10 < len(files)


def test_rooms_with_a_map_list_every_module() -> None:
    """Where a folder's docstring maps its modules,
    none is missing and none is named that is not there.
    """
    for folder in ("asgi", "connection", "ratelimit/rules", "embeddings/storage"):
        docstring = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text("utf-8"))) or ""
        modules = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}
        assert modules == set(re.findall(r"``(\w+)``", docstring)), folder


def test_nothing_within_imports_the_front() -> None:
    """``redis_asgi/__init__.py`` imports the package's modules, and is imported by none of them."""
    assert not [name for name in MODULES if "redis_asgi" in _targets(name)]


def test_numpy_stays_with_embeddings() -> None:
    """Only ``embeddings/`` pays for numpy."""
    others = (name for name in MODULES if not _within(name, "redis_asgi.embeddings"))
    assert {} == {name: found for name in others if (found := _taken(name, "numpy"))}


def test_nothing_that_serves_knows_of_the_testing_kit() -> None:
    """Only who tests imports it, and nothing else sets the clock of the limits: no client ever can."""
    serving = [name for name in MODULES if not _within(name, "redis_asgi.testing")]

    assert {} == {name: found for name in serving if (found := _taken(name, "redis_asgi.testing"))}
    assert [] == [f"{name}:{node.lineno}" for name in serving for node in _nodes(name) if _sets_the_clock(node)]


def _sets_the_clock(node: ast.AST) -> TypeGuard[ast.Attribute]:
    if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store):
        return False
    return isinstance(node.value, ast.Name) and node.value.id == "CLOCK"


def _reads_environment(name: str) -> bool:
    attributes = {node.attr for node in _nodes(name) if isinstance(node, ast.Attribute)}
    return bool(attributes & {"environ", "getenv", "environb"})


def test_only_settings_read_the_environment() -> None:
    """Every variable goes through ``Settings``, and pydantic-settings reads it."""
    readers = {name for name in MODULES if any(_within(target, "pydantic_settings") for target in _targets(name))}

    assert [name for name in MODULES if _reads_environment(name)] == []
    assert readers == {"redis_asgi.settings.environment", "redis_asgi.settings.types"}


def test_import_has_no_effect() -> None:
    """``import redis_asgi`` opens no socket, thread or log, and reads no variable."""
    script = """
import logging, os, socket, sys, threading
# Theirs, not ours: what our libraries do at import is theirs to answer for.
import orjson, pydantic_settings, redis.asyncio, redis.asyncio.sentinel
import starlette.applications, starlette.concurrency, starlette.requests, starlette.responses
from importlib.resources import files

def refuse(*args, **kwargs):
    raise SystemExit(f"import did {args!r}")

sys.addaudithook(lambda event, args: refuse(event, args) if event.startswith("socket.") else None)

def look(self, key, default=None):
    return default if key.startswith(("PYDANTIC_", "PYTHON")) else refuse(key)

class Watched(dict):
    __getitem__ = __contains__ = get = look
    items = keys = values = copy = __iter__ = refuse

os.environ, plain = Watched(), os.environ
os.getenv = os.environ.get
handlers = list(logging.root.handlers)
import redis_asgi
os.environ = plain
assert threading.active_count() == 1
assert logging.root.handlers == handlers
for name in list(logging.root.manager.loggerDict):
    if name.startswith("redis_asgi"):
        logger = logging.getLogger(name)
        assert not logger.handlers and logger.level == logging.NOTSET, name
"""
    done = run_python(script)

    assert ("", "", 0) == (done.stdout, done.stderr, done.returncode)


LATE = ("fastapi", "limits", "numpy", "prometheus_client", "pybase64", "rich", "typer")


@pytest.mark.parametrize(
    ("use", "loaded"),
    [
        pytest.param("", [], id="import"),
        pytest.param("redis_asgi.Rule('5/minute')", ["limits"], id="notation"),
        pytest.param(
            "redis_asgi.RateLimitMiddleware(redis_asgi.health_app())", ["limits", "prometheus_client"], id="limits"
        ),
        pytest.param("redis_asgi.health_app()", ["prometheus_client"], id="health"),
        pytest.param("redis_asgi.calculate_memory_usage(1024, 10)", [], id="capacity"),
    ],
)
def test_heavy_libraries_are_loaded_by_what_needs_them(use: str, loaded: list[str]) -> None:
    """Nothing waits for numpy but vectors, nor for metrics,
    the notation or a framework before there is a use.
    """
    script = f"import sys, redis_asgi\n{use}\nprint([name for name in {LATE!r} if name in sys.modules])"
    done = run_python(script, env={"REDIS_URL": "memory://"})

    assert (f"{loaded}\n", "") == (done.stdout, done.stderr)


def test_import_with_bad_settings_works() -> None:
    """A misconfigured environment is told where something is built, never at import."""
    done = run_python("import redis_asgi", env={"REDIS_PORT": "x", "RATE_LIMITS": "often"})

    assert ("", 0) == (done.stderr, done.returncode)
