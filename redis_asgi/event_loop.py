"""The event loop that all of the package needs: asyncio's."""

import asyncio

from starlette.types import Receive, Send


def running_loop() -> asyncio.AbstractEventLoop:
    """The running event loop.

    Raises:
        RuntimeError: If it is none of asyncio's, such as trio's.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "redis_asgi needs a running asyncio event loop, and here is none. trio is not supported, because the Redis "
            "client is written for asyncio: run the server on asyncio (hypercorn: --worker-class asyncio)."
        ) from None


async def check_at_start(receive: Receive, send: Send) -> None:
    """`running_loop` in a lifespan: the server hears that the app does not start, and why.

    Raises:
        RuntimeError: The same.
    """
    try:
        running_loop()
    except RuntimeError as error:
        await receive()
        # A server takes an app that only raises for one without a lifespan, and serves it.
        await send({"type": "lifespan.startup.failed", "message": str(error)})
        raise
