"""Fixtures of the laboratory."""

import pytest

from ..kit.servers import Server
from .story import Told, tell
from .table import ROWS, SECRET, USER

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


_ROWS = [pytest.param(name, marks=pytest.mark.slow) if row.slow else name for name, row in ROWS.items()]


@pytest.fixture(scope="module", params=_ROWS)
def told(request: pytest.FixtureRequest, server_binary: str) -> Told:
    """The story of one row, on a server of its own; told again if the machine stood still in it."""
    row = ROWS[request.param]
    arguments = ("--user", USER, "on", f">{SECRET}", "~*", "&*", "+@all", *row.arguments)
    with pytest.MonkeyPatch.context() as patch:
        # A refused login is tried every five seconds, which test_breaker shows; here they pass sooner.
        patch.setattr("redis_asgi.breaker._SLOW_PROBE_EVERY", 0.2)
        for _ in range(_TELLINGS):
            server = Server.start(server_binary, *arguments)
            try:
                story = tell(row, server)
            finally:
                server.stop()
            if not story.is_disturbed:
                break
    return story
