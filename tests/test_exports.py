"""The public face of the package."""

import inspect

import pytest

import redis_asgi


def test_all_is_sorted_and_complete() -> None:
    """``__all__`` is every public name of the package, the lazily loaded ones included, in order."""
    here = {name for name, value in vars(redis_asgi).items() if not name.startswith("_") and _is_ours(value)}

    assert sorted(here | set(redis_asgi._LATE)) == redis_asgi.__all__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = redis_asgi.Nothing


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
