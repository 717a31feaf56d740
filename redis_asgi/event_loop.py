"""The event loop that all of the package needs: asyncio's."""

import asyncio


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
