"""What the tests of real clients need: skipped where it is missing,
or failed where nothing may be skipped.
"""

import importlib
import importlib.util
import os
from typing import Any, NoReturn

import pytest


def needed(module: str) -> Any:
    """The module *module*, else `missing`."""
    installed(module)
    return importlib.import_module(module)


def installed(*modules: str) -> None:
    """Go on where all of *modules* are there, which are not imported, else `missing`."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            missing(f"needs {module}, of the extra clients")


def missing(what: str) -> NoReturn:
    """Skip the test, or with ``REDIS_ASGI_REQUIRE_CLIENTS=1`` fail it."""
    if os.environ.get("REDIS_ASGI_REQUIRE_CLIENTS") == "1":
        pytest.fail(f"{what}: required because REDIS_ASGI_REQUIRE_CLIENTS is set", pytrace=False)
    pytest.skip(what)
