"""A middleware's part in the lifespan of its app:
the shared client stays open as long as the app lives.
"""

from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..event_loop import check_at_start
from ..telemetry import flush_counts
from .manager import RedisManager

_ENDS = ("lifespan.shutdown.complete", "lifespan.shutdown.failed")


async def live(
    app: ASGIApp,
    manager: RedisManager | None,
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    at_end: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Pass a lifespan on to *app*, and retain *manager* from its start to its end.

    It is retained before the app's own start, which may end with the only other user of the client,
    and released before the server hears of the end, as the server may then end the loop.

    Args:
        manager: Whose client is held; ``None`` when its life is not the package's business.
        at_end: What comes first at the end, also when the app raises.
    """
    await check_at_start(receive, send)
    is_retained = has_ended = False

    async def end() -> None:
        nonlocal has_ended, is_retained
        if not has_ended:
            has_ended = True
            if at_end is not None:
                await at_end()
        if is_retained and manager is not None:
            is_retained = False
            await manager.release()
        flush_counts()

    async def starting() -> Message:
        nonlocal is_retained
        message = await receive()
        if message["type"] == "lifespan.startup" and manager is not None and not is_retained:
            is_retained = True
            manager.retain()
        return message

    async def ending(message: Message) -> None:
        if message["type"] in _ENDS:
            await end()
        await send(message)

    try:
        await app(scope, starting, ending)
    finally:
        await end()
