"""Fixtures of the laboratory."""

from dataclasses import replace
from typing import Any

import pytest

from ..kit.servers import Server, version_of
from .story import Told, tell
from .table import OF_THE_SERVER, ROWS, SECRET, USER

_TELLINGS = 3
_FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> list[str]:
    """Lines to be printed when all tests have run."""
    return request.config.stash.setdefault(_FIGURES, [])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what was measured."""
    lines = config.stash.get(_FIGURES, [])
    if lines:
        terminalreporter.section("figures of the laboratory")
        for line in lines:
            terminalreporter.write_line(line)


def _marked(name: str) -> Any:
    marks = [pytest.mark.slow] * ROWS[name].slow + [pytest.mark.server] * (name in OF_THE_SERVER)
    return pytest.param(name, marks=marks)


@pytest.fixture(scope="module", params=[_marked(name) for name in ROWS])
def told(request: pytest.FixtureRequest, server_binary: str) -> Told:
    """The story of one row, on a server of its own; told again if the machine stood still in it."""
    row = ROWS[request.param]
    if version_of(server_binary).startswith("redis 6."):
        if row.before_7 is None:
            pytest.skip("Redis 6.2 has no way to bring it about")
        row = replace(row, **row.before_7)
    arguments = ("--user", USER, "on", f">{SECRET}", "~*", "&*", "+@all", *row.arguments)
    with pytest.MonkeyPatch.context() as patch:
        # A refused login is tried every five seconds,
        # which test_breaker shows; here they pass sooner.
        patch.setattr("redis_asgi.connection.breaker._SLOW_PROBE_EVERY", 0.2)
        for _ in range(_TELLINGS):
            server = Server.start(server_binary, *arguments)
            try:
                story = tell(row, server)
            finally:
                server.stop()
            if not story.is_disturbed:
                break
    return story
