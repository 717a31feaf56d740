"""The endpoint that a request is on its way to: its name,
and the calls that FastAPI makes in front of it.
"""

import functools
from collections.abc import Iterator

from starlette.types import Scope


def endpoint_name(endpoint: object) -> str:
    """An endpoint's ``module.qualname``, the same in every worker."""
    try:
        return _known_name(endpoint)
    except TypeError:  # not hashable
        return _full_name(endpoint)


def _full_name(endpoint: object) -> str:
    while isinstance(endpoint, functools.partial):
        endpoint = endpoint.func
    named = endpoint if hasattr(endpoint, "__qualname__") else type(endpoint)
    return f"{named.__module__}.{named.__qualname__}"


_known_name = functools.lru_cache(maxsize=1024)(_full_name)


def dependant_of(scope: Scope) -> object:
    """The dependant that FastAPI solves for a request;
    ``None`` where it is not FastAPI's, or a test put in another.
    """
    route = scope.get("route")
    kept = scope.get("fastapi")
    # A route of an included router has the dependencies of the routers around it here.
    context = kept.get("effective_route_context") if isinstance(kept, dict) else None
    if context is not None and getattr(context, "original_route", None) is route:
        route = context
    dependant = getattr(route, "dependant", None)
    overrides = getattr(scope.get("app"), "dependency_overrides", None)
    if overrides and any(call in overrides for call in calls_of(dependant)):
        return None
    return dependant


def calls_of(dependant: object) -> Iterator[object]:
    """The dependencies below *dependant*, in the order in which FastAPI calls them."""
    for below in getattr(dependant, "dependencies", ()):
        yield from calls_of(below)
        yield below.call
