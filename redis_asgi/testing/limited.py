"""`assert_limited`: a limit holds, and says the truth about when it ends."""

import inspect
from collections.abc import Callable, Coroutine, Generator, Mapping
from contextlib import nullcontext
from typing import Any, Protocol, TypeAlias, TypeVar, overload

from ..misuse import shown
from .clock import RateLimitClock, current_clock, held_clock


class Response(Protocol):
    """The response to a client's request."""

    @property
    def status_code(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def text(self) -> str: ...


R_co = TypeVar("R_co", bound=Response, covariant=True)


class SyncClient(Protocol[R_co]):
    """A client that returns responses, such as Starlette's ``TestClient``."""

    @property
    def request(self) -> Callable[..., R_co]: ...


class AsyncClient(Protocol[R_co]):
    """A client whose responses are awaited, such as ``httpx.AsyncClient``."""

    @property
    def request(self) -> Callable[..., Coroutine[Any, Any, R_co]]: ...


R = TypeVar("R", bound=Response)
# Asks for one response after the other; returns the first refusal.
Steps: TypeAlias = Generator[None, R, R]


@overload
def assert_limited(client: SyncClient[R], method: str, url: str, *, after: int, **options: Any) -> R: ...
@overload
def assert_limited(
    client: AsyncClient[R], method: str, url: str, *, after: int, **options: Any
) -> Coroutine[Any, Any, R]: ...
def assert_limited(client: Any, method: str, url: str, *, after: int, **options: Any) -> Any:
    """Prove that *after* requests are admitted and the next is refused,
    for as long as its ``Retry-After`` says.

    A second before that time it must still be refused, and then admitted. The clock of the limits
    is moved for it: the one of the fixture ``rate_limit_clock``, else one that is held for as long
    as this takes.

    Args:
        client: An ``httpx.AsyncClient``, with which this is awaited, or a synchronous one such as
            ``TestClient``, with which it is not.
        after: How many requests are admitted; 0 or more.
            Any answer but a 429 and a 503 counts as one.
        options: For ``client.request``, such as *headers* or *json*.

    Returns:
        The first refusal.

    Raises:
        AssertionError: When it is not so; it says which request was answered how.
        TypeError: *client* is none, such as the app itself.
    """
    __tracebackhide__ = True
    if not isinstance(after, int) or isinstance(after, bool) or after < 0:
        raise ValueError(f"after={after!r} is not a number of requests. Try after=5.")
    if not callable(getattr(client, "request", None)):
        raise TypeError(f"client={shown(client)} is no client. Try TestClient(app), or an httpx.AsyncClient.")
    if inspect.iscoroutinefunction(client.request):
        return _assert_async(client, method, url, after, options)
    with _clock() as clock:
        steps: Steps[Any] = _steps(clock, f"{method} {url}", after)
        next(steps)
        try:
            while True:
                steps.send(client.request(method, url, **options))
        except StopIteration as end:
            return end.value


async def _assert_async(client: Any, method: str, url: str, after: int, options: Mapping[str, Any]) -> Any:
    __tracebackhide__ = True
    with _clock() as clock:
        steps: Steps[Any] = _steps(clock, f"{method} {url}", after)
        next(steps)
        try:
            while True:
                steps.send(await client.request(method, url, **options))
        except StopIteration as end:
            return end.value


def _clock() -> Any:
    held = current_clock()
    return nullcontext(held) if held is not None else held_clock()


def _steps(clock: RateLimitClock, what: str, after: int) -> Steps[R]:
    __tracebackhide__ = True
    for i in range(1, after + 1):
        response = yield
        _check(f"{what}: request {i} of {after}", response, refused=False, hint=_COUNTED_BEFORE)
    refusal = yield
    _check(f"{what}: request {after + 1}, the first over the limit,", refusal, refused=True)
    wait = _retry_after(what, refusal)
    clock.advance(wait - 1)
    _check(f"{what}: a second before its Retry-After of {wait} s a request", (yield), refused=True)
    clock.advance(1)
    _check(f"{what}: after its Retry-After of {wait} s a request", (yield), refused=False)
    return refusal


def _check(which: str, response: Response, *, refused: bool, hint: str = "") -> None:
    __tracebackhide__ = True
    status = response.status_code
    if status == 429 if refused else status not in (429, 503):
        return
    expected = "refused with 429" if refused else "admitted"
    raise AssertionError(f"{which} was answered with {status}, not {expected}.{_hint(response, refused=refused)}{hint}")


def _hint(response: Response, *, refused: bool) -> str:
    """A hint at why an answer is not the one that was expected."""
    if refused:
        said = "; ".join(f"{name}: {response.headers[name]}" for name in _TELLING if name in response.headers)
        return f" It says {said}." if said else " It has no fields of a limit: none applies, or none is shown."
    return f" It says: {response.text[:500]}"


_COUNTED_BEFORE = " (Counted before? A real Redis keeps what tests have counted that did not hold rate_limit_clock.)"
_TELLING = ("ratelimit-policy", "ratelimit", "x-ratelimit-limit", "x-ratelimit-remaining")


def _retry_after(what: str, refusal: Response) -> int:
    __tracebackhide__ = True
    said = refusal.headers.get("retry-after")
    if said is None:
        raise AssertionError(
            f"{what}: the refusal has no Retry-After: its cost exceeds the quota, so that waiting cannot help."
            f"{_hint(refusal, refused=False)}"
        )
    if not (said.isascii() and said.isdigit()) or int(said) < 1:
        raise AssertionError(f"{what}: Retry-After {said!r} is not a whole number of seconds.")
    return int(said)
