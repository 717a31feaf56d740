"""Which way imports point, and what importing the package does not do."""

import ast
from collections.abc import Iterator
from pathlib import Path

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


def _imports(name: str) -> Iterator[tuple[str, str]]:
    """(module, imported name) for everything *name* imports anywhere, relative imports resolved."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
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


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_the_walk_sees_imports() -> None:
    """The tests below would pass on an empty list; this one would not."""
    assert "redis_asgi.settings" in _targets("redis_asgi.connection")
    assert "redis_asgi.ratelimit.headers" in _targets("redis_asgi.ratelimit.middleware")
    assert len(MODULES) > 15


@pytest.mark.parametrize("name", MODULES)
def test_limits_and_embeddings_do_not_know_each_other(name: str) -> None:
    """Neither of the two halves imports the other."""
    limits, embeddings = "redis_asgi.ratelimit", "redis_asgi.embeddings"
    for one, other in ((limits, embeddings), (embeddings, limits)):
        if _within(name, one):
            assert not [target for target in _targets(name) if _within(target, other)]


@pytest.mark.parametrize("name", MODULES)
def test_only_init_files_import_a_middleware(name: str) -> None:
    """A middleware is an end, nothing builds on it but the package's front."""
    if MODULES[name].name == "__init__.py":
        return
    taken = {(m, what) for m, what in _imports(name) if m.startswith("redis_asgi.") and m.endswith(".middleware")}

    assert taken == set()


FOUNDATION = (
    "_version", "events", "errors", "misuse", "event_loop", "locations", "notation", "networks",
    "setting_types", "paths", "environment", "server_settings", "settings",
    "telemetry", "tracing", "keys", "forwarded", "scope", "sub_app", "aside",
    "names", "sockets", "sentinels", "nodes",
    "breaker", "client", "opened", "connection", "redis_argument", "operation",
)  # fmt: skip


@pytest.mark.parametrize("name", [f"redis_asgi.{name}" for name in FOUNDATION if f"redis_asgi.{name}" in MODULES])
def test_foundation_imports_no_feature(name: str) -> None:
    """Errors, settings, keys, scope and connection know nothing of what stands on them."""
    allowed = {f"redis_asgi.{each}" for each in FOUNDATION} | {"redis_asgi"}
    ours = {target for target in _targets(name) if _within(target, "redis_asgi")}

    assert ours <= allowed


def test_foundation_has_no_circle() -> None:
    """Each module of the foundation stands on the ones before it."""
    order = [f"redis_asgi.{name}" for name in FOUNDATION]
    for name in order:
        if name in MODULES:
            later = set(order[order.index(name) :])
            assert not _targets(name) & later


@pytest.mark.parametrize("name", MODULES)
def test_numpy_stays_with_embeddings(name: str) -> None:
    """Only ``embeddings/`` pays for numpy."""
    if not _within(name, "redis_asgi.embeddings"):
        assert not [target for target in _targets(name) if _within(target, "numpy")]


@pytest.mark.parametrize("name", [name for name in MODULES if not _within(name, "redis_asgi.testing")])
def test_nothing_that_serves_knows_of_the_testing_kit(name: str) -> None:
    """Only who tests imports it, and nothing else sets the clock of the limits: no client ever can."""
    stores = [node for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.Attribute)]

    assert not [target for target in _targets(name) if _within(target, "redis_asgi.testing")]
    assert not [node.lineno for node in stores if isinstance(node.ctx, ast.Store) and _is_clock(node.value)]


def _is_clock(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "CLOCK"


EMBEDDINGS = "redis_asgi.embeddings"
STORAGE = ("vector_cache", "lookup", "local", "store", "server", "cluster", "memory", "joint_lookup", "lease", "codec")
ABOUT_REQUESTS = ("http_caching", "head", "headers", "keyspace", "question", "body", "routes", "wire", "piecewise")
ABOUT_CALLS = ("single_flight", "landing", "asking", "calls", "waiting")
ENDS = ("answers", "outcome", "exchange", "shared")
# Each room of the embedding half, and what it never reaches, by whatever way.
ROOMS = {
    STORAGE: (*ABOUT_REQUESTS, *ABOUT_CALLS, *ENDS, "sub_call"),
    ABOUT_REQUESTS: (*STORAGE[:-2], *ABOUT_CALLS, *ENDS),
    ("keyspace", "identity"): (*STORAGE[:-2], "sub_call"),
    ("counts", "outcome", "tokens"): (*STORAGE[:-2], *ABOUT_CALLS, "question", "exchange", "shared"),
}


def _reached(name: str) -> set[str]:
    reached: set[str] = set()
    left = {name}
    while left:
        at = left.pop()
        reached.add(at)
        # The fronts name what they load when it is first used.
        left |= {target for target in _targets(at) if target in MODULES} - reached - {"redis_asgi", EMBEDDINGS}
    return reached


@pytest.mark.parametrize(("names", "others"), ROOMS.items(), ids=["storage", "requests", "keys", "what is said"])
def test_a_room_knows_only_its_own(names: tuple[str, ...], others: tuple[str, ...]) -> None:
    """Storage knows no HTTP, no wire formats and no flights; reading a request and naming its keys, no storage."""
    for name in names:
        inside = [module for module in MODULES if _within(module, f"{EMBEDDINGS}.{name}")]
        reached = set[str]().union(*map(_reached, inside))

        assert inside
        assert not [(name, m) for m in reached for other in others if _within(m, f"{EMBEDDINGS}.{other}")]


def _reads_environment(name: str) -> bool:
    tree = ast.parse(MODULES[name].read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return bool(attributes & {"environ", "getenv", "environb"})


def test_only_settings_read_the_environment() -> None:
    """Every variable goes through ``Settings``, and pydantic-settings reads it."""
    readers = {name for name in MODULES if any(_within(target, "pydantic_settings") for target in _targets(name))}

    assert [name for name in MODULES if _reads_environment(name)] == []
    assert readers == {"redis_asgi.environment", "redis_asgi.setting_types"}


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
    """Nothing waits for numpy but vectors, nor for metrics, the notation or a framework before there is a use."""
    script = f"import sys, redis_asgi\n{use}\nprint([name for name in {LATE!r} if name in sys.modules])"
    done = run_python(script, env={"REDIS_URL": "memory://"})

    assert (f"{loaded}\n", "") == (done.stdout, done.stderr)


def test_import_with_bad_settings_works() -> None:
    """A misconfigured environment is told where something is built, never at import."""
    done = run_python("import redis_asgi", env={"REDIS_PORT": "x", "RATE_LIMITS": "often"})

    assert ("", 0) == (done.stderr, done.returncode)
