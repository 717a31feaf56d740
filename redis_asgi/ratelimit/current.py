"""`CurrentLimit`: what was decided about a request, as an argument of a FastAPI endpoint."""

from typing import Annotated, Any, TypeAlias

from starlette.requests import HTTPConnection
from starlette.types import Scope

from .answers.request_decision import RequestDecision, decided_about
from .counting.settlement import check_used
from .limits.decision import Decision

_UNLIMITED = Decision(allowed=True, source="none")


class _Undecided(RequestDecision):
    """A stand-in where no decision was made (yet): it admits, and its charges go nowhere.

    A per-route limit may still decide, behind the dependency that gave it out;
    from then on it is that limit's.
    """

    __slots__ = ("_scope",)

    def __init__(self, scope: Scope) -> None:
        object.__setattr__(self, "_scope", scope)

    def __getattr__(self, name: str) -> Any:
        # Nothing is kept in the fields, so that each look comes here.
        return getattr(decided_about(self._scope) or _UNLIMITED, name)

    @property
    def degraded(self) -> bool:
        decided = decided_about(self._scope)
        return decided is not None and decided.degraded

    def charge(self, cost: int, policy: str | None = None) -> None:
        decided = decided_about(self._scope)
        if decided is not None:
            decided.charge(cost, policy)
        elif not isinstance(cost, int) or isinstance(cost, bool):
            raise ValueError(f"cost={cost!r} is not a whole number of units.")

    def used(self, units: int, policy: str | None = None) -> None:
        decided = decided_about(self._scope)
        if decided is not None:
            decided.used(units, policy)
        else:
            check_used(units)

    async def reset(self, name: str) -> bool:
        decided = decided_about(self._scope)
        return decided is not None and await decided.reset(name)


async def current_limit(conn: HTTPConnection) -> RequestDecision:
    """The decision about a request, as ``request.state.rate_limit`` has it.

    Where no limit applies (an exempt path, a tenant without a limit, an app in a test without the
    middleware) it is one that admits, with no ``policies`` and ``source`` ``none``; ``charge()``
    and ``reset()`` do nothing then.
    """
    return decided_about(conn.scope) or _Undecided(conn.scope)


def _dependency() -> Any:
    try:
        from fastapi import Depends  # noqa: PLC0415
    except ImportError:
        return None  # nothing asks for an argument then, and all names of the package can be imported still
    return Depends(current_limit)


_CURRENT = _dependency()
CurrentLimit: TypeAlias = Annotated[RequestDecision, _CURRENT]
