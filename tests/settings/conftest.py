"""What the tests of settings have in common: an environment without any."""

import pytest


@pytest.fixture(autouse=True)
def shipped_deadlines() -> None:
    """The environment is the subject here: no variable of the tests' own is in it."""
