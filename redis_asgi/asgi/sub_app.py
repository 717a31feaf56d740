"""`SubApp`: the base of what is mounted beside an app,
such as its health checks: read-only, small and quiet.
"""

import functools
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from inspect import isawaitable
from typing import Annotated, Any, NoReturn, ParamSpec, TypeAlias, TypeVar

import orjson
from starlette.requests import HTTPConnection
from starlette.types import Receive, Scope, Send

from ..errors import ArgumentError, ConfigurationError
from ..misuse import Uncalled, check_callable, only_called_as, says_what_was_meant
from .paths import route_path
from .problem import CONTENT_TYPE, POLICY_VIOLATION, problem

Authorize: TypeAlias = Callable[[HTTPConnection], bool | Awaitable[bool]]

JSON = b"application/json"


@dataclass(frozen=True, slots=True)
class PageAnswer:
    """An answer of a page, to which `SubApp` adds ``Content-Length`` and the fields of every
    answer.

    Attributes:
        headers: More fields, names in lower case.
        cache_control: ``no-store`` unless the body is the same for ever under its URL.
    """

    body: bytes
    content_type: bytes = JSON
    status: int = 200
    headers: tuple[tuple[bytes, bytes], ...] = ()
    cache_control: bytes = b"no-store"


P = ParamSpec("P")
R = TypeVar("R")
_MOUNT = "It is an app, and is mounted: write app.mount('/health', health_app())."
_AUTHORIZE = "authorize=lambda conn: conn.headers.get('authorization') == expected"

Page: TypeAlias = Callable[[HTTPConnection], Awaitable[PageAnswer]]


def json_answer(value: Any, *, status: int = 200) -> PageAnswer:
    """*value* as JSON."""
    return PageAnswer(orjson.dumps(value), status=status)


def made_by_a_call(make: Callable[P, R]) -> Callable[P, R]:
    """Let a function that makes an app say so where it is taken for the app itself."""
    name = getattr(make, "__name__", "")
    mount = f"app.mount('/{name.removesuffix('_app')}', {name}())"

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        # A server, a mount or a route gives it a scope or a request.
        if args and isinstance(args[0], MutableMapping | HTTPConnection):
            raise ArgumentError(f"{name} is not called, and only makes an app when it is. Try {mount}.")
        if args:
            raise ArgumentError(f"{name} takes its arguments by name, and not the app. Try {mount}, or redis=...")
        return checked(*args, **kwargs)

    checked = says_what_was_meant(f"{name}(authorize=lambda conn: True)")(make)
    return made


class SubApp:
    """An ASGI app of a few read-only pages, to be mounted in another or served by itself.

    GET and HEAD, else 405; an unknown path is 404; a WebSocket is closed before it is accepted; a
    server's lifespan is answered. `RateLimitMiddleware` does not count requests for the pages of
    its instances.

    Args:
        pages: The path below the mount,
            without a final slash (``""`` is the root), to what answers there.
        authorize: Given the connection, whether it may read, sync or async; ``False`` is a 403.
            What it raises goes to the app's error handling: raise Starlette's
            ``HTTPException(401, headers=...)`` to ask for credentials. ``None`` = anybody may.
        open_pages: Paths that *authorize* is not asked about.

    Raises:
        ConfigurationError: If *authorize* cannot be called.
    """

    def __init__(
        self, pages: Mapping[str, Page], *, authorize: Authorize | None = None, open_pages: frozenset[str] = frozenset()
    ) -> None:
        if isinstance(authorize, str | bytes):
            authorize_is = "authorize= is a text, which is not callable"  # it may be the password itself
            raise ConfigurationError(f"{authorize_is}. Try {_AUTHORIZE}.")
        if authorize is not None:
            check_callable("authorize", authorize, "conn", _AUTHORIZE)
        self._pages = dict(pages)
        self._authorize = authorize
        self._open_pages = open_pages

    # Where a route is made of it, or of what makes it.
    __get_pydantic_core_schema__ = Uncalled(_MOUNT).__get_pydantic_core_schema__

    def __getattr__(self, name: str) -> NoReturn:
        # Such as what routers are asked for.
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}. {_MOUNT}")

    @property
    def pages(self) -> Sequence[str]:
        """The paths that answer below the mount, without a final slash; empty for the root."""
        return tuple(self._pages)

    @only_called_as(_MOUNT)
    async def __call__(self, scope: Scope, receive: Annotated[Receive, Uncalled(_MOUNT)], send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": ""})
        elif scope["type"] == "http":
            await _send(await self._answer(scope), scope, send)

    async def _answer(self, scope: Scope) -> PageAnswer:
        path = route_path(scope).removesuffix("/")
        page = self._pages.get(path)
        if page is None:
            return _problem(404)
        if scope["method"] not in ("GET", "HEAD"):
            return _problem(405, (b"allow", b"GET, HEAD"))
        connection = HTTPConnection(scope)
        if self._authorize is not None and path not in self._open_pages:
            said = self._authorize(connection)
            if not (await said if isawaitable(said) else said):
                return _problem(403)
        return await page(connection)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        """Answer a server that serves this app by itself;
        an app that it is mounted in passes nothing on.
        """
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self.aclose()
                await send({"type": "lifespan.shutdown.complete"})
                return
            await send({"type": "lifespan.startup.complete"})

    async def aclose(self) -> None:
        """Close what this loop has open for the app; for subclasses that open something."""


def _problem(status: int, *headers: tuple[bytes, bytes]) -> PageAnswer:
    return PageAnswer(problem(status), CONTENT_TYPE, status, headers)


async def _send(answer: PageAnswer, scope: Scope, send: Send) -> None:
    headers = [
        (b"content-type", answer.content_type),
        (b"content-length", b"%d" % len(answer.body)),
        (b"cache-control", answer.cache_control),
        (b"x-content-type-options", b"nosniff"),
        *answer.headers,
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    body = b"" if scope["method"] == "HEAD" else answer.body
    await send({"type": "http.response.body", "body": body})
