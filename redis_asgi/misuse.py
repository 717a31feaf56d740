"""Misuse, named where it happens:
arguments that cannot work are refused, with what to write instead.

Only construction pays for it. Python's own words
(``__init__() takes 2 positional arguments but 3 were given``) say what is wrong, but not what is
right.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, ParamSpec, TypeVar

from .errors import ArgumentError, ConfigurationError
from .redaction import without_secrets

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# What other packages call it.
_ELSEWHERE = {
    "default_limits": "limits",
    "endpoint": "paths",
    "fail_open": "on_redis_error",
    "handler": "on_exceeded",
    "identifier": "partition_by",
    "key": "partition_by",
    "key_func": "partition_by",
    "max_requests": "limits",
    "on_breach": "on_exceeded",
    "per": "limits",
    "quota": "limits",
    "rate": "limits",
    "redis_url": "redis",
    "requests": "limits",
    "seconds": "limits",
    "swallow_errors": "on_redis_error",
    "times": "limits",
    "url": "redis",
    "weight": "cost",
    "window": "limits",
}
# What is said where it is given to something else.
_INSTEAD = {
    "concurrency": (
        "How many may be in flight is a rule of the middleware, which sees where an answer ends: "
        "rules=[Rule(concurrency=4, paths='/chat')]; in code it is `async with limiter.slot(client_id, 4)`."
    ),
}
_METHODS = frozenset(("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "WEBSOCKET"))
_STRATEGIES = frozenset(("fixed-window", "gcra", "moving-window", "sliding-window-counter"))
_LONGEST_SHOWN = 60


def shown(value: object) -> str:
    """*value* in an error: a function or class by its name,
    anything else by its repr, not longer than a line takes.
    """
    name = getattr(value, "__qualname__", None)
    text = name.rpartition("<locals>.")[2] if isinstance(name, str) else without_secrets(repr(value))
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def check_callable(label: str, value: object, takes: str, example: str) -> None:
    """Refuse a *value* that cannot be called with what it will be given.

    Args:
        takes: The names of what it is given, such as ``conn, decision``.
        example: What would work.

    Raises:
        ConfigurationError: Says which, and shows *example*.
    """
    if not callable(value):
        raise ConfigurationError(f"{label}={shown(value)} is not callable. Try {example}.")
    if isinstance(value, type) and any("__call__" in vars(each) for each in value.__mro__[:-1]):
        raise ConfigurationError(f"{label}={shown(value)} is not called: it is a class. Try {example}.")
    if getattr(value, "reads_body", False):
        raise ConfigurationError(
            f"{label}={shown(value)} counts by a request's body, which is read for partition_by of a rule alone. "
            f"Try {example}."
        )
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return  # such as of a class in C: only a call will tell
    try:
        signature.bind(*takes.split(", "))
    except TypeError as error:
        raise ConfigurationError(
            f"{label}={shown(value)} is called with ({takes}), which it does not take: {error}. Try {example}."
        ) from None


def check_flag(label: str, value: object) -> None:
    """Refuse what is neither ``True`` nor ``False``: any text would be true, ``"no"`` too.

    Raises:
        ConfigurationError: Shows the value.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{label}={shown(value)} is not True or False.")


def check_app(app: object, example: str) -> None:
    """Refuse an *app* that no server could call.

    Raises:
        ConfigurationError: Shows *example*.
    """
    if not callable(app):
        raise ConfigurationError(f"app={shown(app)} is no ASGI app. Try {example}.")


def only_called_as(meant: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have Python's words for a call with other arguments begin with what was *meant*, at no cost
    for any call.

    For what servers and frameworks call, and many times:
    Python names a function by its ``__qualname__`` there.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        function.__qualname__ = f"{meant} {function.__qualname__}"
        return function

    return decorate


def says_what_was_meant(example: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function refuse a call whose arguments do not fit, saying which were meant.

    Args:
        example: A call that works.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except TypeError:
                _check_call(function, args, kwargs, example)
                raise

        return checked

    return decorate


def constructor_says_what_was_meant(example: str) -> Callable[[type[T]], type[T]]:
    """`says_what_was_meant` for the constructor of a class."""

    def decorate(cls: type[T]) -> type[T]:
        init: Callable[..., None] = cls.__init__

        @functools.wraps(init)
        def checked(self: T, *args: Any, **kwargs: Any) -> None:
            try:
                init(self, *args, **kwargs)
            except TypeError:
                _check_call(cls, args, kwargs, example)
                raise

        cls.__init__ = checked  # type: ignore[assignment]  # it takes what it took
        return cls

    return decorate


def _check_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], example: str) -> None:
    """Say what was meant if it is these arguments that *function* did not take."""
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        named = list(signature.parameters.values())
        if named and named[0].name == "self":  # of a method
            signature, args = signature.replace(parameters=named[1:]), args[1:]
        raise ArgumentError(_misfit(function.__name__, signature, args, kwargs, example)) from None


def _misfit(
    name: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], example: str
) -> str:
    parameters = signature.parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    known = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unknown = next((keyword for keyword in kwargs if keyword not in known), None)
    if unknown in _INSTEAD:
        return f"{name} has no argument {unknown!r}. {_INSTEAD[unknown]}"
    if unknown is not None:
        meant = _ELSEWHERE.get(unknown, "")
        near = [meant] if meant in known else difflib.get_close_matches(unknown, known, n=1)
        guess = f"Did you mean {near[0]}? It" if near else "It"
        return f"{name} has no argument {unknown!r}. {guess} takes {', '.join(known)}: {example}."
    if len(args) > len(positional):
        extra = args[len(positional)]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        keyword = _keyword_for(extra, None if takes_any else {*known} - {*positional, *kwargs})
        meant = f"{keyword}={shown(extra)}" if keyword else f"a name before {shown(extra)}"
        alone = f"takes {' and '.join(positional)} alone by position" if positional else "takes nothing by position"
        return f"{name} {alone}: write {meant}. Try {example}."
    twice = next((n for n in positional[: len(args)] if n in kwargs), None)
    if twice is not None:
        return f"{name} was given {twice} by position and by name. Try {example}."
    missing = [n for n in known[len(args) :] if n not in kwargs and parameters[n].default is inspect.Parameter.empty]
    return f"{name} needs {' and '.join(missing)}. Try {example}."


def _keyword_for(value: object, free: set[str] | None) -> str | None:
    """The one of the *free* arguments (``None``: any) that *value* was most likely meant for."""
    return next((name for name in _meant_for(value) if free is None or name in free), None)


def _meant_for(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return _meant_for_text(value)
    if isinstance(value, bool):
        return ("shadow",)
    if isinstance(value, int):
        return ("cost",)
    if callable(value):
        return ("partition_by",)
    if isinstance(value, dict):
        return ("routes",)
    if isinstance(value, list | tuple | set):
        return ("rules", "methods") if any(str(each).upper() in _METHODS for each in value) else ("rules", "paths")
    return ()


def _meant_for_text(text: str) -> tuple[str, ...]:
    if "://" in text:
        return ("redis",)
    if text.startswith("/"):
        return ("paths",)
    if text.upper() in _METHODS:
        return ("methods",)
    return ("strategy",) if text in _STRATEGIES else ("name", "namespace")


class Uncalled:
    """An annotation for what FastAPI must not take for a parameter of a request:
    it says how it was meant instead.

    ``Depends(RateLimit)`` has FastAPI ask each request for the arguments of the constructor, as
    query parameters.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> NoReturn:
        """The schema that FastAPI asks for when it reads a signature.

        Raises:
            ConfigurationError: The text.
        """
        raise ConfigurationError(self._text)
