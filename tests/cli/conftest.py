"""Fixtures of the tests beside it."""

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from redis_asgi.cli.commands import app


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The same in this process, which is quicker: ``invoke("peek", "1.2.3.4", REDIS_URL=...)``."""

    def call(*arguments: str, text: str | None = None, **env: str | None) -> Result:
        for name, value in env.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        result = CliRunner().invoke(app, list(arguments), input=text)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call
