"""`status_app`: one page for whoever operates the app, with what its limiter,
its cache and its Redis do right now.

``markup``  text that is escaped unless it says otherwise    ``charts``  history as SVG
``page``    what stands on the page, and in which words      ``page.html``, ``status.css``  how it looks
"""

import os
import time
from functools import lru_cache
from importlib.resources import files

from starlette.requests import HTTPConnection

from ...asgi.sub_app import Authorize, Page, PageAnswer, SubApp, made_by_a_call
from ...connection.health_cache import Target
from ...connection.manager import RedisManager
from ...connection.pool_usage import PoolUsage, pool_usage
from ...connection.redis_argument import RedisArgument
from ...ratelimit.counting.local_engine import LocalEngine
from ...settings import Settings
from ...telemetry import telemetry
from ..health import Status, worst_standing
from .page import Facts, render

_HTML = b"text/html; charset=utf-8"
_CSS = b"text/css; charset=utf-8"
_SVG = b"image/svg+xml"
# No script at all, and nothing from elsewhere; the page itself says that it comes back.
_POLICY = (
    b"default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SAFETY = ((b"content-security-policy", _POLICY), (b"referrer-policy", b"no-referrer"))
# A shape for each, since a colour alone says nothing to some.
_ICONS: dict[Status, bytes] = {
    "healthy": b'<circle cx="8" cy="8" r="7" fill="#16803c"/>'
    b'<path d="M4.8 8.2 7 10.4 11.2 6" fill="none" stroke="#fff" stroke-width="1.8"/>',
    "degraded": b'<path d="M8 1 15.4 14.5H.6Z" fill="#b45309"/>'
    b'<path d="M8 5.6v4.2M8 11.3v1.7" stroke="#fff" stroke-width="1.7"/>',
    "unhealthy": b'<path d="M5 1h6l4 4v6l-4 4H5l-4-4V5Z" fill="#b91c1c"/>'
    b'<path d="m5.4 5.4 5.2 5.2m0-5.2-5.2 5.2" stroke="#fff" stroke-width="1.7"/>',
}


class StatusApp(SubApp):
    """The app that `status_app` makes."""

    def __init__(self, target: Target, *, authorize: Authorize | None) -> None:
        assets = {f"/{status}.svg": icon_answer(status) for status in _ICONS} | {"/status.css": _stylesheet()}
        # The same for everybody: a browser that asks for them without credentials learns nothing.
        super().__init__(
            {"": self._page, **{path: _fixed(answer) for path, answer in assets.items()}},
            authorize=authorize,
            open_pages=frozenset(assets),
        )
        self._target = target
        self._is_open = authorize is None
        telemetry()  # history begins now

    async def _page(self, connection: HTTPConnection) -> PageAnswer:
        now = await worst_standing(self._target.managers(connection.scope))
        facts = Facts(
            standing=now,
            history=telemetry().history(),
            in_flight=now.manager.per_process(LocalEngine.from_settings).in_flight(),
            pool=await _pool(now.manager),
            at=time.time(),
            process=os.getpid(),
            is_open=self._is_open,
            query=connection.query_params.multi_items(),
        )
        return PageAnswer(render(facts).encode(), _HTML, headers=_SAFETY)


async def _pool(manager: RedisManager) -> PoolUsage | None:
    if not manager.has_redis:
        return None
    try:
        return pool_usage(await manager.get_connection())
    except Exception:
        return None  # no client can be built


def _fixed(answer: PageAnswer) -> Page:
    async def page(_connection: HTTPConnection) -> PageAnswer:
        return answer

    return page


@lru_cache(maxsize=1)
def _stylesheet() -> PageAnswer:
    return PageAnswer((files(__package__) / "status.css").read_bytes(), _CSS)


def icon_answer(status: Status) -> PageAnswer:
    """The icon of the page's tab."""
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">%b</svg>' % _ICONS[status]
    return PageAnswer(svg, _SVG, headers=_SAFETY)


@made_by_a_call
def status_app(
    *, redis: RedisArgument = None, settings: Settings | None = None, authorize: Authorize | None = None
) -> SubApp:
    """A page for operators as an ASGI app, to be mounted at ``/status``, say.

    It shows what this process has decided and served in the last ten minutes, its busiest policies,
    and how its Redis is. It is plain HTML, without a script, and loads itself again every ten
    seconds. It names policies and figures of the server, but no host, no user and no client.

    Args:
        redis: A ``RedisManager``, a URL or a ``redis.asyncio`` client; ``None`` = that of the
            middlewares outside, else the shared default. Of several, the one that the app stands
            worst with is shown.
        settings: ``None`` = from the environment.
        authorize: Given the connection, whether it may read the page, sync or async; ``False`` is a
            403. Without it the page says that it is open to anybody.

    Raises:
        ConfigurationError: At construction, naming what cannot work.
    """
    return StatusApp(Target(redis, settings), authorize=authorize)
