"""`rate_limit`: limits on one endpoint as a decorator for Starlette."""

import functools
from collections.abc import Callable
from inspect import iscoroutinefunction
from typing import Annotated, Any, TypedDict, TypeVar, Unpack

from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection
from starlette.responses import Response

from ..connection.redis_argument import RedisArgument
from ..errors import ConfigurationError
from ..misuse import Uncalled, says_what_was_meant, shown
from ..settings import OnRedisError, Settings, StrategyName
from .answers.limited_response import text_fields
from .budgets.tokens import Tokens
from .route import RateLimit
from .rules.endpoints import endpoint_name
from .rules.partition import PartitionBy
from .rules.rule import Limits
from .stack import Placed, Stack

F = TypeVar("F", bound=Callable[..., Any])

_NOT_A_DEPENDENCY = Uncalled(
    "rate_limit is a decorator that takes its limit. Write @rate_limit('5/minute') right above the endpoint, or "
    "Depends(RateLimit('5/minute')) for a dependency."
)
# Where a decorated endpoint keeps itself, what it decorates, and the limits in front.
_STACK = "_redis_asgi_stack"


class RateLimitOptions(TypedDict, total=False):
    """The options of `RateLimit`, for `rate_limit`."""

    name: str | None
    partition_by: PartitionBy | None
    cost: int | Tokens | Callable[[HTTPConnection], Any]
    strategy: StrategyName | None
    on_redis_error: OnRedisError | None
    shadow: bool
    redis: RedisArgument
    settings: Settings | None


@says_what_was_meant("@rate_limit('5/minute', name='export')")
def rate_limit(limits: Annotated[Limits, _NOT_A_DEPENDENCY], **options: Unpack[RateLimitOptions]) -> Callable[[F], F]:
    """`RateLimit` as a decorator for Starlette endpoints: sync,
    async and WebSocket, functions and methods.

    It finds the request among the endpoint's arguments by its type.
    The options are those of `RateLimit`.

    Raises:
        ConfigurationError: At decoration, naming what cannot work.
    """
    if _returns_a_response(limits):
        raise ConfigurationError(
            f"@rate_limit stands without a limit on {shown(limits)}. Write @rate_limit('5/minute')."
        )
    limit = RateLimit(limits, **options)

    def decorate(endpoint: Annotated[F, _NOT_A_DEPENDENCY]) -> F:
        if isinstance(endpoint, HTTPConnection):
            # It was taken for the endpoint itself, whose place its limits have.
            raise ConfigurationError(
                f"@rate_limit stands without a limit on {shown(limits)}. Write @rate_limit('5/minute')."
            )
        if isinstance(endpoint, type):
            raise ConfigurationError(f"@rate_limit stands on the class {shown(endpoint)}. Put it on its methods.")
        # One decorator right on another: both limits are decided together,
        # in front of the endpoint itself.
        of, below, stacked = getattr(endpoint, _STACK, (None, endpoint, ()))
        placed = limit, 1 + max((place for _, place in stacked), default=-1)
        return _decorated(below, (placed, *stacked)) if of is endpoint else _decorated(endpoint, (placed,))

    return decorate


def stack_of(endpoint: object) -> tuple[object, tuple[Placed, ...]]:
    """The endpoint within its `rate_limit` decorators, and their limits, none for a plain one."""
    _, within, limits = getattr(endpoint, _STACK, (None, endpoint, ()))
    return within, limits


def limits_of(endpoint: object) -> tuple[RateLimit, ...]:
    """The limits that `rate_limit` has put in front of *endpoint*."""
    return tuple(limit for limit, _ in stack_of(endpoint)[1])


def _returns_a_response(limits: object) -> bool:
    """Whether what was given for limits says of itself that it is an endpoint."""
    returned = getattr(limits, "__annotations__", {}).get("return")
    return isinstance(returned, type) and issubclass(returned, Response)


def _decorated(endpoint: F, limits: tuple[Placed, ...]) -> F:
    """*endpoint* behind *limits*."""
    stack = Stack(limits, endpoint)

    @functools.wraps(endpoint)
    async def limited(*args: Any, **kwargs: Any) -> Any:
        conn = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, HTTPConnection)), None)
        if conn is None:
            raise RuntimeError(
                f"@rate_limit found no Request or WebSocket among the arguments of {endpoint_name(endpoint)}. "
                "Add a 'request: Request' parameter."
            )
        decision = await stack.check(conn)
        if iscoroutinefunction(endpoint):
            result = await endpoint(*args, **kwargs)
        else:
            result = await run_in_threadpool(endpoint, *args, **kwargs)
        if decision is not None and decision.immediate and isinstance(result, Response):
            for key, value in text_fields(decision, conn.scope).items():
                result.headers.setdefault(key, value)
        return result

    # Whose it is stands with it: another decorator may copy it to a function of its own.
    setattr(limited, _STACK, (limited, endpoint, limits))
    return limited  # type: ignore[return-value]  # wraps() keeps the signature
