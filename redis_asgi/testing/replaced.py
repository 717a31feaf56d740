"""A method of the package that does something else for a while:
what only tests need costs an app nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: type, name: str, make: Callable[[Any], Callable[..., Any]]) -> Iterator[None]:
    """Let the method *name* of *owner* be what *make* makes of it."""
    method = owner.__dict__[name]
    setattr(owner, name, make(method))
    try:
        yield
    finally:
        setattr(owner, name, method)
